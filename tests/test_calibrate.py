"""What a text says about the layers of a model."""

from __future__ import annotations

import torch
from small_models import random_prompts, small_model

from abyssal.surgery.calibrate import attention_statistics, layer_inputs, pairs_side_by_side
from abyssal.surgery.mla_from_gqa import attentions

IDS_BT = torch.tensor(random_prompts([12, 12]))


def test_layers_get_what_they_get_in_the_model():
    """The last layer's feed-forward, run on its input and added up, ends in the model's own hidden states."""
    model = small_model("gqa_dense")
    seen = []
    for block in model.layers:
        block.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        block.self_attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.hidden(IDS_BT)
        wanted, seen = seen, []
        got = [tensor for inputs in layer_inputs(model, IDS_BT) for tensor in inputs[1:]]
    assert len(got) == 6 and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_pairs_come_together():
    assert pairs_side_by_side(torch.tensor([1, 2, 3, 10, 20, 30])).tolist() == [1, 10, 2, 20, 3, 30]


def test_a_head_without_preference_looks_at_itself_and_at_the_one_before():
    """Two tokens, all scores 0. Turns: the first has no choice and counts nothing, the second looks half each way. The
    first is looked at with 1 by itself and 1/2 by the second, the second with 1/2: squared, 5/4 and 1/4."""
    model = small_model("gqa_dense")
    [attention, *_] = attentions(model)
    with torch.no_grad():
        attention.q_proj.weight.zero_()
        attention.q_proj.bias.zero_()
    x_BTD = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(0))
    found = attention_statistics(model, attention, x_BTD)
    wanted_P = (1 + torch.polar(torch.ones(4), -model.rope_frequencies)) / 2
    torch.testing.assert_close(found.turn_HP, wanted_P.expand(4, -1).to(torch.complex128))
    assert not found.query_HQQ.any()
    with torch.no_grad():
        values_BTK = attention.v_proj(x_BTD).double()
    first_BK, second_BK = values_BTK.unbind(1)
    wanted_KK = (5 * first_BK.T @ first_BK + second_BK.T @ second_BK) / 6 / 3
    torch.testing.assert_close(found.cache_KK[16:, 16:], wanted_KK, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.cache_K[16:], ((5 * first_BK + second_BK) / 6).mean(0), atol=1e-6, rtol=1e-4)


def test_the_direction_that_says_one():
    """Inputs that have a part in common, and another for each."""
    model = small_model("gqa_dense", qkv_bias=False)
    generator = torch.Generator().manual_seed(1)
    x_BTD = torch.randn(32, generator=generator) + 0.1 * torch.randn(4, 50, 32, generator=generator)
    found = attention_statistics(model, attentions(model)[0], x_BTD)
    said_BT = x_BTD.double() @ found.constant_D
    assert abs(float(said_BT.mean()) - 1) < 0.01 and float(said_BT.std()) < 0.05
