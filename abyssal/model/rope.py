"""Rotary position embedding: frequencies (plain, YaRN, Llama 3, linear, or given one by one) and the rotation itself.

Two layouts: interleaved pairs (x0 x1)(x2 x3).. as in official DeepSeek checkpoints, or rotate-half as Llama and Qwen.
Reading one as the other breaks a checkpoint without an error, so the layout is a config field.
Letters: B batch, T tokens, H heads, R rotary width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from abyssal.model.config import ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair, (R/2,) FP32."""
    if config.rope_inv_freq is not None:
        return torch.tensor(config.rope_inv_freq, dtype=torch.float32)
    dim = config.rope_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    plain = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    return _yarn(plain, scaling, dim=dim, theta=config.rope_theta)


def rope_amplitude(config: ModelConfig) -> float:
    """Factor on cos and sin."""
    return 1.0 if config.rope_scaling is None else config.rope_scaling.amplitude


def _yarn(plain: Tensor, scaling: RopeScaling, *, dim: int, theta: float) -> Tensor:
    """Fast pairs keep their frequency, slow ones are divided by the factor, a ramp lies between. (YaRN section 3.2)"""

    def pair_that_turns(times: float) -> float:
        length = scaling.original_max_position_embeddings
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return plain * (1 - ramp) + plain / scaling.factor * ramp


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, a linear blend between. (Llama 3.1 release code)"""
    wavelength = 2 * math.pi / plain
    ratio = scaling.original_max_position_embeddings / wavelength
    blend = (ratio - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return plain / scaling.factor * (1 - blend) + plain * blend


def rope_tables(positions_BT: Tensor, frequencies: Tensor, amplitude: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each (B, T, 1, R/2) FP32: the 1 is for heads."""
    angles = positions_BT.to(torch.float32)[..., None] * frequencies
    return (angles.cos() * amplitude)[..., None, :], (angles.sin() * amplitude)[..., None, :]


def rotate(x_BTHR: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Turn each pair by its angle, in FP32. Interleaved input leaves in half-split order.

    The order of the result is free as long as queries and keys share it: scores are sums over all pairs.
    """
    x = x_BTHR.float()
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTHR.dtype)
