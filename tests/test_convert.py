"""config.json in every spelling, and everything in one that we must refuse to read."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from abyssal.checkpoint.convert import config_from_hf, config_to_hf, model_type
from abyssal.checkpoint.tensor_names import official_views, shared_copies
from abyssal.model.config import ModelConfig, RopeScaling
from abyssal.model.transformer import Transformer

V3 = ModelConfig(
    vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, q_lora_rank=24,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=8, n_shared_experts=1,
    num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1, n_group=4, topk_group=2,
    routed_scaling_factor=2.5, max_position_embeddings=128, num_nextn_predict_layers=1,
)
DENSE = ModelConfig(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, attention="gqa",
    feed_forward="dense", num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
)
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=16.0, mscale=0.5)
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=32, high_freq_factor=5.0)
NO_EXPERTS = dict.fromkeys(("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
                            "first_k_dense_replace"), 0)

ALL_SHAPES = {
    "deepseek_v3": replace(V3, rope_scaling=YARN),
    "deepseek_v3, all dense": replace(V3, feed_forward="dense", n_group=1, topk_group=1, routed_scaling_factor=1.0,
                                      **NO_EXPERTS),
    "deepseek_v2": replace(V3, scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False),
    "llama": replace(DENSE, rope_scaling=LLAMA3, tie_word_embeddings=True, rope_theta=5e5),
    "llama, linear": replace(DENSE, rope_scaling=RopeScaling(kind="linear", factor=2.0), num_nextn_predict_layers=1),
    "qwen2": replace(DENSE, qkv_bias=True, rope_scaling=replace(YARN, mscale=0.0, mscale_all_dim=0.0)),
    "abyssal_gqa_moe": replace(V3, attention="gqa", num_key_value_heads=2, head_dim=8, rope_scaling=YARN),
    "abyssal_mla_moe": replace(V3, scoring_func="softmax", topk_method="noaux_tc"),
}


@pytest.mark.parametrize(("name", "config"), ALL_SHAPES.items(), ids=ALL_SHAPES.keys())
def test_what_we_write_we_read(name: str, config: ModelConfig):
    written = json.loads(json.dumps(config_to_hf(config, bos_token_id=0, eos_token_id=1)))
    assert written["model_type"] == model_type(config) == name.partition(",")[0]
    assert config_from_hf(written) == config


PUBLISHED = {name: config for name, config in ALL_SHAPES.items() if not name.startswith("abyssal")}


@pytest.mark.parametrize("config", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_transformers_reads_it_without_a_warning_and_writes_what_we_read(
        config: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert not caplog.records
    theirs.save_pretrained(tmp_path)  # in its own spelling: rope_parameters only
    rewritten = json.loads((tmp_path / "config.json").read_text())
    assert "rope_scaling" not in rewritten and "rope_theta" not in rewritten
    assert config_from_hf(rewritten) == config


def official_v3() -> dict[str, Any]:
    """The fields of DeepSeek-V3's own config.json."""
    return dict(
        model_type="deepseek_v3", vocab_size=129280, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128,
        intermediate_size=18432, attention_bias=False, attention_dropout=0.0, ep_size=1, first_k_dense_replace=3,
        hidden_act="silu", kv_lora_rank=512, max_position_embeddings=163840, moe_intermediate_size=2048,
        moe_layer_freq=1, n_group=8, n_routed_experts=256, n_shared_experts=1, norm_topk_prob=True,
        num_experts_per_tok=8, num_key_value_heads=128, num_nextn_predict_layers=1, q_lora_rank=1536,
        qk_nope_head_dim=128, qk_rope_head_dim=64, rms_norm_eps=1e-6, rope_theta=10000, routed_scaling_factor=2.5,
        rope_scaling=dict(beta_fast=32, beta_slow=1, factor=40, mscale=1.0, mscale_all_dim=1.0,
                          original_max_position_embeddings=4096, type="yarn"),
        scoring_func="sigmoid", topk_group=4, topk_method="noaux_tc", v_head_dim=128, aux_loss_alpha=0.001,
    )


def test_the_official_v3_config_and_its_tensors():
    config = config_from_hf(official_v3())
    assert (config.attention, config.feed_forward, config.rope_interleave) == ("mla", "moe", True)
    assert config.rope_scaling == RopeScaling(kind="yarn", factor=40.0, original_max_position_embeddings=4096)
    with torch.device("meta"):
        views = official_views(Transformer(replace(config, num_hidden_layers=4)))  # 3 dense, 1 with experts, 1 MTP
    assert views["model.layers.0.mlp.gate_proj.weight"].shape == (18432, 7168)
    assert views["model.layers.3.self_attn.kv_a_proj_with_mqa.weight"].shape == (576, 7168)
    assert views["model.layers.3.mlp.experts.255.down_proj.weight"].shape == (7168, 2048)
    assert views["model.layers.3.mlp.gate.e_score_correction_bias"].shape == (256,)
    assert views["model.layers.4.eh_proj.weight"].shape == (7168, 2 * 7168)
    assert views["model.layers.4.shared_head.norm.weight"].shape == (7168,)
    assert shared_copies(config) == {
        "model.layers.61.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight": "lm_head.weight",
    }


def test_views_share_memory_and_gate_rows_come_first():
    model = Transformer(V3)
    views = official_views(model)
    with torch.no_grad():
        views["model.layers.1.mlp.experts.5.gate_proj.weight"].fill_(1.0)
        views["model.layers.1.mlp.experts.5.up_proj.weight"].fill_(2.0)
    stacked = model.layers[1].mlp.experts.gate_up_proj[5]
    assert torch.equal(stacked[:, 0], torch.tensor([1.0] * 16 + [2.0] * 16))


def test_absent_mscale_is_off():
    spelling = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32}
    config = config_from_hf(config_to_hf(DENSE) | {"rope_scaling": spelling, "rope_parameters": None})
    assert config.rope_scaling == RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32,
                                              mscale=0.0, mscale_all_dim=0.0)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("deepseek_v3", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy'"),
    ("deepseek_v3", {"attention_bias": True}, "attention_bias=True"),
    ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads=2"),
    ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
    ("deepseek_v3", {"kv_lora_rank": None}, "lacks 'kv_lora_rank'"),
    ("deepseek_v3", {"hidden_size": "32"}, "hidden_size='32'"),
    ("deepseek_v3", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    ("deepseek_v3", {"rope_theta": 5.0}, "disagree"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True"),
    ("llama", {"attention_bias": True}, "attention_bias=True"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama", {"rope_scaling": None, "rope_parameters": {"rope_type": "linear", "factor": 2, "attention_factor": 0.5}},
     "attention_factor=0.5"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}, "rope_scaling": None}, "lacks 'high_freq"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window=64"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types='sliding_attention'"),
    ("qwen2", {"model_type": "qwen3"}, "model_type='qwen3'"),
    ("abyssal_gqa_moe", {"n_heads": 3}, "n_heads=3"),
]


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED, ids=[f"{name}-{said}" for name, _, said in REFUSED])
def test_what_we_cannot_do_is_an_error_with_field_and_value(name: str, changes: dict[str, Any], said: str):
    hf = config_to_hf(ALL_SHAPES[name]) | changes
    with pytest.raises(ValueError) as error:
        config_from_hf(hf)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_window_that_is_switched_off_is_fine():
    hf = config_to_hf(ALL_SHAPES["qwen2"])
    off = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
    assert config_from_hf(hf | off) == config_from_hf(hf)
    assert config_from_hf(hf | off | {"use_sliding_window": True}) == config_from_hf(hf)  # begins after the last layer
