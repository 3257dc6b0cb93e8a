"""Attention and feed-forward of a config.json, type by type: what each leaves unsaid, and what none of ours can do."""

from __future__ import annotations

from typing import Any

from abyssal.checkpoint.hf_config_fields import get, need, only, unsupported
from abyssal.model.config import ModelConfig

MLA_WIDTHS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
MOE_COUNTS = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
MISTRAL_WINDOW = 4096  # what an absent sliding_window means there; null means none


def read_gqa(hf: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind != "qwen2":
        only(hf, "attention_bias", False, remedy="biases are read for qwen2, whose output projection has none")
    only(hf, "mlp_bias", False)
    _refuse_sliding_window(hf, kind)
    heads = need(hf, "num_attention_heads")
    # readers of the other types fill in numbers of their own, which are no model's
    given = {"num_key_value_heads": heads} if kind in ("llama", "deepseek") else {}
    given |= {} if kind == "qwen3" else {"head_dim": need(hf, "hidden_size") // heads}
    given |= {name: hf[name] for name in ("num_key_value_heads", "head_dim") if hf.get(name) is not None}
    return dict(
        attention="gqa",
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        num_key_value_heads=need(given, "num_key_value_heads"),
        head_dim=need(given, "head_dim"),
    )


def _refuse_sliding_window(hf: dict[str, Any], kind: str) -> None:
    """A window is fine where it is switched off, begins after the last layer or is as long as the whole context."""
    for layer_type in get(hf, "layer_types", []):
        if layer_type != "full_attention":
            raise unsupported("layer_types", layer_type, "use full_attention in every layer")
    window, context = hf.get("sliding_window"), need(hf, "max_position_embeddings")
    if kind == "mistral":
        window = hf.get("sliding_window", MISTRAL_WINDOW)
        if window is not None and window < context:
            raise unsupported(
                "sliding_window", window, f"set it to null, or max_position_embeddings={context} to at most {window}"
            )
        return
    first = int(get(hf, "max_window_layers", 0))
    if get(hf, "use_sliding_window", False) and window is not None and first < hf["num_hidden_layers"]:
        raise unsupported("sliding_window", window, "set use_sliding_window to false")


def write_gqa(config: ModelConfig, kind: str) -> dict[str, Any]:
    heads = {"num_key_value_heads": config.num_key_value_heads, "head_dim": config.head_dim}
    if kind in ("llama", "qwen3", "deepseek"):
        heads["attention_bias"] = False
    if kind == "llama":
        heads["mlp_bias"] = False
    if kind in ("qwen2", "qwen3"):
        return heads | {"use_sliding_window": False, "sliding_window": None}
    return heads


def read_mla(hf: dict[str, Any]) -> dict[str, Any]:
    only(hf, "attention_bias", False)
    heads = need(hf, "num_attention_heads")
    only(hf, "num_key_value_heads", heads, remedy="every MLA head has its own keys")
    return dict(
        {name: need(hf, name) for name in MLA_WIDTHS},
        attention="mla",
        q_lora_rank=hf.get("q_lora_rank"),
        rope_interleave=bool(get(hf, "rope_interleave", True)),
    )


def write_mla(config: ModelConfig, kind: str) -> dict[str, Any]:
    out = {name: getattr(config, name) for name in ("q_lora_rank", *MLA_WIDTHS)}
    out |= {"num_key_value_heads": config.num_attention_heads, "attention_bias": False}
    return out | ({"rope_interleave": config.rope_interleave} if kind == "deepseek_v3" else {})


def read_moe(hf: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind == "deepseek" and hf.get("n_routed_experts") is None:  # DeepSeek-Prover-V1.5 is such a Llama
        return dict(feed_forward="dense")
    v3 = kind == "deepseek_v3"
    first_k_dense = need(hf, "first_k_dense_replace") if v3 else int(get(hf, "first_k_dense_replace", 0))
    if first_k_dense >= hf["num_hidden_layers"]:
        return dict(feed_forward="dense")
    only(hf, "moe_layer_freq", 1)
    only(hf, "scoring_func", "sigmoid" if v3 else "softmax")
    topk_method = get(hf, "topk_method", "noaux_tc" if v3 else "greedy")
    methods = {"deepseek_v3": ["noaux_tc"], "deepseek_v2": ["greedy", "group_limited_greedy"], "deepseek": ["greedy"]}
    if topk_method not in methods[kind]:
        raise unsupported("topk_method", topk_method, f"{kind} has {' and '.join(methods[kind])}")
    if kind == "deepseek_v2":
        only(hf, "norm_topk_prob", False, remedy="readers of deepseek_v2 disagree on what it means")
    if kind == "deepseek":
        for name in ("n_group", "topk_group", "routed_scaling_factor"):
            only(hf, name, 1)
    if v3:  # readers fill in V3's own numbers for what is not said, and those fit V3 alone
        for name in ("n_shared_experts", "n_group", "topk_group"):
            need(hf, name)
        need(hf, "routed_scaling_factor", (int, float))
    return dict(
        {name: need(hf, name) for name in MOE_COUNTS},
        feed_forward="moe",
        first_k_dense_replace=first_k_dense,
        n_shared_experts=need(hf, "n_shared_experts") if kind == "deepseek_v2" else int(get(hf, "n_shared_experts", 0)),
        n_group=int(get(hf, "n_group", 1)),
        topk_group=int(get(hf, "topk_group", 1)),
        scoring_func="sigmoid" if v3 else "softmax",
        topk_method=topk_method,
        norm_topk_prob=bool(get(hf, "norm_topk_prob", v3)),
        routed_scaling_factor=float(get(hf, "routed_scaling_factor", 1.0)),
    )


def write_moe(config: ModelConfig, kind: str) -> dict[str, Any]:
    if config.feed_forward == "dense":  # V3 with every layer among its leading dense ones; the counts are never used
        return {
            "moe_layer_freq": 1,
            "first_k_dense_replace": config.num_hidden_layers,
            "moe_intermediate_size": config.intermediate_size,
            "n_routed_experts": 1,
            "n_shared_experts": 1,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
        }
    if config.first_k_dense_replace >= config.num_hidden_layers:
        raise ValueError(
            f"first_k_dense_replace={config.first_k_dense_replace} leaves no expert layer of "
            f"{config.num_hidden_layers}; use feed_forward='dense'"
        )
    names = [*MOE_COUNTS, "n_shared_experts", "first_k_dense_replace", "scoring_func", "norm_topk_prob"]
    if kind != "deepseek":
        names += ["n_group", "topk_group", "topk_method", "routed_scaling_factor"]
    return {"moe_layer_freq": 1} | {name: getattr(config, name) for name in names}
