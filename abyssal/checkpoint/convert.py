"""config.json <-> ModelConfig: the only place that knows other people's spellings. Owns no tensors.

Read and written: deepseek_v3, deepseek_v2, llama, qwen2, in the spelling of the originals (`rope_theta`,
`rope_scaling`) and of transformers 5 (`rope_parameters`). A shape that none of them describes, such as GQA with
experts, gets a model type of ours, `abyssal_<attention>_<feed-forward>`, that holds ModelConfig field by field. What a
config asks for and we cannot do is an error that names field and value; nothing is dropped in silence.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from abyssal.model.config import ModelConfig, RopeScaling

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
OURS = "abyssal_"
COMMON = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
MLA_WIDTHS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
MOE_COUNTS = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
ROPE_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"},
}


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """What config.json says, or a ValueError naming the field that asks for something we do not do."""
    kind = _need(hf, "model_type", str)
    if kind.startswith(OURS):
        return _from_ours(hf)
    if kind not in ARCHITECTURES:
        raise _unsupported("model_type", kind, f"known are {', '.join(ARCHITECTURES)}")
    _only(hf, "hidden_act", "silu")
    _only(hf, "quantization_config", None, remedy="convert the weights to BF16 first")
    _only(hf, "attention_dropout", 0)
    _only(hf, "partial_rotary_factor", 1)
    rope_theta, rope_scaling = _read_rope(hf)
    common = dict(
        {name: _need(hf, name, int) for name in COMMON},
        max_position_embeddings=_need(hf, "max_position_embeddings", int),
        rms_norm_eps=float(_get(hf, "rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(_get(hf, "tie_word_embeddings", False)),
        initializer_range=float(_get(hf, "initializer_range", 0.02)),
        num_nextn_predict_layers=int(_get(hf, "num_nextn_predict_layers", 0)),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
    )
    if kind in ("llama", "qwen2"):
        return ModelConfig(**common, **_read_gqa(hf, biased=kind == "qwen2"))
    return ModelConfig(**common, **_read_mla(hf), **_read_moe(hf, v3=kind == "deepseek_v3"))


def config_to_hf(
    config: ModelConfig, *, bos_token_id: int | None = None, eos_token_id: int | None = None
) -> dict[str, Any]:
    """A config.json that transformers, vLLM and SGLang read, in both rope spellings; or one of ours."""
    kind = model_type(config)
    out: dict[str, Any] = {
        "architectures": [ARCHITECTURES.get(kind, "AbyssalForCausalLM")],
        "model_type": kind,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "use_cache": True,
    }
    if kind.startswith(OURS):
        return out | asdict(config)
    out |= {
        name: getattr(config, name)
        for name in (*COMMON, "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range")
    }
    out |= {"hidden_act": "silu", "attention_dropout": 0.0, **_write_rope(config)}
    if config.num_nextn_predict_layers or kind == "deepseek_v3":  # transformers' V3 takes its absence for 1
        out["num_nextn_predict_layers"] = config.num_nextn_predict_layers
    if config.attention == "gqa":
        out |= {"num_key_value_heads": config.num_key_value_heads, "head_dim": config.head_dim}
        if kind == "llama":
            return out | {"attention_bias": False, "mlp_bias": False}
        return out | {"use_sliding_window": False, "sliding_window": None}
    out |= {name: getattr(config, name) for name in ("q_lora_rank", *MLA_WIDTHS)}
    out |= {"num_key_value_heads": config.num_attention_heads, "attention_bias": False, "moe_layer_freq": 1}
    if kind == "deepseek_v3":
        out["rope_interleave"] = config.rope_interleave
    return out | _write_moe(config)


def model_type(config: ModelConfig) -> str:
    """The published type whose every reader computes what we compute, or else ours."""
    if config.attention == "gqa" and config.feed_forward == "dense":
        return "qwen2" if config.qkv_bias else "llama"
    if config.attention == "mla":
        if config.feed_forward == "dense":
            return "deepseek_v3"
        if (config.scoring_func, config.topk_method) == ("sigmoid", "noaux_tc"):
            return "deepseek_v3"
        as_v2 = config.scoring_func == "softmax" and config.topk_method != "noaux_tc" and config.rope_interleave
        if as_v2 and not config.norm_topk_prob:
            return "deepseek_v2"
    return f"{OURS}{config.attention}_{config.feed_forward}"


def _read_gqa(hf: dict[str, Any], *, biased: bool) -> dict[str, Any]:
    if not biased:
        _only(hf, "attention_bias", False, remedy="biases are read for qwen2, whose output projection has none")
    _only(hf, "mlp_bias", False)
    _refuse_sliding_window(hf)
    heads = _need(hf, "num_attention_heads", int)
    return dict(
        attention="gqa",
        feed_forward="dense",
        qkv_bias=biased,
        num_key_value_heads=int(_get(hf, "num_key_value_heads", heads)),
        head_dim=int(_get(hf, "head_dim", _need(hf, "hidden_size", int) // heads)),
    )


def _refuse_sliding_window(hf: dict[str, Any]) -> None:
    """Qwen2 configs carry a window that is switched off, or that begins after the last layer; both are fine."""
    for kind in _get(hf, "layer_types", []):
        if kind != "full_attention":
            raise _unsupported("layer_types", kind, "use full_attention in every layer")
    window = hf.get("sliding_window")
    first = int(_get(hf, "max_window_layers", 0))
    if _get(hf, "use_sliding_window", False) and window is not None and first < hf["num_hidden_layers"]:
        raise _unsupported("sliding_window", window, "set use_sliding_window to false")


def _read_mla(hf: dict[str, Any]) -> dict[str, Any]:
    _only(hf, "attention_bias", False)
    heads = _need(hf, "num_attention_heads", int)
    _only(hf, "num_key_value_heads", heads, remedy="every MLA head has its own keys")
    return dict(
        {name: _need(hf, name, int) for name in MLA_WIDTHS},
        attention="mla",
        q_lora_rank=hf.get("q_lora_rank"),
        rope_interleave=bool(_get(hf, "rope_interleave", True)),
    )


def _read_moe(hf: dict[str, Any], *, v3: bool) -> dict[str, Any]:
    first_k_dense = int(_get(hf, "first_k_dense_replace", 0))
    if first_k_dense >= hf["num_hidden_layers"]:
        return dict(feed_forward="dense")
    _only(hf, "moe_layer_freq", 1)
    _only(hf, "scoring_func", "sigmoid" if v3 else "softmax")
    if v3:
        _only(hf, "topk_method", "noaux_tc")
    elif _get(hf, "topk_method", "greedy") not in ("greedy", "group_limited_greedy"):
        raise _unsupported("topk_method", hf["topk_method"], "deepseek_v2 has greedy and group_limited_greedy")
    if not v3:
        _only(hf, "norm_topk_prob", False, remedy="readers of deepseek_v2 disagree on what it means")
    return dict(
        {name: _need(hf, name, int) for name in MOE_COUNTS},
        feed_forward="moe",
        first_k_dense_replace=first_k_dense,
        n_shared_experts=int(_get(hf, "n_shared_experts", 0)),
        n_group=int(_get(hf, "n_group", 1)),
        topk_group=int(_get(hf, "topk_group", 1)),
        scoring_func="sigmoid" if v3 else "softmax",
        topk_method="noaux_tc" if v3 else _get(hf, "topk_method", "greedy"),
        norm_topk_prob=bool(_get(hf, "norm_topk_prob", v3)),
        routed_scaling_factor=float(_get(hf, "routed_scaling_factor", 1.0)),
    )


def _write_moe(config: ModelConfig) -> dict[str, Any]:
    if config.feed_forward == "dense":  # V3 with every layer among its leading dense ones; the counts are never used
        return {
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
    return {
        name: getattr(config, name)
        for name in (
            *MOE_COUNTS,
            "n_shared_experts",
            "first_k_dense_replace",
            "n_group",
            "topk_group",
            "scoring_func",
            "topk_method",
            "norm_topk_prob",
            "routed_scaling_factor",
        )
    }


def _read_rope(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from either spelling; both may stand there if they agree."""
    spellings = [dict(hf[name]) for name in ("rope_scaling", "rope_parameters") if hf.get(name)]
    thetas = {float(spelling["rope_theta"]) for spelling in spellings if spelling.get("rope_theta") is not None}
    if hf.get("rope_theta") is not None:
        thetas.add(float(hf["rope_theta"]))
    scalings = {_read_scaling(spelling, hf) for spelling in spellings}
    if len(thetas) > 1 or len(scalings) > 1:
        raise ValueError("config.json: rope_scaling, rope_theta and rope_parameters disagree; keep one spelling")
    return (thetas.pop() if thetas else 10000.0), (scalings.pop() if scalings else None)


