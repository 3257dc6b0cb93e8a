"""Invariant mode: the same bits alone, among others, after a cache hit, in chunks, after a preemption, in any batch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from small_models import random_prompts, small_model

from abyssal.engine import Engine
from abyssal.engine.runner import Passes
from abyssal.model.attention import KEY_TILE, attend_in_tiles, attend_ref
from abyssal.model.linear import Linear, sigmoid, silu
from abyssal.model.transformer import Transformer
from abyssal.rollout import agreement
from abyssal.types import Completion, SamplingParams

CONTEXT = 192  # three tiles of keys
MODES = [(kind, dtype) for kind in ("mla_moe_query_latent", "gqa_dense") for dtype in (torch.float32, torch.bfloat16)]
[PROMPT] = random_prompts([70], seed=5)
HOW = [
    SamplingParams(temperature=0.0, max_tokens=12),
    SamplingParams(max_tokens=12, seed=11),
    SamplingParams(max_tokens=12, seed=12, temperature=0.7, top_p=0.9, top_k=30, min_p=0.01),
]


def model_of(kind: str, dtype: torch.dtype, *, seed: int = 0) -> Transformer:
    """Widths that fill no vector register: what a kernel does at its end shows. What holds with Qwen3's norms of heads
    holds without them."""
    changes = {"max_position_embeddings": CONTEXT, "num_hidden_layers": 2, "intermediate_size": 51}
    changes |= {"head_dim": 12, "qk_norm": True} if kind == "gqa_dense" else {}
    changes |= {"n_routed_experts": 6} if "moe" in kind else {}
    return small_model(kind, seed=seed, dtype=dtype, **changes)


def others() -> tuple[list[list[int]], list[SamplingParams]]:
    """32 requests of other lengths, prompts and ways to draw, some that begin as PROMPT does."""
    prompts = [*random_prompts([1 + 4 * i for i in range(28)], seed=6), *(PROMPT[: 16 * i] + [i] for i in range(1, 5))]
    return prompts, [
        SamplingParams(max_tokens=1 + i % 14, seed=i, temperature=(0.0, 1.0, 0.6)[i % 3], top_p=(1.0, 0.8)[i % 2])
        for i in range(32)
    ]


def among_others(engine: Engine) -> list[Completion]:
    """PROMPT in the midst of 32 others, once for each of HOW."""
    prompts, each = others()
    n = len(HOW)
    return engine.generate([*prompts[:20], *[PROMPT] * n, *prompts[20:]], [*each[:20], *HOW, *each[20:]])[20 : 20 + n]


def differs(one: list[Completion], other: list[Completion]) -> str:
    """What is not bitwise the same, or nothing."""
    for how, a, b in zip(HOW, one, other, strict=True):
        if a.ids != b.ids or a.logps != b.logps:
            return f"{how}: {a.ids} {a.logps} against {b.ids} {b.logps}"
        if a.experts is not None and not (b.experts is not None and torch.equal(a.experts, b.experts)):
            return f"{how}: other experts"
        if a.drawn_from is not None and not (b.drawn_from is not None and a.drawn_from.logps == b.drawn_from.logps):
            return f"{how}: other log-probs of what was drawn from"
    return ""


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("kind, dtype", MODES)
def test_the_same_bits_whatever_else_happens(kind: str, dtype: torch.dtype, native: bool):
    model = model_of(kind, dtype)
    engine_of = partial(Engine, native=native, invariant=not native)  # the native path is so without being asked
    engine = engine_of(model, eos_ids=[], record_sampling=True)
    assert engine._runner._passes == (None if native else Passes())  # no fallback: long passes are safe here
    alone = [engine.generate([PROMPT], [own])[0] for own in HOW]
    assert len({tuple(c.ids) for c in alone}) == 3  # else little is shown
    assert not differs(alone, among_others(engine))
    chunked = engine_of(model, eos_ids=[], max_batch=9, prefill_chunk=37, block_size=8, record_sampling=True)
    assert not differs(alone, among_others(chunked))
    single = engine_of(model, eos_ids=[], max_batch=3, prefill_chunk=1)
    alone = unrecorded(alone)
    assert not differs(alone, single.generate([PROMPT] * 3, HOW))

    cached = engine_of(model, eos_ids=[], prefix_cache=True, block_size=4)
    cached.generate(*others())
    assert not differs(alone, among_others(cached))
    n_found = cached.prefix_stats.n_found
    assert not differs(alone, [cached.generate([PROMPT], [own])[0] for own in HOW])
    assert cached.prefix_stats.n_found - n_found == 3 * 68

    for prefix_cache in (False, True):
        small = engine_of(model, eos_ids=[], n_blocks=27, block_size=4, prefix_cache=prefix_cache)
        preempted = watched_preemptions(small)
        assert not differs(alone, small.generate([PROMPT] * 3, HOW))
        assert preempted


def unrecorded(completions: list[Completion]) -> list[Completion]:
    return [replace(c, drawn_from=None) for c in completions]


def watched_preemptions(engine: Engine) -> list[int]:
    seen: list[int] = []
    preempt = engine._scheduler.preempt
    engine._scheduler.preempt = lambda sequence: seen.append(sequence.request_id) or preempt(sequence)
    return seen


@pytest.mark.parametrize("kind", ["mla_moe_query_latent", "gqa_dense"])
def test_engine_and_trainer_agree(kind: str):
    engine = Engine(model_of(kind, torch.float32), eos_ids=[], invariant=True, native=False)
    gap = agreement(model_of(kind, torch.float32), engine.generate(*others()))
    assert gap.n_compared == gap.n_tokens == sum(own.max_tokens for own in others()[1]) and gap.n_flipped == 0
    assert gap.max <= 1e-5


def test_the_trainers_model_stays_as_it_is_and_new_weights_are_used():
    model, other = (model_of("mla_moe_query_latent", torch.float32, seed=seed) for seed in (0, 1))
    ids_BT = torch.tensor([PROMPT])
    with torch.no_grad():
        before = model.hidden(ids_BT)
        engine = Engine(model, eos_ids=[], invariant=True, prefix_cache=True, native=False)
        assert torch.equal(model.hidden(ids_BT), before)
    assert engine._runner.model is not model
    assert engine._runner.model.layers[0].self_attn.o_proj.weight is model.layers[0].self_attn.o_proj.weight
    engine.generate([PROMPT], HOW[:1])
    model.load_state_dict(other.state_dict())  # as an optimizer does: in place
    engine.load_weights(model)
    assert not differs(
        engine.generate([PROMPT] * 3, HOW),
        Engine(other, eos_ids=[], invariant=True, native=False).generate([PROMPT] * 3, HOW),
    )


def test_where_longer_passes_change_bits_passes_stay_at_eight(monkeypatch: pytest.MonkeyPatch):
    """A machine whose matrix products depend on the number of rows, made up."""
    plain = Linear.forward

    def by_rows(self: Linear, x: torch.Tensor) -> torch.Tensor:
        n_rows = x.numel() // x.shape[-1]
        return plain(self, x) * (1 + 1e-6 * n_rows)

    monkeypatch.setattr(Linear, "forward", by_rows)
    engine = Engine(model_of("mla_moe_query_latent", torch.float32), eos_ids=[], invariant=True, native=False)
    assert engine._runner._passes == Passes(piece=1, most_tokens=8)
    alone = [engine.generate([PROMPT], [own])[0] for own in HOW]
    assert not differs(alone, among_others(engine))


@pytest.mark.parametrize("n_tokens, heads, groups", [(1, 4, 1), (1, 4, 4), (3, 6, 2), (16, 4, 2)])
def test_attention_in_tiles_is_attention(n_tokens: int, heads: int, groups: int):
    generator = torch.Generator().manual_seed(0)
    n_keys, width = 3 * KEY_TILE, 8
    q, k, v = (
        torch.randn(2, n, h, width, generator=generator, dtype=torch.float64)
        for n, h in ((n_tokens, heads), (n_keys, groups), (n_keys, groups))
    )
    ends = torch.tensor([KEY_TILE + 5, 2 * KEY_TILE - n_tokens])[:, None] + torch.arange(n_tokens)  # third: unseen
    mask_BTS = torch.arange(n_keys) <= ends[..., None]
    found = attend_in_tiles(q, k, v, mask_BTS, scale=0.3)
    assert torch.allclose(found, attend_ref(q, k, v, mask_BTS, scale=0.3), rtol=0, atol=1e-12)
    shorter = attend_in_tiles(q, k[:, :-KEY_TILE], v[:, :-KEY_TILE], mask_BTS[..., :-KEY_TILE], scale=0.3)
    assert torch.equal(found, shorter)  # an unseen tile adds nothing
    for row in range(2):
        one = slice(row, row + 1)
        assert torch.equal(found[one], attend_in_tiles(q[one], k[one], v[one], mask_BTS[one], scale=0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_activation_does_not_see_where_its_tensor_ends(dtype: torch.dtype):
    x = (5 * torch.randn(70_000, generator=torch.Generator().manual_seed(0))).to(dtype)
    for form in (silu, sigmoid):
        whole = form(x, invariant=True)
        assert whole.dtype == form(x, invariant=False).dtype
        assert torch.allclose(whole, form(x, invariant=False), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)
        for start, n in [(0, 1), (3, 7), (100, 31), (1000, 33), (5, 20_001), (1, 66_666)]:
            assert torch.equal(form(x[start : start + n].clone(), invariant=True), whole[start : start + n])
    extreme = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], dtype=dtype)
    assert torch.equal(sigmoid(extreme, invariant=True), torch.tensor([0, 0, 0.5, 1, 1]))
    assert torch.equal(silu(extreme, invariant=True), extreme.clamp(min=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n_in, n_out", [(160, 448), (448, 160), (160, 2048), (24, 64)])
def test_a_linear_gives_a_row_the_same_bits_in_every_multiple_of_eight(n_in: int, n_out: int, dtype: torch.dtype):
    """What the mode rests on; on a machine where this fails the engine falls back to passes of eight."""
    generator = torch.Generator().manual_seed(0)
    x_ND, weight = (torch.randn(n, n_in, generator=generator).to(dtype) for n in (600, n_out))
    eights = torch.cat([torch.nn.functional.linear(x_8D, weight) for x_8D in x_ND.split(8)])
    for n_rows in (16, 24, 40, 104, 128, 200, 384, 600):
        assert torch.equal(torch.nn.functional.linear(x_ND[-n_rows:].clone(), weight), eights[-n_rows:])
