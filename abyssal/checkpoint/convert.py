"""config.json <-> ModelConfig: with hf_config_*.py the only place that knows other people's spellings. Owns no tensors.

Read and written: deepseek_v3, deepseek_v2, deepseek (DeepSeekMoE), llama, qwen2 and qwen3, in the spelling of the
originals (`rope_theta`, `rope_scaling`) and of transformers 5 (`rope_parameters`). A mistral whose window hides nothing
is read and is a llama from then on. A shape that none of them describes, such as GQA with V3's experts or MLA without
its latent norm, gets a model type of ours, `abyssal_<attention>_<feed-forward>`, that holds ModelConfig field by field.
What a config asks for and we cannot do is an error that names field and value; nothing is dropped in silence.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from abyssal.checkpoint.hf_config_fields import get, need, only, unsupported
from abyssal.checkpoint.hf_config_layers import read_gqa, read_mla, read_moe, write_gqa, write_mla, write_moe
from abyssal.checkpoint.hf_config_rope import read_rope, write_rope
from abyssal.checkpoint.quantization_config import read_quantization
from abyssal.model.config import ModelConfig, RopeScaling

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
OURS = "abyssal_"
COMMON = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """What config.json says, or a ValueError naming the field that asks for something we do not do."""
    kind = need(hf, "model_type", str)
    read_quantization(hf)  # not of the model's shape: only what no reader of weights knows ends here
    if kind.startswith(OURS):
        return _from_ours(hf)
    if kind not in ARCHITECTURES:
        raise unsupported("model_type", kind, f"known are {', '.join(ARCHITECTURES)}")
    only(hf, "hidden_act", "silu")
    only(hf, "attention_dropout", 0)
    only(hf, "partial_rotary_factor", 1)
    rope_theta, rope_scaling = read_rope(hf)
    common = dict(
        {name: need(hf, name) for name in COMMON},
        max_position_embeddings=need(hf, "max_position_embeddings"),
        rms_norm_eps=float(get(hf, "rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(get(hf, "tie_word_embeddings", False)),
        initializer_range=float(get(hf, "initializer_range", 0.02)),
        num_nextn_predict_layers=int(get(hf, "num_nextn_predict_layers", 0)),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
    )
    attention = read_mla(hf) if kind in ("deepseek_v2", "deepseek_v3") else read_gqa(hf, kind)
    feed_forward = read_moe(hf, kind) if kind.startswith("deepseek") else {"feed_forward": "dense"}
    return ModelConfig(**common, **attention, **feed_forward)


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
    out |= {"hidden_act": "silu", "attention_dropout": 0.0, **write_rope(config)}
    if config.num_nextn_predict_layers or kind == "deepseek_v3":  # transformers' V3 takes its absence for 1
        out["num_nextn_predict_layers"] = config.num_nextn_predict_layers
    out |= write_mla(config, kind) if config.attention == "mla" else write_gqa(config, kind)
    return out | (write_moe(config, kind) if kind.startswith("deepseek") else {})


def model_type(config: ModelConfig) -> str:
    """The published type whose every reader computes what we compute, or else ours."""
    if config.attention == "gqa":
        published = _gqa_dense(config) if config.feed_forward == "dense" else _gqa_moe(config)
    else:
        published = _mla(config)
    return published or f"{OURS}{config.attention}_{config.feed_forward}"


def _gqa_dense(config: ModelConfig) -> str | None:
    if config.qk_norm:
        return None if config.qkv_bias else "qwen3"
    return "qwen2" if config.qkv_bias else "llama"


def _gqa_moe(config: ModelConfig) -> str | None:
    """DeepSeekMoE-16B's type, whose code knows neither head width, scaling factor, groups nor YaRN."""
    plain = not (config.qkv_bias or config.qk_norm or config.num_nextn_predict_layers)
    plain &= config.head_dim * config.num_attention_heads == config.hidden_size
    plain &= config.rope_scaling is None or config.rope_scaling.kind == "linear"
    greedy = config.scoring_func == "softmax" and config.topk_method == "greedy"
    plain &= greedy and config.n_group == config.topk_group == config.routed_scaling_factor == 1
    return "deepseek" if plain and config.n_shared_experts else None


def _mla(config: ModelConfig) -> str | None:
    if config.is_own_mla:
        return None
    if config.feed_forward == "dense":
        return "deepseek_v3"
    if (config.scoring_func, config.topk_method) == ("sigmoid", "noaux_tc"):
        return "deepseek_v3"
    as_v2 = config.scoring_func == "softmax" and config.topk_method != "noaux_tc" and config.rope_interleave
    return "deepseek_v2" if as_v2 and not config.norm_topk_prob else None


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
        "quantization_config",
        "transformers_version",
    }
    for key in sorted(hf.keys() - known - plumbing):
        raise unsupported(key, hf[key], f"{hf['model_type']} has no such field")
    given = {key: value for key, value in hf.items() if key in known}
    for name in COMMON:
        need(hf, name)
    if given.get("rope_scaling") is not None:
        given["rope_scaling"] = RopeScaling(**given["rope_scaling"])
    frequencies = given.get("rope_inv_freq")
    if frequencies is not None:
        if not isinstance(frequencies, list) or not all(isinstance(f, float) and f >= 0 for f in frequencies):
            raise unsupported("rope_inv_freq", frequencies, "it is a list of frequencies, 0 or above")
        given["rope_inv_freq"] = tuple(frequencies)
    return ModelConfig(**given)
