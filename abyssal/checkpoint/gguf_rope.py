"""RopeScaling <-> GGUF: keys under rope.scaling, and Llama 3's bands, which a file has only as rope_freqs.weight."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from abyssal.checkpoint.gguf_keys import MAX_CONTEXT, Keys
from abyssal.model.config import ModelConfig, RopeScaling, yarn_mscale
from abyssal.model.rope import rope_amplitude, rope_frequencies

LLAMA3_BANDS = (1.0, 4.0)  # low and high factor: Llama 3's own
LLAMA3_LENGTH = 8192  # original length, likewise; files do not repeat either


def read_scaling(read: Keys, *, mla: bool) -> RopeScaling | None:
    """YaRN's amplitude on cos and sin is 0.1 ln(factor) + 1 times attn_factor; deepseek2 has none, it scales scores."""
    factor = read.number("rope.scaling.factor", 1.0)
    kind = read.value("rope.scaling.type", str, "linear")  # llama.cpp's default; by a factor of 1 it is none
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    if kind != "yarn":
        raise ValueError(f"{read.arch}.rope.scaling.type={kind!r} is not supported; known are none, linear and yarn")
    mscale, amplitude = 0.0, None
    if mla:
        read.only("rope.scaling.attn_factor", 1.0, "deepseek2 scales scores by yarn_log_multiplier")
        mscale = round(10 * read.number("rope.scaling.yarn_log_multiplier"), 6)  # a tenth of it, in 32 bits
    elif (attn_factor := read.number("rope.scaling.attn_factor", 1.0)) != 1:
        amplitude = round(attn_factor * yarn_mscale(factor, 1.0), 6)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=read.count("rope.scaling.original_context_length", most=MAX_CONTEXT),
        beta_fast=read.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=read.number("rope.scaling.yarn_beta_slow", 1.0),
        mscale=mscale,
        mscale_all_dim=mscale,
        attention_factor=amplitude,
    )


def write_scaling(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    original = {"rope.scaling.original_context_length": scaling.original_max_position_embeddings}
    if scaling.kind == "llama3":  # rope_freqs.weight says the rest; a factor here would scale a second time
        return original
    keys = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
    if scaling.kind == "linear":
        return keys
    keys |= original | {
        "rope.scaling.yarn_beta_fast": float(scaling.beta_fast),
        "rope.scaling.yarn_beta_slow": float(scaling.beta_slow),
    }
    amplitude = rope_amplitude(config)
    if config.attention == "mla":
        if amplitude != 1:
            raise ValueError(
                f"mscale={scaling.mscale} is not mscale_all_dim={scaling.mscale_all_dim}: GGUF's deepseek2 has one "
                f"number for both; export to a directory instead"
            )
        return keys | {"rope.scaling.yarn_log_multiplier": 0.1 * scaling.mscale_all_dim}
    attn_factor = amplitude / yarn_mscale(scaling.factor, 1.0)
    return keys if attn_factor == 1 else keys | {"rope.scaling.attn_factor": attn_factor}


def llama3_scaling(read: Keys, config: ModelConfig, factors: NDArray[Any]) -> RopeScaling:
    """The scaling whose frequencies these factors give. (Llama 3.1 release code)

    Slow pairs are divided by `factor`, fast ones by 1. In the band between, 1/divisor = s + (1 - s) / factor with
    s = (original / wavelength - low) / (high - low): two pairs of the band give low and high.
    """
    original = read.count("rope.scaling.original_context_length", LLAMA3_LENGTH, most=MAX_CONTEXT)
    plain = rope_frequencies(config).double().numpy()
    factors = factors.astype(np.float64)
    if factors.shape != plain.shape or not (np.isfinite(factors).all() and factors.min() >= 1):
        raise ValueError(f"rope_freqs.weight of shape {factors.shape} holds no factors for {len(plain)} pairs")
    factor = float(str(np.float32(factors.max())))
    guesses = [LLAMA3_BANDS]
    in_band = (factors > 1) & (factors < factors.max() * (1 - 1e-6))
    if in_band.sum() > 1:
        s = (1 / factors[in_band] - 1 / factor) / (1 - 1 / factor)
        with np.errstate(all="ignore"):  # of factors of another form, which no guess then fits
            slope, offset = np.polyfit(original * plain[in_band] / (2 * math.pi), s, 1)
            guesses.append((float(round(-offset / slope, 4)), float(round((1 - offset) / slope, 4))))
    for low, high in guesses:
        scaling = RopeScaling(
            kind="llama3", factor=factor, original_max_position_embeddings=original, low_freq_factor=low,
            high_freq_factor=high,
        )  # fmt: skip
        ours = rope_frequencies(replace(config, rope_scaling=scaling)).double().numpy()
        if np.allclose(plain / factors, ours, rtol=1e-5, atol=0):
            return scaling
    raise ValueError("rope_freqs.weight is no scaling of Llama 3's form, the only one supported")


def rope_factors(config: ModelConfig) -> NDArray[np.float32] | None:
    """By what Llama 3's scaling divides each frequency: the tensor rope_freqs.weight, or None for another scaling."""
    if config.rope_scaling is None or config.rope_scaling.kind != "llama3":
        return None
    plain = rope_frequencies(replace(config, rope_scaling=None))
    return (plain / rope_frequencies(config)).numpy()
