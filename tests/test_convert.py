"""config.json in every spelling, and everything in one that we must refuse to read."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from official_configs import MISTRAL_7B_V03, OFFICIAL, R1_0528_QWEN3_8B
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
NO_MLA: dict[str, Any] = dict(q_lora_rank=None, kv_lora_rank=0, qk_nope_head_dim=0, qk_rope_head_dim=0, v_head_dim=0)

ALL_SHAPES = {
    "deepseek_v3": replace(V3, rope_scaling=YARN),
    "deepseek_v3, all dense": replace(V3, feed_forward="dense", n_group=1, topk_group=1, routed_scaling_factor=1.0,
                                      **NO_EXPERTS),
    "deepseek_v2": replace(V3, scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False),
    "llama": replace(DENSE, rope_scaling=LLAMA3, tie_word_embeddings=True, rope_theta=5e5),
    "llama, linear": replace(DENSE, rope_scaling=RopeScaling(kind="linear", factor=2.0), num_nextn_predict_layers=1),
    "qwen2": replace(DENSE, qkv_bias=True, rope_scaling=replace(YARN, mscale=0.0, mscale_all_dim=0.0)),
    "qwen3": replace(DENSE, qk_norm=True, head_dim=12, rope_scaling=replace(YARN, mscale=0.0, mscale_all_dim=0.0)),
    "deepseek": replace(V3, attention="gqa", num_key_value_heads=4, head_dim=8, scoring_func="softmax",
                        topk_method="greedy", norm_topk_prob=False, n_group=1, topk_group=1,
                        routed_scaling_factor=1.0, num_nextn_predict_layers=0, **NO_MLA),
    "deepseek, renormalised, two key heads": replace(
        V3, attention="gqa", num_key_value_heads=2, head_dim=8, scoring_func="softmax", topk_method="greedy",
        n_group=1, topk_group=1, routed_scaling_factor=1.0, num_nextn_predict_layers=0, rope_theta=5e4, **NO_MLA),
    "abyssal_gqa_dense": replace(DENSE, qk_norm=True, qkv_bias=True),
    "abyssal_gqa_moe": replace(V3, attention="gqa", num_key_value_heads=2, head_dim=8, rope_scaling=YARN),
    "abyssal_mla_moe": replace(V3, scoring_func="softmax", topk_method="noaux_tc"),
}


@pytest.mark.parametrize(("name", "config"), ALL_SHAPES.items(), ids=ALL_SHAPES.keys())
def test_what_we_write_we_read(name: str, config: ModelConfig):
    written = json.loads(json.dumps(config_to_hf(config, bos_token_id=0, eos_token_id=1)))
    assert written["model_type"] == model_type(config) == name.partition(",")[0]
    assert config_from_hf(written) == config


# transformers has no `deepseek`: that model brings code of its own
PUBLISHED = {name: c for name, c in ALL_SHAPES.items() if not name.startswith(("abyssal", "deepseek,", "deepseek "))
             and name != "deepseek"}


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


SPELLED = [name for name in ALL_SHAPES if not name.startswith("abyssal")]


@pytest.mark.parametrize("name", SPELLED)
def test_either_spelling_of_rope_says_all(name: str):
    hf = config_to_hf(ALL_SHAPES[name])
    old = {key: value for key, value in hf.items() if key != "rope_parameters"}
    new = {key: value for key, value in hf.items() if key not in ("rope_scaling", "rope_theta")}
    oldest = old | {"rope_scaling": None if hf["rope_scaling"] is None else dict(hf["rope_scaling"])}
    if oldest["rope_scaling"]:
        del oldest["rope_scaling"]["rope_type"]  # `type`, as in 2023
    for spelling in (old, new, oldest):
        assert config_from_hf(spelling) == ALL_SHAPES[name]


def test_r1_0528_qwen3_switches_yarns_temperature_off():
    """Its attn_factor is 1 / (0.1 ln 4 + 1): cos and sin are not scaled. transformers alone does not know the name."""
    config = config_from_hf(R1_0528_QWEN3_8B)
    assert (config.qk_norm, config.qkv_bias, config.head_dim, config.num_key_value_heads) == (True, False, 128, 8)
    assert config.rope_scaling is not None and config.rope_scaling.amplitude == pytest.approx(1.0, abs=1e-12)
    written = config_to_hf(config)
    assert written["rope_parameters"]["attention_factor"] == pytest.approx(1.0, abs=1e-12)  # transformers' name
    assert written["rope_scaling"]["attn_factor"] == pytest.approx(0.8782488562869419, abs=1e-12)  # vLLM's
    assert config_from_hf(written) == config
    plain = config_from_hf(R1_0528_QWEN3_8B | {"rope_scaling": {"type": "yarn", "factor": 4.0}})
    assert plain.rope_scaling is not None and plain.rope_scaling.amplitude == pytest.approx(1.1386294, abs=1e-7)


def test_a_mistral_is_a_llama_when_its_window_hides_nothing():
    config = config_from_hf(MISTRAL_7B_V03)
    assert (config.head_dim, config.num_key_value_heads, config.rope_theta) == (128, 8, 1e6)
    assert model_type(config) == "llama" and config_from_hf(config_to_hf(config)) == config
    assert config_from_hf(MISTRAL_7B_V03 | {"sliding_window": 32768}) == config
    own_width = config_from_hf(MISTRAL_7B_V03 | {"hidden_size": 5120, "head_dim": 128})  # as Mistral-Nemo
    assert own_width.head_dim == 128
    unsaid = {key: value for key, value in MISTRAL_7B_V03.items() if key != "sliding_window"}
    assert config_from_hf(unsaid | {"max_position_embeddings": 4096}).max_position_embeddings == 4096
    for early in (unsaid, MISTRAL_7B_V03 | {"sliding_window": 4096}):  # absent means 4096 there, not none
        with pytest.raises(ValueError, match="sliding_window=4096 is not supported; set it to null, or max_"):
            config_from_hf(early)


def test_a_deepseek_without_experts_is_a_llama():
    """DeepSeek-Prover-V1.5 is published so."""
    config = config_from_hf(OFFICIAL["deepseek_moe_16b"] | {"n_routed_experts": None, "n_shared_experts": None})
    assert config.feed_forward == "dense" and model_type(config) == "llama"


def test_the_official_v3_config_and_its_tensors():
    config = config_from_hf(OFFICIAL["v3"])
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
    ("deepseek_v3", {"quantization_config": {"quant_method": "gptq"}}, "quant_method='gptq'"),
    ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "weight_block_size=None"),
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
    ("qwen2", {"num_key_value_heads": None}, "lacks 'num_key_value_heads'"),
    ("qwen2", {"model_type": "qwen2_moe"}, "model_type='qwen2_moe'"),
    ("qwen3", {"head_dim": None}, "lacks 'head_dim'"),
    ("qwen3", {"attention_bias": True}, "attention_bias=True"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window=64"),
    ("deepseek_v3", {"n_group": None}, "lacks 'n_group'"),
    ("deepseek_v3", {"routed_scaling_factor": "2.5"}, "should be of type int or float"),
    ("deepseek", {"topk_method": "group_limited_greedy"}, "topk_method='group_limited_greedy'"),
    ("deepseek", {"routed_scaling_factor": 2.0}, "routed_scaling_factor=2.0"),
    ("deepseek", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
    ("qwen3", {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.0,
                                                         "attn_factor": 1.0}}, "attn_factor=1.0 disagree"),
    ("abyssal_gqa_moe", {"n_heads": 3}, "n_heads=3"),
    ("abyssal_gqa_moe", {"rope_scaling": {"kind": "linear", "factor": 2.0, "attention_factor": 1.5}},
     "attention_factor=1.5"),
    ("abyssal_gqa_moe", {"rope_scaling": {"kind": "yarn", "factor": 2.0, "attention_factor": 0.0}},
     "attention_factor=0.0"),
    ("abyssal_mla_moe", {"qk_norm": True}, "qk_norm=True"),
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
