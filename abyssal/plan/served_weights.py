"""Bytes that a served model's weights take on one device, by what they are used for.

Only matrices are counted: norms are a ten-thousandth of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from abyssal.model.config import ModelConfig
from abyssal.plan.weight_forms import WeightForm


@dataclass(frozen=True, kw_only=True)
class ServedWeights:
    """Of one device; the parts add up."""

    experts_bytes: float  # routed ones
    other_bytes: float  # attention, dense feed-forward, shared experts, routers
    vocabulary_bytes: float  # embedding and head
    drafts_bytes: float  # MTP modules, which share embedding and head

    @property
    def total_bytes(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


def served_weights(
    config: ModelConfig, *, form: WeightForm, tp: int = 1, ep: int = 1, experts: int = 0, with_drafts: bool = False
) -> ServedWeights:
    """`experts`: physical ones of a layer, copies included, shared out among ep; 0: as the config has."""
    each = form.bytes_per_weight
    n_layers, n_drafts = config.num_hidden_layers, config.num_nextn_predict_layers
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    held = (experts or config.n_routed_experts) / ep
    routed = sum(held * expert for layer in range(n_layers) if config.is_moe(layer))
    drafts = 0.0
    if with_drafts:
        joined = 2 * config.hidden_size**2
        drafts = sum(
            joined + _layer_weights(config, layer) / tp + (held * expert if config.is_moe(layer) else 0)
            for layer in range(n_layers, n_layers + n_drafts)
        )
    wide = max(each, 2.0) if form.computes_in == "fp8" else each  # FP8 leaves embedding and head in BF16
    tables = 1 if config.tie_word_embeddings else 2
    return ServedWeights(
        experts_bytes=each * routed,
        other_bytes=each * sum(_layer_weights(config, layer) for layer in range(n_layers)) / tp,
        vocabulary_bytes=wide * tables * config.vocab_size * config.hidden_size / tp,
        drafts_bytes=each * drafts,
    )


def expert_bytes(config: ModelConfig, form: WeightForm) -> float:
    """Of all routed experts of all layers."""
    return served_weights(config, form=form).experts_bytes


def _layer_weights(config: ModelConfig, layer: int) -> float:
    """All that every token of a block uses."""
    d, heads = config.hidden_size, config.num_attention_heads
    if config.attention == "mla":
        queries = heads * config.qk_head_dim
        rank = config.q_lora_rank
        attention = d * queries if rank is None else rank * (d + queries)
        attention += d * config.cache_width
        attention += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        attention += heads * config.v_head_dim * d
    else:
        attention = d * config.head_dim * (2 * heads + 2 * config.num_key_value_heads)
    if not config.is_moe(layer):
        return attention + 3 * d * config.intermediate_size
    return attention + d * config.n_routed_experts + 3 * d * config.n_shared_experts * config.moe_intermediate_size
