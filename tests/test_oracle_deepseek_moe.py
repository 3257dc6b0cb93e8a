"""DeepSeekMoE-16B's type, which transformers does not have, against a model put together from parts that it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from oracle import assert_same_function, assert_same_greedy_text, randomize
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV2Config, LlamaConfig, LlamaForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.save import save_checkpoint

SHAPE: dict[str, Any] = dict(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=128, rms_norm_eps=1e-6, initializer_range=0.02, tie_word_embeddings=False,
)
ROUTING: dict[str, Any] = dict(
    n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, moe_intermediate_size=16, first_k_dense_replace=1,
)


class LlamaWithExperts(LlamaForCausalLM):
    """Llama's attention, V2's experts chosen greedily."""

    def __init__(self, key_heads: int) -> None:
        super().__init__(LlamaConfig(**SHAPE, num_key_value_heads=key_heads))
        experts = DeepseekV2Config(**SHAPE, **ROUTING, topk_method="greedy", experts_implementation="eager")
        for layer in self.model.layers[ROUTING["first_k_dense_replace"] :]:
            layer.mlp = DeepseekV2Moe(experts)


def one_by_one(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names -> views: transformers stacks the experts of a layer, files have them one by one."""
    views = {}
    for name, tensor in state.items():
        prefix, _, part = name.rpartition(".experts.")
        for i, expert in enumerate(tensor if prefix else ()):
            if part == "gate_up_proj":
                gate, up = expert.chunk(2)
                views[f"{prefix}.experts.{i}.gate_proj.weight"] = gate
                views[f"{prefix}.experts.{i}.up_proj.weight"] = up
            else:
                views[f"{prefix}.experts.{i}.{part}.weight"] = expert
        views |= {} if prefix else {name: tensor}
    return views


@pytest.mark.parametrize("key_heads", [4, 2], ids=["as published", "grouped"])
def test_deepseek_moe_equals_transformers_parts_both_ways(key_heads: int, tmp_path: Path):
    published = SHAPE | ROUTING | dict(
        architectures=["DeepseekForCausalLM"], model_type="deepseek", num_key_value_heads=key_heads,
        attention_bias=False, hidden_act="silu", moe_layer_freq=1, norm_topk_prob=False, scoring_func="softmax",
        rope_theta=10000.0, rope_scaling=None,
    )  # fmt: skip
    theirs = randomize(LlamaWithExperts(key_heads))
    views = one_by_one(theirs.state_dict())
    (tmp_path / "config.json").write_text(json.dumps(published))
    save_file({name: view.clone() for name, view in views.items()}, tmp_path / "model.safetensors")
    ours = load_checkpoint(tmp_path).model
    assert_same_function(ours, theirs)
    assert_same_greedy_text(ours, theirs, generate=True)

    save_checkpoint(tmp_path / "ours", ours, None)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert {name: written[name] for name in published} == published
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    assert tensors.keys() == views.keys()
    for name, view in views.items():
        view.copy_(tensors[name])  # BF16: another function
    theirs.zero_grad()
    again = load_checkpoint(tmp_path / "ours").model
    assert_same_function(again, theirs)
    assert_same_greedy_text(again, theirs)
