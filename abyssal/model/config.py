"""The shape of a model, in DeepSeek's and Hugging Face's own field names. Owns no weights.

One `ModelConfig` describes both families: attention "mla" (DeepSeek V2/V3/R1) or "gqa" (Llama, Mistral, Qwen2, Qwen3),
feed-forward "moe" or "dense". Every ablation between them is a config too. Published shapes stand in `presets.py`.
Other spellings live in `checkpoint/convert.py` and its `hf_config_*` files only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies stretch beyond the pretraining length.

    yarn: YaRN as in DeepSeek-V2/V3 (frequency blend and mscale). llama3: Llama 3.1's three bands. linear: position
    divided by factor.
    """

    kind: Literal["yarn", "llama3", "linear"]
    factor: float
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None  # yarn: on cos and sin, instead of what factor and mscales give

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"rope factor={self.factor} would shrink the context; it must be at least 1")
        if self.attention_factor is not None and self.attention_factor <= 0:
            raise ValueError(f"attention_factor={self.attention_factor} must be above 0; leave it out for YaRN's own")
        if self.attention_factor is not None and self.kind != "yarn":
            raise ValueError(f"attention_factor={self.attention_factor} is yarn's, not {self.kind}'s; leave it out")

    @property
    def amplitude(self) -> float:
        """Factor on cos and sin under YaRN: its temperature, or mscale / mscale_all_dim (1 for V3). Else 1."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Widths are in features, counts in pieces. What the chosen attention or feed-forward does not read stays 0."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int  # of the dense feed-forward
    attention: Literal["mla", "gqa"] = "mla"
    feed_forward: Literal["moe", "dense"] = "moe"
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.006  # DeepSeek-V3 section 4.2
    # mla
    q_lora_rank: int | None = None  # None: queries straight from the hidden state, as V2-Lite
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    rope_interleave: bool = True  # official checkpoints rotate neighbouring pairs
    latent_norm: bool = True  # False, as the next two: what a converted GQA model needs to stay itself (surgery/)
    rope_inv_freq: tuple[float, ...] | None = None  # one per rotated pair, instead of rope_theta and rope_scaling
    attention_scale: float | None = None  # of the softmax, instead of qk_head_dim^-0.5
    # gqa
    num_key_value_heads: int = 0
    head_dim: int = 0
    qkv_bias: bool = False  # Qwen2; in mla, biases of queries and of latent and key
    qk_norm: bool = False  # Qwen3: RMSNorm of every head's query and key, before they are rotated
    # moe
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    first_k_dense_replace: int = 0
    n_group: int = 1
    topk_group: int = 1
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    # multi-token prediction
    num_nextn_predict_layers: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            _positive(self, name)
        for name in ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"):
            if (count := getattr(self, name)) < 0:
                raise ValueError(f"{name}={count} is less than none; use 0 or more")
        if self.attention == "mla":
            for name in ("kv_lora_rank", "qk_rope_head_dim", "v_head_dim"):
                _positive(self, name)
            if self.qk_norm:
                raise ValueError("qk_norm=True is a norm of gqa's heads; mla norms its latents, leave it out")
            self._check_extension()
        elif self.attention == "gqa":
            for name in ("num_key_value_heads", "head_dim"):
                _positive(self, name)
            if self.num_attention_heads % self.num_key_value_heads:
                raise ValueError(
                    f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                    f"num_key_value_heads={self.num_key_value_heads}"
                )
            if (self.rope_inv_freq, self.attention_scale, self.latent_norm) != (None, None, True):
                raise ValueError("rope_inv_freq, attention_scale and latent_norm belong to attention='mla'")
        else:
            raise ValueError(f"attention={self.attention!r} is unknown; use 'mla' or 'gqa'")
        if self.rope_dim % 2:
            raise ValueError(f"rope rotates pairs: a rotary width of {self.rope_dim} is odd")
        if self.feed_forward == "moe":
            self._check_moe()
        elif self.feed_forward != "dense":
            raise ValueError(f"feed_forward={self.feed_forward!r} is unknown; use 'moe' or 'dense'")

    def _check_extension(self) -> None:
        if self.qk_nope_head_dim < 0:
            raise ValueError(f"qk_nope_head_dim={self.qk_nope_head_dim} is negative; 0 rotates all of a head")
        if self.qkv_bias and self.q_lora_rank is not None:
            raise ValueError(f"qkv_bias with q_lora_rank={self.q_lora_rank}: a query latent has none; set it to null")
        if self.rope_inv_freq is None:
            return
        if self.rope_scaling is not None:
            raise ValueError("rope_inv_freq and rope_scaling both say how fast pairs turn; keep one of them")
        if len(self.rope_inv_freq) * 2 != self.qk_rope_head_dim:
            raise ValueError(
                f"{len(self.rope_inv_freq)} frequencies in rope_inv_freq do not fit qk_rope_head_dim="
                f"{self.qk_rope_head_dim}, which has {self.qk_rope_head_dim // 2} pairs"
            )

    def _check_moe(self) -> None:
        for name in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"):
            _positive(self, name)
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_routed_experts={self.n_routed_experts} does not divide into n_group={self.n_group}")
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.topk_group > self.n_group or self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} cannot be chosen from topk_group={self.topk_group} "
                f"of n_group={self.n_group} groups ({reachable} experts)"
            )

    @property
    def rope_dim(self) -> int:
        """Features of a head that are rotated."""
        return self.qk_rope_head_dim if self.attention == "mla" else self.head_dim

    @property
    def is_own_mla(self) -> bool:
        """Latent attention as no published type has it; whatever writes for other readers must say so."""
        own = (self.rope_inv_freq, self.attention_scale, self.latent_norm, self.qkv_bias) != (None, None, True, False)
        return self.attention == "mla" and (own or self.qk_nope_head_dim == 0)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.attention == "mla" else self.head_dim

    @property
    def cache_width(self) -> int:
        """Numbers kept per token and layer: the latent and one rotated key (MLA), or keys and values of KV heads."""
        if self.attention == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5, times m^2 under YaRN with m = 0.1 mscale_all_dim ln(factor) + 1. (DeepSeek-V2 code)"""
        if self.attention == "mla" and self.attention_scale is not None:
            return self.attention_scale
        scale = self.qk_head_dim**-0.5
        scaling = self.rope_scaling
        if self.attention == "mla" and scaling is not None and scaling.kind == "yarn" and scaling.mscale_all_dim:
            scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
        return scale

    def is_moe(self, layer: int) -> bool:
        """MTP modules (layer >= num_hidden_layers) have the form of a main MoE layer. (DeepSeek-V3 section 2.2)"""
        return self.feed_forward == "moe" and layer >= self.first_k_dense_replace


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 mscale ln(factor) + 1, or 1 when nothing is stretched."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _positive(config: ModelConfig, name: str) -> None:
    value = getattr(config, name)
    if value < 1:
        raise ValueError(
            f"{name}={value} must be at least 1 for attention={config.attention!r}, "
            f"feed_forward={config.feed_forward!r}"
        )
