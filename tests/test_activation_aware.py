"""Activation-aware rounding: scaled, the same function; rounded, a nearer one."""

from __future__ import annotations

import pytest
import torch
from small_models import random_prompts, small_model
from torch import Tensor

from abyssal.checkpoint.activation_aware import Scales, find_scales, search
from abyssal.checkpoint.tensor_names import IN_FEW_BITS, official_views
from abyssal.kernels.quantize import dequantize, quantize
from abyssal.model.moe import Routing
from abyssal.model.transformer import Transformer

KINDS = ["mla_moe_query_latent", "mla_dense", "gqa_dense"]


def loud_model(kind: str) -> Transformer:
    """A tenth of all channels that norms make are 20 times as loud as the others."""
    model = small_model(kind, initializer_range=0.05).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.where(torch.rand(parameter.shape, generator=generator) < 0.1, 20.0, 1.0))
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.1, generator=generator)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())  # as on disk
    return model


def some_ids(n: int = 6) -> Tensor:
    return torch.tensor(random_prompts([24] * n))


@pytest.fixture(scope="module")
def of_experts() -> tuple[Transformer, Scales]:
    model = loud_model("mla_moe_query_latent")
    return model, find_scales(model, some_ids(), "int4")


def changed(model: Transformer, scales: Scales, *, rounded: bool) -> Transformer:
    """The model that an export would hold: scaled, tables and norms in BF16, projections rounded."""
    other = Transformer(model.config).requires_grad_(False)
    other.load_state_dict(model.state_dict())
    for name, weight in official_views(other).items():
        scaled = scales.apply(name, weight)
        if IN_FEW_BITS.search(name):
            if rounded:
                scaled = dequantize(quantize(scaled, "int4", group=16, importance_I=scales.importance.get(name)))
        elif not name.endswith("e_score_correction_bias"):
            scaled = scaled.bfloat16()
        weight.copy_(scaled)
    return other


def logits(model: Transformer, ids_BT: Tensor, routings: list[Routing] | None = None) -> Tensor:
    with torch.inference_mode():
        hidden_BTD = model.hidden(ids_BT, routings=routings)
        return model.logits(torch.stack([hidden_BTD[:, 1:], *model.mtp_hidden(hidden_BTD, ids_BT)]))


def errors_of_blocks(model: Transformer, other: Transformer) -> float:
    """Of each block of the other on what really goes into it, squared and summed up."""
    ids_BT, error = some_ids(), 0.0
    with torch.inference_mode():
        x_BTD, context = model.embed(ids_BT), model.context(ids_BT)
        for block, of_other in zip(model.layers, other.layers, strict=True):
            y_BTD = block(x_BTD, context, None)
            error += float((of_other(x_BTD, context, None) - y_BTD).square().sum())
            x_BTD = y_BTD
    return error


@pytest.mark.parametrize("kind", KINDS)
def test_the_scaled_checkpoint_is_the_same_function_and_rounds_better(kind: str, of_experts):
    model, scales = of_experts
    if kind != "mla_moe_query_latent":
        model = loud_model(kind)
        scales = find_scales(model, some_ids(), "int4")
    before, after = list[Routing](), list[Routing]()
    exact = logits(model, some_ids(), before)
    same = logits(changed(model, scales, rounded=False), some_ids(), after)
    # what is left is the BF16 of the values' biases
    torch.testing.assert_close(same, exact, atol=0.02 if kind == "gqa_dense" else 2e-4, rtol=0)
    for ours, theirs in zip(before, after, strict=True):
        assert torch.equal(ours.experts_NK, theirs.experts_NK)
    scaled, unscaled = (errors_of_blocks(model, changed(model, s, rounded=True)) for s in (scales, Scales()))
    assert scaled < 0.6 * unscaled


def test_every_projection_is_scaled_and_every_maker_is_divided(of_experts):
    """But the down_proj of experts that no calibration token was sent to."""
    model, scales = of_experts
    names = set(official_views(model))
    assert scales.columns.keys() == {n for n in names if IN_FEW_BITS.search(n) or n.endswith("mlp.gate.weight")} - {
        name for name in names if name not in scales.columns and ".experts." in name and "down_proj" in name
    }
    norms = {n for n in names if n.endswith("layernorm.weight")}
    ups = {n for n in names if n.endswith("up_proj.weight") and n.replace("up_proj", "down_proj") in scales.columns}
    assert scales.rows.keys() == norms | ups | {n for n in names if n.endswith("kv_b_proj.weight")}


def test_a_router_sees_powers_of_two(of_experts):
    _, scales = of_experts
    for layer in (1, 2, 3):
        mantissa, _ = torch.frexp(scales.columns[f"model.layers.{layer}.mlp.gate.weight"])
        assert (mantissa == 0.5).all()


def test_a_channel_that_is_always_loud_gets_finer_steps():
    """By hand: channel 1 is 16 times as loud. In one group with channel 0 its weight 1 has steps of 100 / 7.5."""
    weight_OI = torch.tensor([[100.0, 1.0]])
    x_NI = torch.tensor([[0.1, 16.0], [-0.1, 16.0]])

    def rounded(weight: Tensor) -> Tensor:
        return dequantize(quantize(weight, "int4", group=2))

    assert rounded(weight_OI)[0, 1] == 0.0  # and so the output is off by 16
    scale_I = search(x_NI.abs().mean(0), [(x_NI, weight_OI)], rounded)
    assert scale_I[1] / scale_I[0] > 10
    error = (x_NI @ (rounded(weight_OI * scale_I) / scale_I - weight_OI).T).abs().max()
    assert error < 2.0


def test_fp8_is_refused():
    with pytest.raises(ValueError, match="is for int8 and int4"):
        find_scales(small_model("gqa_dense"), some_ids(), "fp8")
