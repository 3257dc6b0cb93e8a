"""Grouped-query attention with Llama's and Qwen's conventions: rotate-half RoPE; biases or head norms where asked for.

Letters: B batch, T query tokens, S key tokens, D width, H heads, G key-value heads, Q head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abyssal.model.attention import AttentionContext, attend, attend_in_tiles, core_dtype
from abyssal.model.config import ModelConfig
from abyssal.model.linear import Linear, RMSNorm
from abyssal.model.rope import rotate


class GQA(nn.Module):
    invariant = False

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width = config.head_dim
        self.q_proj = Linear(config.hidden_size, config.num_attention_heads * width, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, config.num_key_value_heads * width, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, config.num_key_value_heads * width, bias=config.qkv_bias)
        self.o_proj = Linear(config.num_attention_heads * width, config.hidden_size)
        if config.qk_norm:
            self.q_norm = RMSNorm(width, config.rms_norm_eps)
            self.k_norm = RMSNorm(width, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, context: AttentionContext) -> Tensor:
        heads = (-1, self.config.head_dim)
        q_BTHQ, k_BSGQ, v_BSGQ = (
            project(x_BTD).unflatten(-1, heads) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            q_BTHQ, k_BSGQ = self.q_norm(q_BTHQ), self.k_norm(k_BSGQ)
        q_BTHQ = rotate(q_BTHQ, context.cos, context.sin, interleaved=False)
        k_BSGQ = rotate(k_BSGQ, context.cos, context.sin, interleaved=False)
        if context.cache is not None:
            entries = context.cache.update(self.layer, torch.cat((k_BSGQ, v_BSGQ), dim=2).flatten(2))
            k_BSGQ, v_BSGQ = entries.unflatten(-1, heads).chunk(2, dim=2)
        core, scale = core_dtype(x_BTD, invariant=self.invariant), self.config.softmax_scale
        if self.invariant:
            assert context.mask_BTS is not None, "invariant attention reads from a cache"
            q_BTHQ, k_BSGQ, v_BSGQ = q_BTHQ.to(core), k_BSGQ.to(core), v_BSGQ.to(core)
            out_BTHQ = attend_in_tiles(q_BTHQ, k_BSGQ, v_BSGQ, context.mask_BTS, scale=scale)
        else:
            out_BTHQ = attend(q_BTHQ, k_BSGQ, v_BSGQ, context.mask_BTS, scale=scale, core=core)
        return self.o_proj(out_BTHQ.to(x_BTD.dtype).flatten(2))
