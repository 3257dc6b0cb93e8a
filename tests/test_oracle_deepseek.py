"""DeepSeek V3 and V2: tiny random transformers models and ours are the same function, in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_ours_runs_in_theirs, assert_theirs_runs_in_ours, our_logits, randomize, some_ids
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config

from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.save import save_checkpoint
from abyssal.model.config import ModelConfig, RopeScaling
from abyssal.model.transformer import Transformer

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.8, "mscale_all_dim": 1.2}
SHAPE: dict[str, Any] = dict(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    intermediate_size=48, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=8,
    n_shared_experts=2, num_experts_per_tok=3, moe_intermediate_size=16, first_k_dense_replace=1, n_group=1,
    topk_group=1, max_position_embeddings=128,
)
V3_VARIANTS: dict[str, dict[str, Any]] = {
    "query latent": dict(q_lora_rank=24),
    "no query latent": dict(q_lora_rank=None),
    "groups": dict(q_lora_rank=24, n_group=4, topk_group=2),
    "yarn": dict(q_lora_rank=24, rope_parameters=YARN),
    "half-split rope": dict(q_lora_rank=None, rope_interleave=False),
    "weights not renormalised": dict(q_lora_rank=24, norm_topk_prob=False, routed_scaling_factor=1.7),
    "wide epsilon, tied head": dict(q_lora_rank=24, rms_norm_eps=1e-2, tie_word_embeddings=True),
}


def v3(**changes: Any) -> DeepseekV3Config:
    return DeepseekV3Config(**(SHAPE | dict(num_nextn_predict_layers=0) | changes))


@pytest.mark.parametrize(("name", "changes"), V3_VARIANTS.items(), ids=V3_VARIANTS.keys())
def test_v3_equals_transformers_both_ways(name: str, changes: dict[str, Any], tmp_path: Path):
    theirs = randomize(AutoModelForCausalLM.from_config(v3(**changes), dtype=torch.float32))
    ours = assert_theirs_runs_in_ours(theirs, tmp_path / "theirs", generate=name == "yarn")
    report = assert_ours_runs_in_theirs(ours, tmp_path / "ours")
    assert not report["unexpected_keys"]


V2_VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": dict(topk_method="greedy", q_lora_rank=None, norm_topk_prob=False),
    "group limited": dict(topk_method="group_limited_greedy", q_lora_rank=24, n_group=4, topk_group=2,
                          routed_scaling_factor=3.0, norm_topk_prob=False),
    "yarn": dict(topk_method="greedy", q_lora_rank=None, norm_topk_prob=False, rope_parameters=YARN),
}


@pytest.mark.parametrize(("name", "changes"), V2_VARIANTS.items(), ids=V2_VARIANTS.keys())
def test_v2_equals_transformers_both_ways(name: str, changes: dict[str, Any], tmp_path: Path):
    config = DeepseekV2Config(**(SHAPE | changes))
    theirs = randomize(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    ours = assert_theirs_runs_in_ours(theirs, tmp_path / "theirs", generate=name == "yarn")
    assert ours.config.scoring_func == "softmax" and not ours.gates()
    assert_ours_runs_in_theirs(ours, tmp_path / "ours")


def our_v3(**changes: Any) -> Transformer:
    shape = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
    config = ModelConfig(**(shape | changes))
    model = Transformer(config).init_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20) if p.ndim > 1 else p.add_(0.1)
        for gate in model.gates():
            gate.e_score_correction_bias.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(2))
    return model


def test_a_model_of_ours_with_mtp_loads_there_with_only_the_mtp_layers_left_over(tmp_path: Path):
    scaling = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32)
    model = our_v3(num_nextn_predict_layers=2, q_lora_rank=24, rope_scaling=scaling, routed_scaling_factor=2.5)
    report = assert_ours_runs_in_theirs(model, tmp_path)
    prefixes = {key.rsplit("model.layers.")[1].split(".")[0] for key in report["unexpected_keys"]}
    assert prefixes == {"2", "3"}
    assert "model.layers.2.shared_head.head.weight" in report["unexpected_keys"]


def test_mla_without_experts_is_a_v3_whose_layers_are_all_dense(tmp_path: Path):
    no_experts = dict.fromkeys(("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
                                "first_k_dense_replace"), 0)
    report = assert_ours_runs_in_theirs(our_v3(feed_forward="dense", **no_experts), tmp_path)
    assert not report["unexpected_keys"]


def test_the_gate_bias_is_fp32_on_disk_and_after_loading(tmp_path: Path):
    model = our_v3()
    with torch.no_grad():
        model.gates()[0].e_score_correction_bias.fill_(5.001)  # 5.0 in BF16
    save_checkpoint(tmp_path, model, None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for bias in (load_checkpoint(tmp_path).model.gates()[0].e_score_correction_bias,
                 theirs.model.layers[1].mlp.gate.e_score_correction_bias):
        assert bias.dtype == torch.float32
        assert torch.equal(bias, torch.full((8,), 5.001))


def test_bf16_compute_stays_near_fp32(tmp_path: Path):
    """Loaded for BF16 compute the masters stay FP32; the logits differ by rounding only, and not by nothing."""
    theirs = randomize(AutoModelForCausalLM.from_config(v3(q_lora_rank=24), dtype=torch.float32))
    theirs.save_pretrained(tmp_path)
    exact = load_checkpoint(tmp_path).model
    rounded = load_checkpoint(tmp_path, dtype="bfloat16").model
    assert all(p.dtype == torch.float32 for p in rounded.parameters())
    ids_BT = some_ids()
    with torch.no_grad():
        want, got = our_logits(exact, ids_BT), our_logits(rounded, ids_BT)
    error = (got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt()
    assert 0 < error < 0.1


def test_gqa_with_experts_comes_back_under_a_name_of_ours(tmp_path: Path):
    model = our_v3(attention="gqa", num_key_value_heads=2, head_dim=8, num_nextn_predict_layers=1)
    save_checkpoint(tmp_path, model, None)
    again = load_checkpoint(tmp_path)
    assert again.config == model.config
    assert '"model_type": "abyssal_gqa_moe"' in (tmp_path / "config.json").read_text()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
        torch.testing.assert_close(our_logits(again.model, some_ids()), our_logits(model, some_ids()), atol=0, rtol=0)
