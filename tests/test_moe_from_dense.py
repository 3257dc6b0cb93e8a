"""Dense -> experts: the same function while all are active, neurons that work together in one expert, a router that
foresees which."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_ours_runs_in_theirs
from small_models import random_prompts, small_model
from torch import Tensor

from abyssal.checkpoint.convert import model_type
from abyssal.engine import Engine
from abyssal.model.moe import DenseFFN, MoE
from abyssal.model.transformer import Transformer
from abyssal.surgery.calibrate import attention_statistics, layer_inputs
from abyssal.surgery.mla_from_gqa import attentions, mla_from_gqa, v3_config
from abyssal.surgery.moe_from_dense import (
    balanced_groups,
    deal,
    fit_router,
    moe_config,
    moe_from_dense,
    moe_weights,
)
from abyssal.types import SamplingParams

IDS_BT = torch.tensor(random_prompts([24, 24, 24], seed=7))
TEXT_BT = torch.tensor(random_prompts([48] * 6, seed=8))


def split(model: Transformer, *, experts: int, shared: int, active: int) -> Transformer:
    config = moe_config(model.config, experts=experts, shared=shared, active=active)
    feed_forwards = [module for module in model.modules() if isinstance(module, DenseFFN)]
    inputs = [x.feed_forward_BTD.flatten(0, 1) for x in layer_inputs(model, TEXT_BT)]
    layers = [moe_weights(ffn, x_ND, config) for ffn, x_ND in zip(feed_forwards, inputs, strict=True)]
    return moe_from_dense(model, config, layers)


@torch.no_grad()
def logits(model: Transformer, ids_BT: Tensor = IDS_BT) -> Tensor:
    return model.logits(model.hidden(ids_BT))


@pytest.mark.parametrize("kind", ["gqa_dense", "gqa_dense_norms", "mla_dense"])
@pytest.mark.parametrize("experts, shared", [(5, 1), (6, 2), (2, 1)])
def test_with_all_experts_active_nothing_changes(kind: str, experts: int, shared: int):
    model = small_model(kind)
    converted = split(model, experts=experts, shared=shared, active=experts)
    torch.testing.assert_close(logits(converted), logits(model), atol=1e-5, rtol=0)
    prompts, greedy = random_prompts([3, 9]), SamplingParams(temperature=0.0, max_tokens=8)
    a, b = (Engine(m, eos_ids=[]).generate(prompts, greedy) for m in (model, converted))
    assert [c.ids for c in a] == [c.ids for c in b]
    assert model_type(converted.config) == ("deepseek_v3" if kind == "mla_dense" else "abyssal_gqa_moe")


def test_the_same_text_deals_the_same_neurons():
    model = small_model("gqa_dense")
    one, other = (split(model, experts=6, shared=2, active=2).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_every_neuron_goes_somewhere_once_and_busy_ones_are_shared():
    moves_NF = torch.rand(40, 12, generator=torch.Generator().manual_seed(0))
    moves_NF[:, [3, 8]] += 2.0
    dealt = deal(moves_NF, experts=5, shared=1)
    assert dealt.shared_X.tolist() == [3, 8]
    assert sorted([*dealt.shared_X.tolist(), *dealt.routed_EW.flatten().tolist()]) == list(range(12))


def test_groups_of_one_size_hold_what_is_alike():
    """Nine points in three bundles, out of order; and a bundle of five where groups are of three: two must go on."""
    directions = torch.eye(3)[[0, 1, 2, 0, 1, 2, 0, 1, 2]]
    noise = 0.1 * torch.rand(9, 3, generator=torch.Generator().manual_seed(1))
    group_I = balanced_groups(F.normalize(directions + noise, dim=1), 3)
    assert [group_I[i::3].unique().numel() for i in range(3)] == [1, 1, 1] and group_I.unique().numel() == 3
    crowded = balanced_groups(F.normalize(torch.eye(2)[[0, 0, 0, 0, 0, 1]] + 0.01, dim=1), 2)
    assert crowded.bincount().tolist() == [3, 3]


def clustered_ffn() -> tuple[DenseFFN, Tensor]:
    """Twelve neurons that listen to one input direction each: four to 0, four to 1, four to 2. Inputs are one of these
    directions and a part that all share."""
    generator = torch.Generator().manual_seed(3)
    ffn = DenseFFN(8, 16)
    kinds = torch.arange(12) % 3
    with torch.no_grad():
        for proj in (ffn.gate_proj, ffn.up_proj):
            proj.weight.zero_()
            proj.weight[torch.arange(12), kinds] = 1.0 + torch.rand(12, generator=generator)
            proj.weight[12:, 7] = 3.0  # four neurons that hear what all inputs have, and are loud
        ffn.down_proj.weight.copy_(F.normalize(torch.randn(8, 16, generator=generator), dim=0))
    x_ND = torch.zeros(300, 8)
    x_ND[torch.arange(300), torch.arange(300) % 3] = 2.0 + torch.rand(300, generator=generator)
    x_ND[:, 7] = 2.0
    return ffn, x_ND


def test_neurons_that_listen_to_one_thing_become_an_expert_that_is_found():
    """One of three experts is active, and the result is that of all."""
    ffn, x_ND = clustered_ffn()
    base = small_model("mla_dense", hidden_size=8, intermediate_size=16, num_hidden_layers=1).config
    config = moe_config(base, experts=3, shared=1, active=1)
    moe = MoE(config, 0)
    moe.load_state_dict(moe_weights(ffn, x_ND, config))
    routings: list[Any] = []
    with torch.no_grad():
        got, wanted = moe(x_ND[None], routings)[0], ffn(x_ND)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    chosen = routings[0].experts_NK[:, 0]
    assert [chosen[kind::3].unique().numel() for kind in range(3)] == [1, 1, 1] and chosen.unique().numel() == 3


def test_fewer_active_experts_cost_and_more_cost_less():
    model = small_model("gqa_dense")
    wanted = logits(model)
    models = [split(model, experts=6, shared=2, active=k) for k in (1, 3, 5, 6)]
    errors = [float((logits(converted) - wanted).square().mean()) for converted in models]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-9 < errors[-2]


def test_latent_attention_and_experts_are_deepseek_v3_in_transformers(tmp_path: Path):
    model = small_model("gqa_dense", qkv_bias=False, vocab_size=97, max_position_embeddings=96, num_hidden_layers=2)
    with torch.no_grad():
        model.embed_tokens.weight += 1.0
    statistics = [
        attention_statistics(model, attention, x.attention_BTD)
        for attention, x in zip(attentions(model), layer_inputs(model, TEXT_BT), strict=True)
    ]
    half = mla_from_gqa(model, v3_config(model.config, latent=12), statistics)
    converted = split(half, experts=5, shared=1, active=2)
    assert model_type(converted.config) == "deepseek_v3"
    assert_ours_runs_in_theirs(converted, tmp_path / "out")


@pytest.mark.parametrize("changes, counts, says", [
    ({}, (7, 2, 2), "48 neurons do not divide by that; use 4, 6, 8, 12 pieces"),
    ({}, (0, 1, 0), "--experts 2 or more"),
    ({}, (6, 0, 2), "--shared 1 or more"),
    ({}, (6, 2, 7), "--active at least 1"),
    ({"num_nextn_predict_layers": 1}, (6, 2, 2), "num_nextn_predict_layers=1"),
])  # fmt: skip
def test_what_cannot_be_split_says_why(changes: dict[str, Any], counts: tuple[int, int, int], says: str):
    config = replace(small_model("gqa_dense").config, **changes)
    with pytest.raises(ValueError, match=says) as error:
        moe_config(config, experts=counts[0], shared=counts[1], active=counts[2])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="has experts already"):
        moe_config(moe_config(replace(config, num_nextn_predict_layers=0), experts=6, shared=2, active=2),
                   experts=6, shared=2, active=2)  # fmt: skip


def test_the_router_orders_experts_by_what_they_will_carry():
    """Shares that are linear in the input x, 0.3 and 0.35 + 0.2 x and 0.35 - 0.2 x. Weights hardly differ."""
    x_N1 = torch.linspace(-1, 1, 64)[:, None]
    share_NE = torch.cat((torch.full_like(x_N1, 0.3), 0.35 + 0.2 * x_N1, 0.35 - 0.2 * x_N1), dim=1)
    router = fit_router(x_N1, share_NE * torch.rand(64, 1, generator=torch.Generator().manual_seed(4)))
    scores_NE = (x_N1.double() @ router.weight_ED.T).sigmoid()
    assert torch.equal((scores_NE + router.bias_E).argsort(1), share_NE.argsort(1))
    assert 0.97 < float(scores_NE.min() / scores_NE.max()) < 0.995  # logits of 0.01: a half and little more or less


def test_one_loud_token_does_not_decide_what_is_shared():
    moves_NF = torch.full((50, 4), 0.1)
    moves_NF[:, 1], moves_NF[0, 2] = 1.0, 1e6
    assert deal(moves_NF, experts=3, shared=1).shared_X.tolist() == [1]
