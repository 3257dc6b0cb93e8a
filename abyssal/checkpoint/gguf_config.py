"""GGUF metadata <-> ModelConfig, in llama.cpp's words. Owns no tensors.

Architectures: llama, qwen2, qwen3 and deepseek2. A shape that none of them describes is an error that says what is too
much. Every number read is bounded and compared with the tensors before anything is built from it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from gguf import ExpertGatingFuncType
from numpy.typing import NDArray

from abyssal.checkpoint.gguf_keys import MAX_CONTEXT, MAX_EXPERTS, Keys
from abyssal.checkpoint.gguf_rope import llama3_scaling, read_scaling, write_scaling
from abyssal.model.config import ModelConfig

ARCHITECTURES = ("llama", "qwen2", "qwen3", "deepseek2")
LITE_DEPTHS = (26, 27)  # where llama.cpp takes a deepseek2 without query latent for one of the published small ones
GATING: dict[Any, int] = {"softmax": ExpertGatingFuncType.SOFTMAX, "sigmoid": ExpertGatingFuncType.SIGMOID}
Shapes = dict[str, tuple[int, ...]]


class Described(NamedTuple):
    """`notes` are what a reader of the file should know, one line each."""

    metadata: dict[str, Any]
    notes: list[str]


def config_from_gguf(metadata: dict[str, Any], shapes: Shapes, *, rope_factors: NDArray[Any] | None) -> ModelConfig:
    """What the metadata says, or a ValueError naming the key. `rope_factors` is the tensor rope_freqs.weight."""
    read = Keys(metadata)
    if read.arch not in ARCHITECTURES:
        raise ValueError(f"general.architecture={read.arch!r} is not supported; known are {', '.join(ARCHITECTURES)}")
    embedding = shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise ValueError("the tensor token_embd.weight is missing or no matrix")
    n_layers = read.count("block_count")
    if n_layers != len({name.split(".")[1] for name in shapes if name.startswith("blk.")}):
        raise ValueError(f"{read.arch}.block_count={n_layers} is not the number of layers there are tensors of")
    n_heads = read.count("attention.head_count")
    common: dict[str, Any] = dict(
        vocab_size=embedding[0],
        hidden_size=read.count("embedding_length"),
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        intermediate_size=read.count("feed_forward_length"),
        max_position_embeddings=read.count("context_length", most=MAX_CONTEXT),
        rms_norm_eps=read.number("attention.layer_norm_rms_epsilon"),
        rope_theta=read.number("rope.freq_base", 10000.0),
        tie_word_embeddings="output.weight" not in shapes,
    )
    if read.arch == "deepseek2":
        if rope_factors is not None:
            raise ValueError("rope_freqs.weight in a deepseek2 is not supported")
        config = ModelConfig(**common, **_read_mla(read, shapes), **_read_moe(read, shapes))
        return replace(config, rope_scaling=read_scaling(read, mla=True))
    head_dim = read.count("attention.key_length", common["hidden_size"] // n_heads)
    read.only("attention.value_length", head_dim, "keys and values of one width")
    read.only("rope.dimension_count", head_dim, "all of a head rotated")
    read.only("expert_count", 0, "no experts outside of deepseek2")
    read.only("attention.sliding_window", 0, "attention to everything before")
    config = ModelConfig(
        **common,
        attention="gqa",
        feed_forward="dense",
        num_key_value_heads=read.count("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        qk_norm=read.arch == "qwen3",
    )
    scaling = read_scaling(read, mla=False)
    if rope_factors is not None:
        if scaling is not None:
            raise ValueError("rope_freqs.weight beside rope.scaling is not supported")
        scaling = llama3_scaling(read, config, rope_factors)
    return replace(config, rope_scaling=scaling)


def config_to_gguf(config: ModelConfig) -> Described:
    """Metadata under the keys llama.cpp's loader wants, or a ValueError naming what it has no key for."""
    arch = architecture(config)
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_theta),
        "rope.dimension_count": config.rope_dim,
    }
    notes = []
    if arch == "deepseek2":
        keys |= _write_mla(config) | _write_moe(config)
        if config.num_nextn_predict_layers:
            notes.append(f"left out: {config.num_nextn_predict_layers} MTP layers, for which deepseek2 has no tensors")
        if config.q_lora_rank is None and config.num_hidden_layers not in LITE_DEPTHS:
            depths = " or ".join(map(str, LITE_DEPTHS))
            notes.append(f"llama.cpp itself loads a deepseek2 without q_lora_rank only with {depths} layers")
        if config.feed_forward == "moe" and config.topk_method == "group_limited_greedy":
            notes.append("llama.cpp ranks groups of experts by their two best, DeepSeek-V2 by the best alone")
    else:
        keys |= {
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
        }
    keys |= write_scaling(config)
    return Described({f"{arch}.{key}": value for key, value in keys.items()}, notes)


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name of this shape."""
    if config.is_own_mla:
        raise ValueError(
            "GGUF has no latents without a norm, with biases or own frequencies; export to a directory instead"
        )
    if config.attention == "mla":
        if config.feed_forward == "moe":
            if config.n_shared_experts == 0:
                raise ValueError("n_shared_experts=0: GGUF's deepseek2 has at least one; export to a directory instead")
            if config.topk_method == "noaux_tc" and config.scoring_func != "sigmoid":
                raise ValueError("GGUF has no softmax scores with a balance bias; export to a directory instead")
        return "deepseek2"
    if config.feed_forward == "moe":
        raise ValueError("GGUF describes experts behind MLA only, not behind GQA; export to a directory instead")
    if config.qk_norm:
        if config.qkv_bias:
            raise ValueError("GGUF has no heads with both biases and norms; export to a directory instead")
        return "qwen3"
    if not config.qkv_bias:
        return "llama"
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"head_dim={config.head_dim}: GGUF's qwen2 has heads of hidden_size / num_attention_heads; export to a "
            f"directory instead"
        )
    return "qwen2"


def _read_mla(read: Keys, shapes: Shapes) -> dict[str, Any]:
    """Files of before April 2025 give the widths of a head where newer ones give those of the absorbed form."""
    absorbed = "blk.0.attn_k_b.weight" in shapes
    head_dim = read.count("attention.key_length_mla" if absorbed else "attention.key_length")
    rope_dim = read.count("rope.dimension_count")
    if rope_dim >= head_dim:
        raise ValueError(f"deepseek2.rope.dimension_count={rope_dim} leaves nothing of a head of {head_dim}")
    return dict(
        attention="mla",
        q_lora_rank=read.count("attention.q_lora_rank") if "blk.0.attn_q_a.weight" in shapes else None,
        kv_lora_rank=read.count("attention.kv_lora_rank"),
        qk_nope_head_dim=head_dim - rope_dim,
        qk_rope_head_dim=rope_dim,
        v_head_dim=read.count("attention.value_length_mla" if absorbed else "attention.value_length"),
    )


def _write_mla(config: ModelConfig) -> dict[str, Any]:
    """As one head of keys and values that all queries share: the absorbed form, which llama.cpp runs."""
    keys = {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
    }
    return keys if config.q_lora_rank is None else keys | {"attention.q_lora_rank": config.q_lora_rank}


def _read_moe(read: Keys, shapes: Shapes) -> dict[str, Any]:
    stacks = {name: shape for name, shape in shapes.items() if name.endswith("ffn_gate_exps.weight")}
    if not stacks:
        return dict(feed_forward="dense")
    n_experts = read.count("expert_count", most=MAX_EXPERTS)
    for name, shape in stacks.items():
        if (shape[0] if len(shape) == 3 else 1) != n_experts:
            raise ValueError(f"deepseek2.expert_count={n_experts} does not fit {name} of shape {shape}")
    gating = read.value("expert_gating_func", int, GATING["softmax"])  # absent in files of V2's days
    if gating not in GATING.values():
        raise ValueError(f"deepseek2.expert_gating_func={gating} is not supported; known are softmax and sigmoid")
    n_groups = read.count("expert_group_count", 1)
    biased = any(name.endswith(".exp_probs_b.bias") for name in shapes)
    return dict(
        feed_forward="moe",
        n_routed_experts=n_experts,
        n_shared_experts=read.count("expert_shared_count"),
        num_experts_per_tok=read.count("expert_used_count"),
        moe_intermediate_size=read.count("expert_feed_forward_length"),
        first_k_dense_replace=read.value("leading_dense_block_count", int, 0),
        n_group=n_groups,
        topk_group=read.count("expert_group_used_count", n_groups),
        scoring_func="sigmoid" if gating == GATING["sigmoid"] else "softmax",
        topk_method="noaux_tc" if biased else "group_limited_greedy" if n_groups > 1 else "greedy",
        norm_topk_prob=read.value("expert_weights_norm", bool, False),
        routed_scaling_factor=read.number("expert_weights_scale", 1.0),
    )


def _write_moe(config: ModelConfig) -> dict[str, Any]:
    if config.feed_forward == "dense":  # all layers are leading dense ones; the other two are asked for, and never used
        return {
            "leading_dense_block_count": config.num_hidden_layers,
            "expert_feed_forward_length": config.intermediate_size,
            "expert_shared_count": 0,
        }
    return {
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
        "expert_gating_func": int(GATING[config.scoring_func]),
        "expert_weights_norm": config.norm_topk_prob,
        "expert_weights_scale": float(config.routed_scaling_factor),
    }