def _read_scaling(spelling: dict[str, Any], hf: dict[str, Any]) -> RopeScaling | None:
    given = {key: value for key, value in spelling.items() if value is not None}
    kind = given.pop("rope_type", given.pop("type", "default"))
    given = {key: value for key, value in given.items() if key not in ("type", "rope_theta")}
    if kind not in ROPE_KEYS:
        raise _unsupported("rope_type", kind, f"known are {', '.join(ROPE_KEYS)}")
    if given.pop("partial_rotary_factor", 1) != 1:
        raise _unsupported("partial_rotary_factor", spelling["partial_rotary_factor"], "all of a head must be rotated")
    if kind == "yarn" and given.pop("truncate", True) is not True:
        raise _unsupported("truncate", spelling["truncate"], "YaRN's bounds are rounded")
    for key in given.keys() - ROPE_KEYS[kind]:
        options = ", ".join(sorted(ROPE_KEYS[kind])) or "no options"
        raise _unsupported(key, given[key], f"rope type {kind} has {options}")
    if kind == "default":
        return None
    if kind in ("llama3", "yarn"):
        given.setdefault("original_max_position_embeddings", hf["max_position_embeddings"])
    required = ROPE_KEYS[kind] if kind == "llama3" else {"factor"}
    for key in sorted(required - given.keys()):
        raise ValueError(f"config.json lacks {key!r} for rope type {kind}")
    if kind == "yarn":  # absent means off, not 1
        given = {"mscale": 0.0, "mscale_all_dim": 0.0} | given
    original = given.pop("original_max_position_embeddings", None)
    numbers: dict[str, Any] = {key: float(value) for key, value in given.items()}
    if original is not None:
        numbers["original_max_position_embeddings"] = int(original)
    return RopeScaling(kind=kind, **numbers)


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {
            "rope_theta": config.rope_theta,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        }
    values = {key: getattr(scaling, key) for key in sorted(ROPE_KEYS[scaling.kind])}
    values = {key: value for key, value in values.items() if value or not key.startswith("mscale")}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": {"type": scaling.kind, "rope_type": scaling.kind, **values},
        "rope_parameters": {"rope_type": scaling.kind, "rope_theta": config.rope_theta, **values},
    }


