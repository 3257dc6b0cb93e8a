"""The router, by hand: each pitfall of DeepSeek's gate as a worked example.

Letters: N tokens, E experts, K chosen, G groups.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from abyssal.model.config import ModelConfig
from abyssal.model.moe import Gate, Routing
from abyssal.model.transformer import Transformer

SHAPE: dict[str, Any] = dict(
    vocab_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, kv_lora_rank=8, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, n_shared_experts=1, moe_intermediate_size=16,
)


def gate_for(n_experts: int, **changes: Any) -> Gate:
    """A gate whose router weight is the identity: the input is the logits."""
    config = ModelConfig(**(SHAPE | dict(hidden_size=n_experts, n_routed_experts=n_experts) | changes))
    gate = Gate(config, 0)
    with torch.no_grad():
        gate.weight.copy_(torch.eye(n_experts))
    return gate


def logit(*probabilities: float) -> Tensor:
    """The logits whose sigmoid is given, as one token (1, E)."""
    return torch.tensor(probabilities).logit()[None]


def chosen(experts_NK: Tensor) -> list[set[int]]:
    return [set(row) for row in experts_NK.tolist()]


def weight_of(gate: Gate, x_NE: Tensor) -> list[dict[int, float]]:
    routing = gate(x_NE)
    return [dict(zip(e, w, strict=True)) for e, w in
            zip(routing.experts_NK.tolist(), routing.weights_NK.tolist(), strict=True)]


def test_weights_are_the_sigmoids_renormalised_times_the_factor():
    gate = gate_for(4, num_experts_per_tok=2, routed_scaling_factor=2.5)
    (weights,) = weight_of(gate, logit(0.6, 0.1, 0.2, 0.05))
    assert weights == pytest.approx({0: 2.5 * 0.6 / 0.8, 2: 2.5 * 0.2 / 0.8}, rel=1e-6)
    unnormalised = gate_for(4, num_experts_per_tok=2, routed_scaling_factor=2.5, norm_topk_prob=False)
    (weights,) = weight_of(unnormalised, logit(0.6, 0.1, 0.2, 0.05))
    assert weights == pytest.approx({0: 2.5 * 0.6, 2: 2.5 * 0.2}, rel=1e-6)


def test_the_bias_chooses_and_never_scales():
    gate = gate_for(4, num_experts_per_tok=2)
    gate.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 5.0]))  # lifts the worst expert into the choice
    routing = gate(logit(0.6, 0.1, 0.2, 0.05))
    (weights,) = weight_of(gate, logit(0.6, 0.1, 0.2, 0.05))
    assert weights == pytest.approx({0: 0.6 / 0.65, 3: 0.05 / 0.65}, rel=1e-6)
    assert torch.allclose(routing.scores_NE, torch.tensor([[0.6, 0.1, 0.2, 0.05]]))  # losses see unbiased scores


def test_dropped_groups_are_minus_infinity_because_biased_scores_can_be_negative():
    """Every biased score is below 0; a mask that writes 0 would hand the choice to the dropped group."""
    gate = gate_for(4, num_experts_per_tok=2, n_group=2, topk_group=1)
    gate.e_score_correction_bias.fill_(-10.0)
    assert chosen(gate.choose(torch.tensor([[0.3, 0.2, 0.9, 0.8]]))) == [{2, 3}]


def test_v3_ranks_groups_by_their_two_best_v2_by_the_best():
    scores = torch.tensor([[0.40, 0.01, 0.02, 0.25, 0.24, 0.08]])  # two groups of three
    v3 = gate_for(6, num_experts_per_tok=2, n_group=2, topk_group=1)
    v2 = gate_for(6, num_experts_per_tok=2, n_group=2, topk_group=1, scoring_func="softmax",
                  topk_method="group_limited_greedy", norm_topk_prob=False)
    assert chosen(v3.choose(scores)) == [{3, 4}]  # 0.49 beats 0.42
    assert chosen(v2.choose(scores)) == [{0, 2}]  # 0.40 beats 0.25
    greedy = gate_for(6, num_experts_per_tok=2, n_group=2, topk_group=1, scoring_func="softmax", topk_method="greedy",
                      norm_topk_prob=False)
    assert chosen(greedy.choose(scores)) == [{0, 3}]  # groups do not count


def test_v2_weights_are_the_softmax_not_renormalised():
    gate = gate_for(4, num_experts_per_tok=2, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False,
                    routed_scaling_factor=16.0)
    (weights,) = weight_of(gate, torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log())
    assert weights == pytest.approx({0: 16 * 0.5, 1: 16 * 0.3}, rel=1e-6)
    assert not hasattr(gate, "e_score_correction_bias")


def test_choices_equal_a_loop_over_tokens():
    gate = gate_for(12, num_experts_per_tok=3, n_group=4, topk_group=2)
    generator = torch.Generator().manual_seed(0)
    gate.e_score_correction_bias.normal_(0.0, 0.5, generator=generator)
    scores_NE = torch.rand(200, 12, generator=generator)
    want = []
    for scores in (scores_NE.double() + gate.e_score_correction_bias.double()).tolist():
        groups = [range(g * 3, g * 3 + 3) for g in range(4)]
        best = sorted(groups, key=lambda group: -sum(sorted(scores[e] for e in group)[-2:]))[:2]
        want.append(set(sorted((e for group in best for e in group), key=lambda e: -scores[e])[:3]))
    assert chosen(gate.choose(scores_NE)) == want
    assert len({frozenset(c) for c in want}) > 20  # the example has something to tell apart


def test_the_bias_moves_against_the_load_and_is_recentred():
    """Loads 3 1 0 0 have mean 1: signs - 0 + +, times 0.1, less their mean 0.025."""
    gate = gate_for(4, num_experts_per_tok=1)
    gate.update_bias(torch.tensor([3, 1, 0, 0]), 0.1)
    assert gate.e_score_correction_bias.tolist() == pytest.approx([-0.125, -0.025, 0.075, 0.075])
    gate.update_bias(torch.tensor([3, 1, 0, 0]), 0.1)
    assert gate.e_score_correction_bias.tolist() == pytest.approx([-0.25, -0.05, 0.15, 0.15])


def test_routing_is_fp32_whatever_the_input():
    """Logits 4.00 and 4.01 are one number in BF16; the weight keeps them apart, so the product must be FP32."""
    gate = gate_for(2, num_experts_per_tok=1)
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([[4.00, 0.0], [4.01, 0.0]]))
    routing = gate(torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16))
    assert routing.scores_NE.dtype == routing.weights_NK.dtype == torch.float32
    assert chosen(routing.experts_NK) == [{1}]


def test_bias_and_router_stay_fp32_in_a_bf16_model():
    """A step of 0.001 on a bias of 5 is lost in BF16."""
    config = ModelConfig(**SHAPE, hidden_size=16, n_routed_experts=4, num_experts_per_tok=2, num_nextn_predict_layers=1)
    model = Transformer(config, dtype=torch.bfloat16).init_weights(torch.Generator().manual_seed(0))
    assert len(model.gates()) == 3  # two layers and the MTP module
    for gate in model.gates():
        gate.e_score_correction_bias.fill_(5.0)
        gate.update_bias(torch.tensor([2.0, 2.0, 0.0, 0.0]), 0.001)
    for gate in model.gates() + model.inference_copy().gates():
        assert gate.e_score_correction_bias.dtype == gate.weight.dtype == torch.float32
        differences = gate.e_score_correction_bias[2:] - gate.e_score_correction_bias[:2]
        assert differences.tolist() == pytest.approx([0.002, 0.002], rel=1e-3)


def test_the_router_learns_through_the_weights_and_the_bias_never_does():
    gate = gate_for(4, num_experts_per_tok=2)
    routing = gate(logit(0.6, 0.1, 0.2, 0.05))
    (routing.weights_NK * torch.tensor([1.0, -1.0])).sum().backward()
    assert gate.weight.grad is not None and gate.weight.grad[[0, 2]].abs().sum() > 0
    assert gate.weight.grad[[1, 3]].abs().sum() == 0  # not chosen
    assert not gate.e_score_correction_bias.requires_grad


def test_replayed_experts_are_weighed_by_the_gates_own_scores():
    gate = gate_for(4, num_experts_per_tok=2, routed_scaling_factor=2.5)
    x_NE = torch.cat([logit(0.6, 0.1, 0.2, 0.05)] * 2)
    routing = gate(x_NE, torch.tensor([[3, 1], [-1, -1]]))
    assert routing.experts_NK[0].tolist() == [3, 1]
    assert routing.weights_NK[0].tolist() == pytest.approx([2.5 * 0.05 / 0.15, 2.5 * 0.1 / 0.15], rel=1e-6)
    assert chosen(routing.experts_NK[1:]) == [{0, 2}]  # -1: it chooses for itself
    assert torch.equal(routing.experts_NK[1], gate(x_NE).experts_NK[1])
    assert torch.equal(routing.scores_NE, gate(x_NE).scores_NE)


def test_the_router_learns_about_the_experts_that_were_replayed():
    gate = gate_for(4, num_experts_per_tok=2)
    routing = gate(logit(0.6, 0.1, 0.2, 0.05), torch.tensor([[1, 3]]))
    (routing.weights_NK * torch.tensor([1.0, -1.0])).sum().backward()
    assert gate.weight.grad is not None and (gate.weight.grad[[1, 3]].abs().sum(-1) > 0).all()
    assert gate.weight.grad[[0, 2]].abs().sum() == 0  # its own choice, which was not used


def test_a_model_replays_layer_by_layer_and_records_what_it_used():
    config = ModelConfig(**(SHAPE | {"num_hidden_layers": 3}), hidden_size=16, n_routed_experts=4,
                         num_experts_per_tok=2, first_k_dense_replace=1, initializer_range=0.3)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    ids_BT = torch.arange(6).view(2, 3)
    own: list[Routing] = []
    hidden_BTD = model.hidden(ids_BT, routings=own)
    own_BTMK = torch.stack([r.experts_NK for r in own], dim=1).unflatten(0, (2, 3))
    assert torch.equal(model.hidden(ids_BT, experts_BTMK=own_BTMK), hidden_BTD)
    assert torch.equal(model.hidden(ids_BT, experts_BTMK=torch.full_like(own_BTMK, -1)), hidden_BTD)
    other_BTMK = own_BTMK.clone()
    other_BTMK[1, 1, 1] = (own_BTMK[1, 1, 1] + 1) % 4  # one token, in the second of two layers
    used: list[Routing] = []
    changed_BTD = model.hidden(ids_BT, experts_BTMK=other_BTMK, routings=used)
    assert torch.equal(torch.stack([r.experts_NK for r in used], dim=1).unflatten(0, (2, 3)), other_BTMK)
    assert (changed_BTD != hidden_BTD).any(-1).tolist() == [[False] * 3, [False, True, False]]
