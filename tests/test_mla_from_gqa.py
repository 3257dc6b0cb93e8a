"""GQA -> MLA: exact in the extended config, and in DeepSeek-V3's shape where keys share one mixture; wider is no worse.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_ours_runs_in_theirs
from small_models import random_prompts, small_model
from torch import Tensor

from abyssal.checkpoint.convert import config_from_hf, config_to_hf, model_type
from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.save import save_checkpoint
from abyssal.engine import Engine
from abyssal.model.config import ModelConfig, RopeScaling
from abyssal.model.mla import MLA
from abyssal.model.transformer import Transformer
from abyssal.surgery import mla_from_gqa as mla_from_gqa_module
from abyssal.surgery.calibrate import AttentionStatistics, attention_statistics, layer_inputs
from abyssal.surgery.mla_from_gqa import (
    attentions,
    compress,
    exact_attention,
    exact_config,
    importance,
    key_basis,
    mla_from_gqa,
    v3_attention,
    v3_config,
)
from abyssal.types import SamplingParams

LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=16)
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.0, mscale_all_dim=0.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "two heads a group, tied": {},
    "one group": {"num_key_value_heads": 1},
    "MHA": {"num_key_value_heads": 4},
    "three heads a group, untied": {"num_attention_heads": 6, "tie_word_embeddings": False},
    "biases": {"qkv_bias": True},
    "llama 3 rope": {"rope_scaling": LLAMA3},
    "linear rope": {"rope_scaling": RopeScaling(kind="linear", factor=2.0)},
    "yarn and biases": {"rope_scaling": YARN, "qkv_bias": True},
}
IDS_BT = torch.tensor(random_prompts([24, 24, 24], seed=7))
TEXT_BT = torch.tensor(random_prompts([48] * 6, seed=8))


@torch.no_grad()
def gqa_model(**changes: Any) -> Transformer:
    """Weights that BF16 holds, biases off 0."""
    model = small_model("gqa_dense", **({"qkv_bias": False} | changes))
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.normal_(0, 0.3, generator=generator)
        p.copy_(p.bfloat16())
    return model


@torch.no_grad()
def with_one_key(model: Transformer, *, value_rank: int) -> Transformer:
    """At each frequency every KV head's key is a complex multiple of one; values have a rank below their width."""
    generator = torch.Generator().manual_seed(2)
    groups, width = model.config.num_key_value_heads, model.config.head_dim
    for attention in attentions(model):
        one_PD = torch.complex(*attention.k_proj.weight.view(groups, 2, width // 2, -1)[0])
        multiples_GP = torch.randn(groups, width // 2, dtype=torch.complex64, generator=generator)
        keys_GPD = multiples_GP[..., None] * one_PD
        attention.k_proj.weight.copy_(torch.stack((keys_GPD.real, keys_GPD.imag), dim=1).flatten(0, 2))
        mix = torch.randn(groups * width, value_rank, generator=generator)
        attention.v_proj.weight.copy_(mix @ attention.v_proj.weight[:value_rank])
    return model


@torch.no_grad()
def with_common_part(model: Transformer) -> Transformer:
    """Layers' inputs have something in common, as those of trained models have."""
    model.embed_tokens.weight += 1.0
    return model


def statistics_of(model: Transformer) -> list[AttentionStatistics]:
    inputs = layer_inputs(model, TEXT_BT)
    return [attention_statistics(model, a, x.attention_BTD) for a, x in zip(attentions(model), inputs, strict=True)]


@torch.no_grad()
def logits(model: Transformer) -> Tensor:
    return model.logits(model.hidden(IDS_BT))


def without_norm(model: Transformer, latent: int) -> Transformer:
    """The V3 conversion in a config whose latent is not normalised: what remains is what the shape itself costs."""
    config = replace(v3_config(model.config, latent=latent), latent_norm=False)
    converted = mla_from_gqa(model, exact_config(model.config))  # for all that is no attention
    state = {name: t for name, t in converted.state_dict().items() if ".self_attn." not in name}
    for layer, (attention, found) in enumerate(zip(attentions(model), statistics_of(model), strict=True)):
        weights = v3_attention(attention, config, found) | {"o_proj.weight": attention.o_proj.weight}
        del weights["kv_a_layernorm.weight"]
        state |= {f"layers.{layer}.self_attn.{name}": tensor for name, tensor in weights.items()}
    out = Transformer(config)
    out.load_state_dict(state)
    return out


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_extended_config_is_the_same_function(changes: dict[str, Any], tmp_path: Path):
    model = gqa_model(**changes)
    converted = mla_from_gqa(model, exact_config(model.config))
    torch.testing.assert_close(logits(converted), logits(model), atol=1e-5, rtol=0)
    assert converted.config.cache_width == model.config.cache_width

    prompts, greedy = random_prompts([1, 9, 17]), SamplingParams(temperature=0.0, max_tokens=12)
    wanted = Engine(model, eos_ids=[]).generate(prompts, greedy)
    for invariant in (False, True):
        engine = Engine(converted, eos_ids=[], invariant=invariant)
        assert [c.ids for c in engine.generate(prompts, greedy)] == [c.ids for c in wanted]

    save_checkpoint(tmp_path / "out", converted, None)
    again = load_checkpoint(tmp_path / "out")
    assert again.config == converted.config and model_type(again.config) == "abyssal_mla_dense"
    torch.testing.assert_close(logits(again.model), logits(model), atol=1e-5, rtol=0)  # no weight was rounded


def test_the_extended_config_trains_as_the_original_does():
    """The gradient of what both have is the same."""
    model = gqa_model(qkv_bias=True)
    converted = mla_from_gqa(model, exact_config(model.config))
    for m in (model, converted):
        m.logits(m.hidden(IDS_BT)).square().mean().backward()
    theirs = dict(model.named_parameters())
    for name, p in converted.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
        if name in theirs and ".self_attn." not in name:
            torch.testing.assert_close(p.grad, theirs[name].grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"rope_scaling": YARN}])
def test_mixing_keys_alone_changes_nothing(changes: dict[str, Any]):
    """RoPE commutes with what is complex-linear over KV heads."""
    model = gqa_model(**changes)
    converted = mla_from_gqa(model, exact_config(model.config))
    mlas = [module for module in converted.modules() if isinstance(module, MLA)]
    for mla, attention, found in zip(mlas, attentions(model), statistics_of(model), strict=True):
        basis = key_basis(found, importance(attention, found)[0])
        assert (basis.into_PGG - torch.eye(basis.into_PGG.shape[-1])).abs().max() > 0.1
        basis = basis._replace(kept=model.config.num_key_value_heads)
        mla.load_state_dict(exact_attention(attention, converted.config, basis), strict=False)
    torch.testing.assert_close(logits(converted), logits(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [
    {}, {"num_key_value_heads": 4}, {"rope_scaling": LLAMA3}, {"rope_scaling": YARN},
    {"qkv_bias": True, "rope_theta": 1e5},
])  # fmt: skip
def test_where_heads_share_a_key_and_values_are_few_the_v3_shape_loses_nothing(changes: dict[str, Any]):
    """One frequency's keys fall into the one that stays rotary, values into a latent of their rank (and one constant).

    Biases are no multiples of each other: they need all places.
    """
    model = with_one_key(gqa_model(**changes), value_rank=5)
    if model.config.qkv_bias:
        for attention in attentions(model):
            attention.k_proj.bias.data.zero_()
    latent = 7 if model.config.qkv_bias else 6
    torch.testing.assert_close(logits(without_norm(model, latent)), logits(model), atol=1e-4, rtol=0)


def test_a_wider_latent_is_never_worse():
    model = gqa_model()
    found = statistics_of(model)[0]
    errors = [error_of(model, found, latent=latent) for latent in (3, 7, 13, 19, 25)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0], errors


@torch.no_grad()
def error_of(model: Transformer, found: AttentionStatistics, *, latent: int) -> float:
    """Of the first layer's attention in the V3 shape without a norm, as a share of what it says."""
    config = replace(v3_config(model.config, latent=latent), latent_norm=False)
    [attention, *_] = attentions(model)
    weights = v3_attention(attention, config, found) | {"o_proj.weight": attention.o_proj.weight}
    del weights["kv_a_layernorm.weight"]
    mla = MLA(config, 0)
    mla.load_state_dict(weights)
    x_BTD, context = next(layer_inputs(model, TEXT_BT)).attention_BTD, model.context(TEXT_BT)
    wanted = attention(x_BTD, context)
    return float((mla(x_BTD, context) - wanted).square().mean() / wanted.square().mean())


def test_keys_that_lose_their_rotation_keep_its_mean():
    """Slow pairs, nothing compressed: rotation alone is lost. The mean turn of the distances at which heads look is
    nearer to it than none, than its length, and than the turn the other way."""
    model = gqa_model(rope_scaling=RopeScaling(kind="linear", factor=8.0))
    found = statistics_of(model)[0]
    turns = (found.turn_HP, torch.ones_like(found.turn_HP), found.turn_HP.abs() + 0j, found.turn_HP.conj())
    errors = [error_of(model, found._replace(turn_HP=turn_HP), latent=25) for turn_HP in turns]
    assert errors[0] < 0.8 * min(errors[1:]), errors


def test_a_latent_keeps_what_the_output_is_made_of(monkeypatch: pytest.MonkeyPatch):
    """One KV head is hardly heard in the output, the queries of the other are quiet: a PCA that knows does better."""
    model = gqa_model()
    with torch.no_grad():
        attentions(model)[0].o_proj.weight[:, :16] *= 0.1
        attentions(model)[0].q_proj.weight[16:] *= 0.3
    found = statistics_of(model)[0]
    knowing = error_of(model, found, latent=7)
    alike = torch.eye(8).double().expand(2, 8, 8)
    monkeypatch.setattr(mla_from_gqa_module, "importance", lambda attention, found: (alike, alike))
    assert knowing < 0.5 * error_of(model, found, latent=7)


def test_compression_drops_the_directions_that_matter_least():
    """Two independent numbers, the second larger and of little weight: one place keeps the first."""
    code = compress(torch.diag(torch.tensor([1.0, 4.0])).double(), torch.diag(torch.tensor([1.0, 0.01])).double(), 1)
    kept = code.decode_KC @ code.encode_CK
    torch.testing.assert_close(kept, torch.diag(torch.tensor([1.0, 0.0])).double())
    plain = compress(torch.diag(torch.tensor([1.0, 4.0])).double(), torch.eye(2).double(), 1)
    torch.testing.assert_close(plain.decode_KC @ plain.encode_CK, torch.diag(torch.tensor([0.0, 1.0])).double())


@torch.no_grad()
def test_the_constant_makes_the_norm_a_division_by_nearly_one_number():
    """With norm and constant as without norm."""
    model = with_common_part(with_one_key(gqa_model(), value_rank=5))
    config = v3_config(model.config, latent=6)
    converted = mla_from_gqa(model, config, statistics_of(model))
    attention, first = converted.layers[0].self_attn, next(layer_inputs(model, TEXT_BT)).attention_BTD
    said_BT = attention.kv_a_layernorm(attention.kv_a_proj_with_mqa(first)[..., :6])[..., -1]
    said_BT = said_BT.detach()
    assert abs(float(said_BT.mean()) - 1) < 0.01 and float(said_BT.std()) < 0.01
    wanted = model.layers[0].self_attn(first, model.context(TEXT_BT))
    got = attention(first, model.context(TEXT_BT))
    spread = float((got - wanted).square().mean() / wanted.square().mean()) ** 0.5
    own = attention.kv_a_proj_with_mqa(first)[..., :5].square().mean(-1).sqrt()
    assert spread < 0.5 * float(own.std() / own.mean()), "no better than the norm of the values alone"


def test_the_v3_shape_is_deepseek_v3_in_transformers(tmp_path: Path):
    changes = {"vocab_size": 97, "max_position_embeddings": 96, "tie_word_embeddings": False}
    model = with_common_part(gqa_model(rope_scaling=LLAMA3, **changes))
    converted = mla_from_gqa(model, v3_config(model.config, latent=12), statistics_of(model))
    assert model_type(converted.config) == "deepseek_v3"
    assert_ours_runs_in_theirs(converted, tmp_path / "out")


def test_biases_are_kept_under_a_type_of_ours(tmp_path: Path):
    model = gqa_model(qkv_bias=True)
    converted = mla_from_gqa(model, v3_config(model.config, latent=12), statistics_of(model))
    assert model_type(converted.config) == "abyssal_mla_dense"
    save_checkpoint(tmp_path / "out", converted, None)
    assert load_checkpoint(tmp_path / "out").config == converted.config


@pytest.mark.parametrize("value", [3.0, ["fast"], [-1.0]])
def test_frequencies_that_are_none_are_refused(value: Any):
    written = config_to_hf(exact_config(gqa_model().config))
    assert config_from_hf(json.loads(json.dumps(written))).rope_inv_freq == pytest.approx((1.0, 0.1, 0.01, 0.001) * 2)
    with pytest.raises(ValueError, match="rope_inv_freq=.* is not supported"):
        config_from_hf(written | {"rope_inv_freq": value})


@pytest.mark.parametrize("make, says", [
    (lambda c: exact_config(exact_config(c)), "latent attention already"),
    (lambda c: exact_config(replace(c, qk_norm=True)), "qk_norm=True"),
    (lambda c: exact_config(replace(c, num_nextn_predict_layers=1)), "num_nextn_predict_layers=1"),
    (lambda c: v3_config(c, latent=1), "use 2 to 25"),
    (lambda c: v3_config(c, latent=26), "use 2 to 25"),
    (lambda c: replace(exact_config(c), rope_scaling=LLAMA3), "rope_inv_freq and rope_scaling"),
    (lambda c: replace(exact_config(c), rope_inv_freq=(1.0,)), "1 frequencies"),
    (lambda c: replace(c, latent_norm=False), "belong to attention='mla'"),
])  # fmt: skip
def test_what_cannot_be_converted_says_why(make: Any, says: str):
    config: ModelConfig = gqa_model().config
    with pytest.raises(ValueError, match=says) as error:
        make(config)
    assert "\n" not in str(error.value)