def _from_ours(hf: dict[str, Any]) -> ModelConfig:
    known = {field.name for field in fields(ModelConfig)}
    plumbing = {
        "architectures",
        "model_type",
        "dtype",
        "torch_dtype",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "use_cache",
        "transformers_version",
    }
    for key in sorted(hf.keys() - known - plumbing):
        raise _unsupported(key, hf[key], f"{hf['model_type']} has no such field")
    given = {key: value for key, value in hf.items() if key in known}
    for name in COMMON:
        _need(hf, name, int)
    if given.get("rope_scaling") is not None:
        given["rope_scaling"] = RopeScaling(**given["rope_scaling"])
    return ModelConfig(**given)


def _need(hf: dict[str, Any], name: str, kind: type) -> Any:
    value = hf.get(name)
    if value is None:
        raise ValueError(f"config.json lacks {name!r}")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"config.json: {name}={value!r} should be of type {kind.__name__}")
    return value


def _get(hf: dict[str, Any], name: str, default: Any) -> Any:
    """Absent and null mean the same in these files."""
    value = hf.get(name)
    return default if value is None else value


def _only(hf: dict[str, Any], name: str, supported: Any, *, remedy: str = "") -> None:
    value = _get(hf, name, supported)
    if value != supported:
        raise _unsupported(name, value, remedy or f"only {supported!r} is")


def _unsupported(name: str, value: Any, remedy: str) -> ValueError:
    return ValueError(f"config.json: {name}={value!r} is not supported; {remedy}")
