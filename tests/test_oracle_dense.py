"""Llama, Mistral, Qwen2, Qwen3: tiny random transformers models and ours are the same function, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_ours_runs_in_theirs, assert_theirs_runs_in_ours, randomize
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

SHAPE: dict[str, Any] = dict(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=128,
)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 16,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama tied": LlamaConfig(**SHAPE, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "llama 3 rope": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama linear rope": LlamaConfig(**SHAPE, rope_parameters=LINEAR),
    "llama own head width": LlamaConfig(**SHAPE, head_dim=12),
    "qwen2": Qwen2Config(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2 tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2 yarn": Qwen2Config(**SHAPE, rope_parameters=YARN),
    "mistral": MistralConfig(**SHAPE, sliding_window=None, rms_norm_eps=1e-5),
    "mistral, window as long as the context": MistralConfig(**SHAPE, sliding_window=128, head_dim=12),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen3 tied, own head width": Qwen3Config(**SHAPE, head_dim=12, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "qwen3 yarn": Qwen3Config(**SHAPE, head_dim=8, rope_parameters=YARN),
    "qwen3 yarn without its temperature": Qwen3Config(
        **SHAPE, head_dim=8, rope_parameters=YARN | {"attention_factor": 1.0}
    ),
}


@pytest.mark.parametrize(("name", "config"), VARIANTS.items(), ids=VARIANTS.keys())
def test_dense_equals_transformers_both_ways(name: str, config: PreTrainedConfig, tmp_path: Path):
    theirs = randomize(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    ours = assert_theirs_runs_in_ours(theirs, tmp_path / "theirs", generate=name == config.model_type)
    assert ours.config.qkv_bias == (config.model_type == "qwen2")
    assert ours.config.qk_norm == (config.model_type == "qwen3")
    report = assert_ours_runs_in_theirs(ours, tmp_path / "ours")
    assert not report["unexpected_keys"]
    written = json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"]
    assert written == {"mistral": "llama"}.get(config.model_type, config.model_type)
    with safe_open(tmp_path / "ours" / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) is not config.tie_word_embeddings
