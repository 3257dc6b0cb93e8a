"""Multi-head Latent Attention, expanded and absorbed side by side. (DeepSeek-V2 section 2.1, V3 section 2.1.1)

Keys and values of all heads come from one latent of width C; the cache keeps that latent, already normalised, and one
rotated key that all heads share. Expanded: make every head's keys and values, then attend (training, prefill).
Absorbed: fold W_UK into the query and W_UV into the output, so each head attends to the latent itself (decode; every
token in the engine's invariant mode).
Letters: B batch, T query tokens, S key tokens, D width, H heads, N nope dim, R rope dim, C kv latent, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abyssal.model.attention import AttentionContext, attend, attend_in_tiles, core_dtype
from abyssal.model.config import ModelConfig
from abyssal.model.linear import Linear, RMSNorm
from abyssal.model.rope import rotate

FEW_QUERIES = 8  # drafts that are verified come in such numbers
LATENT_NORM_EPS = 1e-6  # as in the official code, whatever the config's rms_norm_eps


class MLA(nn.Module):
    invariant = False

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        heads, dim = config.num_attention_heads, config.hidden_size
        if config.q_lora_rank is None:
            self.q_proj = Linear(dim, heads * config.qk_head_dim, bias=config.qkv_bias)
        else:
            self.q_a_proj = Linear(dim, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(
            dim, config.kv_lora_rank + config.qk_rope_head_dim, bias=config.qkv_bias
        )
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS) if config.latent_norm else nn.Identity()
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, dim)

    def forward(self, x_BTD: Tensor, context: AttentionContext) -> Tensor:
        q_nope_BTHN, q_rope_BTHR = self.queries(x_BTD, context)
        entries_BTW = self.cache_entries(x_BTD, context)
        if context.cache is not None:
            entries_BTW = context.cache.update(self.layer, entries_BTW)
        # few query tokens: absorbing costs H*(N+V)*C per query instead of per key
        absorb = context.cache is not None and (x_BTD.shape[1] <= FEW_QUERIES or self.invariant)
        form = self.absorbed if absorb else self.expanded
        core = core_dtype(x_BTD, invariant=self.invariant)
        out_BTHV = form(q_nope_BTHN.to(core), q_rope_BTHR.to(core), entries_BTW.to(core), context.mask_BTS)
        return self.o_proj(out_BTHV.to(x_BTD.dtype).flatten(2))

    def queries(self, x_BTD: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """Unrotated part (B, T, H, N) and rotated part (B, T, H, R)."""
        if self.config.q_lora_rank is None:
            q_BTQ = self.q_proj(x_BTD)
        else:
            q_BTQ = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        q_BTHQ = q_BTQ.unflatten(-1, (self.config.num_attention_heads, self.config.qk_head_dim))
        q_nope, q_rope = q_BTHQ.split([self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], dim=-1)
        return q_nope, rotate(q_rope, context.cos, context.sin, interleaved=self.config.rope_interleave)

    def cache_entries(self, x_BTD: Tensor, context: AttentionContext) -> Tensor:
        """What a token leaves behind: [normalised latent ; rotated shared key], (B, T, C + R)."""
        latent, k_rope = self.kv_a_proj_with_mqa(x_BTD).split(
            [self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1
        )
        latent = self.kv_a_layernorm(latent)  # the norm is for the latent only, never for the rope key
        k_rope = rotate(k_rope[:, :, None], context.cos, context.sin, interleaved=self.config.rope_interleave)
        return torch.cat((latent, k_rope[:, :, 0]), dim=-1)

    def expanded(
        self, q_nope_BTHN: Tensor, q_rope_BTHR: Tensor, entries_BSW: Tensor, mask_BTS: Tensor | None
    ) -> Tensor:
        """Attention over every head's own keys and values, (B, T, H, V)."""
        config = self.config
        latent_BSC, k_rope_BSR = entries_BSW.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        kv_BSHK = self.kv_b_proj(latent_BSC).unflatten(-1, (config.num_attention_heads, -1))
        k_nope_BSHN, v_BSHV = kv_BSHK.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        k_rope_BSHR = k_rope_BSR[:, :, None].expand(-1, -1, config.num_attention_heads, -1)
        q_BTHQ = torch.cat((q_nope_BTHN, q_rope_BTHR), dim=-1)
        k_BSHQ = torch.cat((k_nope_BSHN, k_rope_BSHR), dim=-1)
        return attend(q_BTHQ, k_BSHQ, v_BSHV, mask_BTS, scale=config.softmax_scale, core=q_BTHQ.dtype)

    def absorbed(
        self, q_nope_BTHN: Tensor, q_rope_BTHR: Tensor, entries_BSW: Tensor, mask_BTS: Tensor | None
    ) -> Tensor:
        """The same numbers as multi-query attention over the latent: key width C + R, value width C. (B, T, H, V)"""
        config = self.config
        batch, tokens, heads, _ = q_nope_BTHN.shape
        kv_b = self.kv_b_proj.weight.to(q_nope_BTHN.dtype).unflatten(0, (heads, -1))
        w_uk_HNC, w_uv_HVC = kv_b.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        q_latent_BTHC = torch.einsum("bthn,hnc->bthc", q_nope_BTHN, w_uk_HNC)
        q_BTHW = torch.cat((q_latent_BTHC, q_rope_BTHR), dim=-1)
        if self.invariant:
            assert mask_BTS is not None, "invariant attention reads from a cache"
            keys_BSGW = entries_BSW[:, :, None]  # G = 1: the latent is the one key-value head of all
            values_BSGC = keys_BSGW[..., : config.kv_lora_rank]
            out_BTHC = attend_in_tiles(q_BTHW, keys_BSGW, values_BSGC, mask_BTS, scale=config.softmax_scale)
            return torch.einsum("bthc,hvc->bthv", out_BTHC, w_uv_HVC)
        q_BXW = q_BTHW.flatten(1, 2)  # X = T x H queries share the keys
        scores_BXS = q_BXW @ entries_BSW.transpose(1, 2)
        scores_BTHS = scores_BXS.to(torch.promote_types(scores_BXS.dtype, torch.float32)).unflatten(1, (tokens, heads))
        scores_BTHS = scores_BTHS * config.softmax_scale
        if mask_BTS is None:
            every_TS = torch.ones(tokens, entries_BSW.shape[1], dtype=torch.bool, device=entries_BSW.device)
            mask_BTS = every_TS.tril()[None]
        weights_BTHS = scores_BTHS.masked_fill(~mask_BTS[:, :, None], float("-inf")).softmax(-1)
        weights_BXS = weights_BTHS.to(entries_BSW.dtype).flatten(1, 2)
        out_BTHC = (weights_BXS @ entries_BSW[..., : config.kv_lora_rank]).view(batch, tokens, heads, -1)
        return torch.einsum("bthc,hvc->bthv", out_BTHC, w_uv_HVC)
