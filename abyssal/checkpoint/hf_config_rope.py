"""Rotary settings of a config.json in both spellings: `rope_theta` with `rope_scaling`, and `rope_parameters`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from abyssal.checkpoint.hf_config_fields import unsupported
from abyssal.model.config import ModelConfig, RopeScaling

ROPE_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
    },
}

OFF_WHEN_ABSENT = ("mscale", "mscale_all_dim", "attention_factor")


def read_rope(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
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
        raise unsupported("rope_type", kind, f"known are {', '.join(ROPE_KEYS)}")
    if given.pop("partial_rotary_factor", 1) != 1:
        raise unsupported("partial_rotary_factor", spelling["partial_rotary_factor"], "all of a head must be rotated")
    if kind == "yarn" and given.pop("truncate", True) is not True:
        raise unsupported("truncate", spelling["truncate"], "YaRN's bounds are rounded")
    multiplier = given.pop("attn_factor", None) if kind == "yarn" else None
    for key in given.keys() - ROPE_KEYS[kind]:
        options = ", ".join(sorted(ROPE_KEYS[kind])) or "no options"
        raise unsupported(key, given[key], f"rope type {kind} has {options}")
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
    scaling = RopeScaling(kind=kind, **numbers)
    return scaling if multiplier is None else _with_multiplier(scaling, float(multiplier))


def _with_multiplier(scaling: RopeScaling, multiplier: float) -> RopeScaling:
    """vLLM's, SGLang's and llama.cpp's name: it multiplies YaRN's own temperature, which `attention_factor`, that of
    transformers, replaces. DeepSeek-R1-0528-Qwen3-8B has only the former, 1 / (0.1 ln 4 + 1), to switch it off."""
    factor = multiplier * replace(scaling, attention_factor=None).amplitude
    if scaling.attention_factor is not None:
        if not math.isclose(factor, scaling.attention_factor, rel_tol=1e-6):
            raise ValueError(
                f"config.json: attention_factor={scaling.attention_factor} and attn_factor={multiplier} disagree; "
                f"keep one of them"
            )
        return scaling
    return replace(scaling, attention_factor=factor)


def write_rope(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {
            "rope_theta": config.rope_theta,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        }
    values = {key: getattr(scaling, key) for key in sorted(ROPE_KEYS[scaling.kind])}
    values = {key: value for key, value in values.items() if value or key not in OFF_WHEN_ABSENT}
    if scaling.attention_factor:  # to every engine by its own name, though transformers warns of the other
        values["attn_factor"] = scaling.attention_factor / replace(scaling, attention_factor=None).amplitude
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": {"type": scaling.kind, "rope_type": scaling.kind, **values},
        "rope_parameters": {"rope_type": scaling.kind, "rope_theta": config.rope_theta, **values},
    }
