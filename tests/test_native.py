"""The native forward pass beside its plain twin: every family, odd widths, MTP modules; what it promises about bits."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from small_models import KINDS, random_prompts, small_model

from abyssal.engine import Engine
from abyssal.engine import native as native_module
from abyssal.engine.native import _library, order_of_sums
from abyssal.engine.runner import Runner
from abyssal.engine.sequence import Chunk
from abyssal.kernels.native_build import NotBuilt
from abyssal.model.config import RopeScaling
from abyssal.model.quantized import quantize_layers
from abyssal.rollout import agreement
from abyssal.types import SamplingParams

BLOCK = 4
TABLES = np.array([[7, 2, 5, 9, 0], [3, 6, 0, 0, 0], [1, 4, 8, 10, 11]])
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.0)
V2 = {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
      "norm_topk_prob": False, "routed_scaling_factor": 1.7, "n_shared_experts": 0}  # fmt: skip
VARIANTS = {
    **{kind: (kind, {}) for kind in KINDS},
    "groups of experts": ("mla_moe", {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "q_lora_rank": 20}),
    "softmax gate, as V2": ("mla_moe", V2),
    "greedy gate": ("mla_moe", {"topk_method": "greedy", "scoring_func": "softmax", "num_experts_per_tok": 3}),
    "experts in every layer": ("mla_moe", {"first_k_dense_replace": 0, "n_shared_experts": 2, "v_head_dim": 12}),
    "MoE under GQA": ("mla_moe", {"attention": "gqa", "num_key_value_heads": 2, "head_dim": 8}),
    "YaRN": ("mla_dense", {"rope_scaling": YARN}),
    "half-split pairs, tied": ("mla_dense", {"rope_interleave": False, "tie_word_embeddings": True}),
    "own latent": ("mla_dense", {"latent_norm": False, "qkv_bias": True, "qk_nope_head_dim": 0, "attention_scale": 0.4,
                                 "rope_inv_freq": (1.0, 0.3, 0.1, 0.02)}),
    "odd widths": ("mla_moe", {"hidden_size": 27, "kv_lora_rank": 19, "qk_nope_head_dim": 5, "qk_rope_head_dim": 6,
                               "v_head_dim": 7, "intermediate_size": 33, "moe_intermediate_size": 11,
                               "n_routed_experts": 6}),
    "many heads on one key": ("gqa_dense", {"num_attention_heads": 13, "num_key_value_heads": 1, "head_dim": 6}),
    "long sums": ("gqa_dense", {"hidden_size": 400, "num_hidden_layers": 1, "initializer_range": 0.04}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def runners(model, **changes):
    settings = {"n_blocks": 12, "block_size": BLOCK, "record_experts": True} | changes
    return Runner(model, native=True, **settings), Runner(model, native=False, **settings)


def walked(run, prompts):
    """Prompts, one in two chunks; then two tokens of each row at once, three of the last. All that was computed."""
    chunks = [Chunk(np.array(p), 0, TABLES[row]) for row, p in enumerate(prompts)]
    head, tail = chunks[2]._replace(ids=chunks[2].ids[:6]), chunks[2]._replace(ids=chunks[2].ids[6:], start=6)
    parts = [*run.prefill([*chunks[:2], head]), *run.prefill([tail])]
    positions_BT = np.array([[len(p)] for p in prompts]) + np.arange(3)
    parts += run.decode(np.array([[5, 6, 0], [7, 8, 0], [9, 10, 11]]), positions_BT, TABLES, np.array([2, 2, 3]))
    experts = [run.experts_at(TABLES[row], len(p) + 2) for row, p in enumerate(prompts)]
    return parts, experts


@pytest.mark.parametrize("name", VARIANTS)
def test_it_equals_the_plain_path(name):
    kind, changes = VARIANTS[name]
    model = small_model(kind, **changes)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, model.config.n_routed_experts))
        elif getattr(module, "bias", None) is not None:  # they begin as zeros
            module.bias.copy_(torch.randn(module.bias.shape, generator=torch.Generator().manual_seed(1)) / 4)
    prompts = random_prompts([12, 3, 17])
    (ours, our_experts), (theirs, their_experts) = (walked(run, prompts) for run in runners(model))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=2e-6 * float(other.abs().max()))
    for one, other in zip(our_experts, their_experts, strict=True):
        assert (one is None) == (model.config.feed_forward == "dense")
        assert one is None or torch.equal(one.sort(-1).values, other.sort(-1).values)


@pytest.mark.parametrize("kind", ["mla_dense", "gqa_dense", "gqa_dense_norms"])
def test_in_bfloat16_it_rounds_where_the_plain_path_does(kind):
    """Attention alone is more exact: what it sums is not rounded on the way. So it is nearer to FP32, if anything."""
    model = small_model(kind, dtype=torch.bfloat16)
    exact = small_model(kind)
    with torch.no_grad():
        for one, other in zip(exact.parameters(), model.parameters(), strict=True):
            one.copy_(other.to(torch.bfloat16))
    prompts = random_prompts([12, 3, 17])
    ours, theirs = (walked(run, prompts)[0] for run in runners(model))
    true = walked(runners(exact)[1], prompts)[0]
    assert all(torch.equal(one, one.bfloat16().float()) for one in ours)  # logits and hidden states are BF16 numbers
    one, other, wanted = (torch.cat([part.float().flatten() for part in parts]) for parts in (ours, theirs, true))
    assert (one - wanted).norm() < 1.2 * (other - wanted).norm() < 0.05 * wanted.norm()


def test_mtp_modules_look_ahead_on_the_same_cache():
    model = small_model("mla_moe_query_latent", num_nextn_predict_layers=2)
    prompts = random_prompts([9, 5])
    found = []
    for run in runners(model, looks_ahead=True):
        chunks = [Chunk(np.array(p), 0, TABLES[row], np.array([1, 2])[: row + 1]) for row, p in enumerate(prompts)]
        hidden_BD = run.prefill(chunks).hidden_XD
        ids_BT, counts_B = np.array([[4, 3], [8, 0]]), np.array([2, 1])
        positions_BT = np.array([[9, 10], [5, 0]])
        hidden_XD = run.decode(ids_BT, positions_BT, TABLES[:2], counts_B).hidden_XD
        for module in (0, 1):
            hidden_XD = run.look_ahead(module, hidden_XD, ids_BT + 1, positions_BT, TABLES[:2], counts_B)
            found += [hidden_XD, run.logits(hidden_XD)]
        found.append(hidden_BD)
    for one, other in zip(found[:5], found[5:], strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind, changes", [("mla_moe_query_latent", {"num_attention_heads": 5}), ("gqa_dense", {})])
def test_the_same_bits_for_every_number_of_threads_and_neighbours(kind, changes):
    """What other tests hold for one thread (`test_invariant.py`), here among two: alone, together, token by token."""
    run, _ = runners(small_model(kind, **changes), n_blocks=40)
    prompts = random_prompts([15, 9, 14, 11, 6, 13], seed=2)
    tables = [np.arange(1 + 4 * i, 5 + 4 * i) for i in range(6)]
    chunks = [Chunk(np.array(p), 0, table) for p, table in zip(prompts, tables, strict=True)]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run.prefill(chunks).logits_XV)
            found.append(torch.cat([run.prefill([chunk]).logits_XV for chunk in chunks]))
        for chunk in chunks:  # the last prompt token of each once more, as a drawn one
            run.prefill([chunk._replace(ids=chunk.ids[:-1])])
        last_B1 = np.array([[p[-1]] for p in prompts]), np.array([[len(p) - 1] for p in prompts])
        found.append(run.decode(*last_B1, np.stack(tables)).logits_XV)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(found[0], other)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "moe" in kind])
def test_prompts_whose_last_layer_is_computed_for_the_wanted_tokens_alone(kind):
    """An expert record needs the last layer of all tokens; without one logits, hidden states and what stays in the
    cache are the same. Passes of 256 tokens: one with two wanted tokens, one with none, one with the last."""
    model = small_model(kind, max_position_embeddings=1024)
    prompts, tables = random_prompts([3, 600]), [np.arange(1, 2), np.arange(2, 152)]
    chunks = [Chunk(np.array(p), 0, table) for p, table in zip(prompts, tables, strict=True)]
    short = Chunk(np.array(prompts[0]), 0, np.arange(152, 153))
    found = []
    for record in (True, False):
        run, _ = runners(model, n_blocks=160, record_experts=record)
        parts = [*run.prefill([chunks[0], short, chunks[1]]), *run.prefill([chunks[1]])]
        found.append([*parts, *run.decode(np.array([[5]]), np.array([[600]]), np.arange(2, 153)[None])])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_engine_and_trainer_agree(kind):
    model = small_model(kind)
    each = [SamplingParams(max_tokens=20, seed=i) for i in range(8)]
    completions = Engine(model, eos_ids=[], native=True).generate(random_prompts([5, 9, 1, 14, 20, 3, 7, 30]), each)
    gap = agreement(model, completions)
    assert gap.n_compared == gap.n_tokens == 160 and gap.max <= 1e-5


@pytest.mark.parametrize("n_inputs", [24, 160, 256, 400, 512, 1408])
def test_linears_sum_as_torch_does(n_inputs):
    """On a machine whose torch sums in another order the gap to the trainer is roundings, and this says so."""
    block = order_of_sums(_library(torch.float32), n_inputs)
    if block is None:
        pytest.skip(f"torch's order of {n_inputs} products is not known on this machine")
    assert block == n_inputs or n_inputs > 128


def test_routers_of_few_experts_sum_as_torch_does():
    found = [order_of_sums(_library(torch.float32), 160, n_outputs=n) for n in (4, 8, 16, 64)]
    if None in found:
        pytest.skip("torch's order of few outputs is not known on this machine")
    assert found[2] == found[3]


def test_what_cannot_be_native_is_said(monkeypatch, capsys):
    model = small_model()
    quantized = small_model("gqa_dense")
    quantize_layers(quantized, "int8")
    assert native_module.native_forward(quantized, block_size=4, native=None) is None
    with pytest.raises(ValueError, match="native=True is not possible here: weights in few bits .*; leave native out"):
        native_module.native_forward(quantized, block_size=4, native=True)
    assert capsys.readouterr().err == ""

    def broken(dtype):
        raise NotBuilt("no C++ compiler is installed; install g++")

    monkeypatch.setattr(native_module, "_library", broken)
    native_module.say_once.cache_clear()
    make = partial(Engine, model, eos_ids=[])
    assert make()._runner._native is None and make()._runner._native is None
    assert capsys.readouterr().err == (
        "the engine computes in plain torch, which is slower: no C++ compiler is installed; install g++\n"
    )
    with pytest.raises(ValueError, match="native=True is not possible here: no C"):
        make(native=True)


def test_a_step_has_the_cores_to_itself_and_gives_them_back(monkeypatch: pytest.MonkeyPatch):
    """Torch computes on one thread inside a step, and on as many as before behind it, also when it raises."""
    engine = Engine(small_model(), eos_ids=[], native=True)
    decode, seen, before = engine._runner.decode, [], torch.get_num_threads()
    monkeypatch.setattr(engine._runner, "decode", lambda *a: (seen.append(torch.get_num_threads()), decode(*a))[1])
    torch.set_num_threads(2)
    try:
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=3))
        assert seen == [1, 1] and torch.get_num_threads() == 2
        monkeypatch.setattr(engine._scheduler, "admit", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
