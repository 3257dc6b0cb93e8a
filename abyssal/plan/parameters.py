"""Every weight tensor of a model by name, shape and part, and how many of its numbers a rank holds. Owns no memory.

Names and shapes are those of `Transformer`'s state, balance biases included; a test compares them on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from abyssal.model.config import ModelConfig

WeightPart = Literal["embedding", "norms", "attention", "feed_forward", "router", "experts", "head", "mtp"]


class Weight(NamedTuple):
    """`tp_dim`: the dimension that tensor parallel ranks share out, None where each holds it whole."""

    name: str
    shape: tuple[int, ...]
    part: WeightPart
    layer: int | None  # MTP modules count on behind the last layer; None: embedding, final norm, head
    tp_dim: int | None = None

    @property
    def n(self) -> int:
        return math.prod(self.shape)

    @property
    def is_routed(self) -> bool:
        """Shared out among expert ranks, by its first dimension."""
        return ".experts." in self.name

    @property
    def is_trained(self) -> bool:
        """Balance biases are moved by a rule; they have no gradient and no optimizer state."""
        return not self.name.endswith("e_score_correction_bias")


def weights(config: ModelConfig) -> list[Weight]:
    """In the order of the model's state, MTP modules last."""
    d, tail = config.hidden_size, [Weight("norm.weight", (config.hidden_size,), "norms", None)]
    if not config.tie_word_embeddings:
        tail.append(Weight("lm_head.weight", (config.vocab_size, d), "head", None, 0))
    embedding = Weight("embed_tokens.weight", (config.vocab_size, d), "embedding", None, 0)
    layers = [w for layer in range(config.num_hidden_layers) for w in _block(config, layer, f"layers.{layer}.")]
    return [embedding, *layers, *tail, *(w for k in range(config.num_nextn_predict_layers) for w in _mtp(config, k))]


def weights_of_layer(config: ModelConfig, layer: int) -> list[Weight]:
    return list(_block(config, layer, f"layers.{layer}."))


def count(config: ModelConfig) -> int:
    """Weights of the main model, MTP left out: 671,026,419,200 for V3."""
    return sum(w.n for w in weights(config) if w.part != "mtp")


def count_active(config: ModelConfig) -> int:
    """Of those, what a token meets: K of E experts and the head, without the embedding table. V3: 36,625,618,432."""
    active = 0
    for w in weights(config):
        if w.part in ("mtp", "embedding") and not (w.part == "embedding" and config.tie_word_embeddings):
            continue
        active += w.n * config.num_experts_per_tok // config.n_routed_experts if w.is_routed else w.n
    return active


def cache_bytes_per_token(config: ModelConfig, bytes_per_number: float = 2.0) -> float:
    """What all main layers keep of one token while generating: 70,272 for V3 in BF16."""
    return bytes_per_number * config.cache_width * config.num_hidden_layers


def on_rank(weight: Weight, *, tp: int, ep: int) -> int:
    """Numbers of it that one rank holds; what does not divide is filled up. Experts are whole on their rank."""
    if weight.is_routed:
        return -(-weight.shape[0] // ep) * math.prod(weight.shape[1:])
    if weight.tp_dim is None:
        return weight.n
    cut = weight.shape[weight.tp_dim]
    return weight.n // cut * -(-cut // tp)


def _block(config: ModelConfig, layer: int, prefix: str) -> Iterator[Weight]:
    d = config.hidden_size
    yield Weight(f"{prefix}input_layernorm.weight", (d,), "norms", layer)
    attention = _mla(config) if config.attention == "mla" else _gqa(config)
    for name, shape, tp_dim in attention:
        part: WeightPart = "norms" if "norm" in name else "attention"
        yield Weight(f"{prefix}self_attn.{name}", shape, part, layer, tp_dim)
    yield Weight(f"{prefix}post_attention_layernorm.weight", (d,), "norms", layer)
    if not config.is_moe(layer):
        yield from _ffn(d, config.intermediate_size, layer, f"{prefix}mlp.")
        return
    n, width = config.n_routed_experts, config.moe_intermediate_size
    yield Weight(f"{prefix}mlp.gate.weight", (n, d), "router", layer)
    if config.topk_method == "noaux_tc":
        yield Weight(f"{prefix}mlp.gate.e_score_correction_bias", (n,), "router", layer)
    yield Weight(f"{prefix}mlp.experts.gate_up_proj", (n, 2 * width, d), "experts", layer)
    yield Weight(f"{prefix}mlp.experts.down_proj", (n, d, width), "experts", layer)
    if config.n_shared_experts:
        yield from _ffn(d, config.n_shared_experts * width, layer, f"{prefix}mlp.shared_experts.")


def _ffn(d: int, width: int, layer: int, prefix: str) -> Iterator[Weight]:
    for name in ("gate_proj", "up_proj"):
        yield Weight(f"{prefix}{name}.weight", (width, d), "feed_forward", layer, 0)
    yield Weight(f"{prefix}down_proj.weight", (d, width), "feed_forward", layer, 1)


def _mla(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    d, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    if config.q_lora_rank is None:
        yield "q_proj.weight", (heads * config.qk_head_dim, d), 0
        if config.qkv_bias:
            yield "q_proj.bias", (heads * config.qk_head_dim,), 0
    else:
        yield "q_a_proj.weight", (config.q_lora_rank, d), None
        yield "q_a_layernorm.weight", (config.q_lora_rank,), None
        yield "q_b_proj.weight", (heads * config.qk_head_dim, config.q_lora_rank), 0
    yield "kv_a_proj_with_mqa.weight", (latent + config.qk_rope_head_dim, d), None
    if config.qkv_bias:
        yield "kv_a_proj_with_mqa.bias", (latent + config.qk_rope_head_dim,), None
    if config.latent_norm:
        yield "kv_a_layernorm.weight", (latent,), None
    yield "kv_b_proj.weight", (heads * (config.qk_nope_head_dim + config.v_head_dim), latent), 0
    yield "o_proj.weight", (d, heads * config.v_head_dim), 1


def _gqa(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    d, width = config.hidden_size, config.head_dim
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, n_heads in {**heads, "v_proj": config.num_key_value_heads}.items():
        yield f"{name}.weight", (n_heads * width, d), 0
        if config.qkv_bias:
            yield f"{name}.bias", (n_heads * width,), 0
    yield "o_proj.weight", (d, config.num_attention_heads * width), 1
    if config.qk_norm:
        yield "q_norm.weight", (width,), None
        yield "k_norm.weight", (width,), None


def _mtp(config: ModelConfig, k: int) -> Iterator[Weight]:
    d, layer, prefix = config.hidden_size, config.num_hidden_layers + k, f"mtp.{k}."
    yield Weight(f"{prefix}enorm.weight", (d,), "mtp", layer)
    yield Weight(f"{prefix}hnorm.weight", (d,), "mtp", layer)
    yield Weight(f"{prefix}eh_proj.weight", (d, 2 * d), "mtp", layer)
    for weight in _block(config, layer, f"{prefix}block."):
        yield weight._replace(part="mtp")
    yield Weight(f"{prefix}shared_head_norm.weight", (d,), "mtp", layer)
