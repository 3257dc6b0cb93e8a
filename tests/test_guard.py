"""A request that cannot be computed or drawn ends alone, with its error; the others' tokens are as ever."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import N_VOCAB, random_prompts, small_model
from test_engine import same

import abyssal.engine.drawing
from abyssal.engine import Engine
from abyssal.engine.draft import Drafts
from abyssal.engine.isolation import isolate
from abyssal.types import RequestError, SamplingParams

POISON = N_VOCAB - 1  # the id whose embedding is no number
KINDS = ["mla_moe", "gqa_dense"]


def poisoned(kind: str = "mla_moe", **changes: object):
    model = small_model(kind, tie_word_embeddings=False, **changes)
    with torch.no_grad():
        model.embed_tokens.weight[POISON] = float("nan")
    return model


def prompts_of(lengths: list[int]) -> list[list[int]]:
    return [[i % POISON for i in prompt] for prompt in random_prompts(lengths)]


def all_free(engine: Engine) -> bool:
    return engine.n_free_blocks == engine._scheduler.pool.n_usable and engine.n_unfinished == 0


def run(engine: Engine, prompts, each):
    order = [engine.add(prompt, own) for prompt, own in zip(prompts, each, strict=True)]
    done = {}
    while engine.n_unfinished:
        done |= dict(engine.step())
    return [done[request] for request in order]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{"native": False}, {"prefix_cache": True, "prefill_chunk": 6}, {"max_batch": 3},
                                      {"native": False, "prefix_cache": True}])
def test_a_prompt_that_gives_no_numbers_ends_alone(kind: str, settings: dict):
    """At its beginning, in its middle and twice; its neighbours are prefilled beside it, in the same steps."""
    model = poisoned(kind)
    prompts = prompts_of([5, 20, 9, 14, 3, 30, 20])
    each = [SamplingParams(max_tokens=12, seed=i) for i in range(len(prompts))]
    clean = Engine(model, eos_ids=[], vocab_size=POISON)  # nobody draws it by chance
    want = [clean.generate([p], [own])[0] for p, own in zip(prompts, each, strict=True)]
    bad = {1: 0, 3: 7, 6: 0}
    for place, position in bad.items():
        prompts[place] = [*prompts[place][:position], POISON, *prompts[place][position + 1 :]]
    engine = Engine(model, eos_ids=[], block_size=8, vocab_size=POISON, **settings)
    completions = run(engine, prompts, each)
    for place, completion in enumerate(completions):
        if place in bad:
            assert completion.finish_reason == "error" and "logits are not finite for this" in completion.error
            assert completion.ids == []
        else:
            assert completion.error is None
            same([completion], [(want[place].ids, want[place].logps)])
    assert all_free(engine)
    # nobody finds what was left behind, in the cache or in a block
    again = run(engine, [prompts[1], *prompts[:1]], [each[1], each[0]])
    assert again[0].finish_reason == "error" and again[1].ids == want[0].ids
    assert all(store.isfinite().all() for store in engine._runner._cache)


@pytest.mark.parametrize("kind, speculate", [("mla_moe", "off"), ("gqa_dense", 3), ("mla_moe_query_latent", 2)])
@pytest.mark.parametrize("native", [None, False])
def test_an_id_that_gives_no_numbers_ends_the_answer_that_drew_it(kind: str, speculate, native: bool | None):
    model = poisoned(kind)
    prompts = prompts_of([5, 9, 14, 9])
    never, always = {POISON: -100.0}, {POISON: 100.0}
    each = [SamplingParams(max_tokens=12, seed=i, logit_bias=never) for i in range(4)]
    want = Engine(model, eos_ids=[]).generate(prompts, each)
    each[1] = replace(each[1], logit_bias=always)
    engine = Engine(model, eos_ids=[], block_size=8, n_blocks=20, speculate=speculate, native=native)
    completions = run(engine, prompts, each)
    assert completions[1].ids == [POISON] and completions[1].finish_reason == "error"
    for place in (0, 2, 3):
        same(completions[place : place + 1], [(want[place].ids, want[place].logps)])
    # the same blocks again, without another look at anybody; a draft may have left something behind
    alone = engine._guard.alone
    engine._guard.alone = None if speculate == "off" else alone
    each[1] = replace(each[1], logit_bias=never)
    same(run(engine, prompts, each), [(c.ids, c.logps) for c in want])
    engine._guard.alone = alone
    assert all_free(engine)


@pytest.mark.parametrize("way", [{}, {"repetition_penalty": 1.2}])
def test_a_draft_that_gives_no_numbers_is_nobodys_end(way: dict):
    """It is computed, and what it leaves in the cache stands where nobody is yet."""
    model = poisoned("gqa_dense")
    prompts = prompts_of([8, 3])
    each = [SamplingParams(max_tokens=10, seed=i, **way) for i in range(2)]
    want = Engine(model, eos_ids=[], vocab_size=POISON).generate(prompts, each)
    engine = Engine(model, eos_ids=[], vocab_size=POISON, block_size=8, speculate=3)
    engine._speculation.drafter.draft = lambda rows_B, room_B: Drafts(
        np.full((len(rows_B), 3), POISON), np.minimum(room_B, 3)
    )
    same(engine.generate(prompts, each), [(c.ids, c.logps) for c in want])
    assert engine.draft_stats.n_drafted > 10 and all_free(engine)


def test_siblings_of_a_broken_prompt_end_with_it_and_others_wait_no_longer():
    model = poisoned()
    [good, bad] = prompts_of([9, 16])
    bad[3] = POISON
    params = SamplingParams(max_tokens=5)
    engine = Engine(model, eos_ids=[], block_size=8, max_batch=2, vocab_size=POISON)
    completions = run(engine, [bad, bad, bad, good], [replace(params, seed=i) for i in range(4)])
    assert [c.finish_reason for c in completions] == ["error"] * 3 + ["length"]
    [want] = Engine(model, eos_ids=[], vocab_size=POISON).generate([good], [replace(params, seed=3)])
    assert completions[3].ids == want.ids
    assert all_free(engine)


def test_an_invariant_engine_keeps_the_bits_of_the_others():
    model = poisoned()
    prompts = prompts_of([5, 9, 14])
    each = [SamplingParams(max_tokens=8, seed=i, logit_bias={POISON: -100.0}) for i in range(3)]
    want = Engine(model, eos_ids=[], invariant=True).generate(prompts, each)
    each[1] = replace(each[1], logit_bias={POISON: 100.0})
    found = Engine(model, eos_ids=[], invariant=True).generate(prompts, each)
    assert found[1].finish_reason == "error"
    assert [(c.ids, c.logps) for c in (found[0], found[2])] == [(c.ids, c.logps) for c in (want[0], want[2])]


def test_an_entry_that_went_bad_by_itself_is_computed_again():
    """As a bit flipped in memory: nobody's fault, and nobody's end."""
    model = small_model()
    prompts = random_prompts([20, 9])
    each = [SamplingParams(max_tokens=12, seed=i) for i in range(2)]
    want = Engine(model, eos_ids=[]).generate(prompts, each)
    engine = Engine(model, eos_ids=[], block_size=8)
    order = [engine.add(p, own) for p, own in zip(prompts, each, strict=True)]
    engine.step()
    row = engine._sequences[order[0]].row
    engine._runner._cache[1][int(engine._rows.blocks_of(row)[1]) * 8 + 2] = float("inf")
    done = {}
    while engine.n_unfinished:
        done |= dict(engine.step())
    same([done[i] for i in order], [(c.ids, c.logps) for c in want])


def raising(work, is_bad, error):
    """`work`, but it raises where its first argument holds the bad one."""

    def worked(*args, **kwargs):
        if is_bad(args[0]):
            raise error
        return work(*args, **kwargs)

    return worked


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_computation_that_raises_ends_the_one_to_blame(stage: str):
    model = small_model()
    prompts = prompts_of([5, 9, 14, 3, 7])
    each = [SamplingParams(max_tokens=10, seed=i) for i in range(5)]
    want = Engine(model, eos_ids=[]).generate(prompts, each)
    engine = Engine(model, eos_ids=[], block_size=8, prefix_cache=True)
    runner, error = engine._runner, MemoryError("you tried\nto allocate 3 TB")
    if stage == "prefill":
        runner.prefill = raising(runner.prefill, lambda chunks: any(len(c.ids) == 14 for c in chunks), error)
    else:
        ids = [*prompts[2], *want[2].ids][:20]  # it has drawn six
        runner.decode = raising(runner.decode, lambda ids_BT: (ids_BT[:, 0] == ids[-1]).any(), error)
        each = [own if i == 2 else replace(own, logit_bias={ids[-1]: -100.0}) for i, own in enumerate(each)]
        want = [Engine(model, eos_ids=[]).generate([p], [own])[0] for p, own in zip(prompts, each, strict=True)]
    completions = run(engine, prompts, each)
    for place, completion in enumerate(completions):
        if place == 2:
            assert completion.error == "MemoryError: you tried to allocate 3 TB"
            assert completion.ids == want[2].ids[: len(completion.ids)]
            assert completion.ids == [] if stage == "prefill" else completion.ids[-1] == ids[-1]
        else:
            same([completion], [(want[place].ids, want[place].logps)])
    assert all_free(engine)


def test_a_sampler_that_raises_for_one_row_ends_that_row(monkeypatch: pytest.MonkeyPatch):
    model = small_model()
    prompts = random_prompts([5, 9, 14, 3, 7])
    each = [SamplingParams(max_tokens=10, seed=i, top_k=3 if i == 3 else 0) for i in range(5)]
    want = Engine(model, eos_ids=[]).generate(prompts, each)
    sample, calls = abyssal.engine.drawing.sample, []

    def broken(logits_BV, positions_B, how, **kwargs):
        calls.append(len(positions_B))
        if ((how.top_k_B == 3) & (positions_B == 3 + 4)).any():
            raise IndexError("top-k out of range")
        return sample(logits_BV, positions_B, how, **kwargs)

    monkeypatch.setattr(abyssal.engine.drawing, "sample", broken)
    completions = run(Engine(model, eos_ids=[]), prompts, each)
    assert completions[3].error == "IndexError: top-k out of range" and completions[3].ids == want[3].ids[:4]
    same([*completions[:3], completions[4]], [(c.ids, c.logps) for c in (*want[:3], want[4])])
    assert sorted(set(calls)) == [1, 2, 3, 4, 5] and len(calls) == 10 + 6  # halves, once


def test_ctrl_c_is_nobodys_error_and_nothing_is_lost():
    model = small_model()
    prompts = random_prompts([5, 9, 14])
    each = [SamplingParams(max_tokens=4 + 4 * i, seed=i, repetition_penalty=1.2, top_logprobs=2) for i in range(3)]
    want = Engine(model, eos_ids=[]).generate(prompts, each)
    for n_calls in (1, 2, 6):
        engine = Engine(model, eos_ids=[], block_size=8)
        order = [engine.add(p, own) for p, own in zip(prompts, each, strict=True)]
        drew, n = engine._rows.penalties.drew, 0

        def interrupted(*args, drew=drew, n_calls=n_calls):
            nonlocal n
            n += 1
            if n == n_calls:
                raise KeyboardInterrupt
            drew(*args)

        engine._rows.penalties.drew = interrupted
        done = {}
        while engine.n_unfinished:
            try:
                done |= dict(engine.step())
            except KeyboardInterrupt:
                continue
        assert n > n_calls
        same([done[i] for i in order], [(c.ids, c.logps) for c in want])
        assert all(len(done[i].top_logprobs) == len(done[i].ids) for i in order)


def test_an_answer_that_was_drawn_whole_when_ctrl_c_came_is_handed_out():
    model = small_model()
    prompts = random_prompts([5, 9, 14])
    each = [SamplingParams(max_tokens=4, seed=i) for i in range(3)]
    want = Engine(model, eos_ids=[]).generate(prompts, each)
    engine = Engine(model, eos_ids=[])
    order = [engine.add(p, own) for p, own in zip(prompts, each, strict=True)]
    finish, ended = engine._finish, []

    def interrupted(*args):
        ended.append(args)
        if len(ended) == 2:  # one is out, two have their last id
            raise KeyboardInterrupt
        return finish(*args)

    engine._finish = interrupted
    with pytest.raises(KeyboardInterrupt):
        for _ in range(9):
            engine.step()
    done = dict(engine.step())
    assert [done[i].ids for i in order] == [c.ids for c in want] and all_free(engine)
    assert {done[i].finish_reason for i in order} == {"length"}


def test_weights_that_give_no_numbers_end_all_and_the_engine_goes_on():
    model = small_model()
    engine = Engine(model, eos_ids=[])
    prompts, params = random_prompts([10, 20]), SamplingParams(max_tokens=5)
    want = engine.generate(prompts, params)
    weight = model.layers[1].self_attn.o_proj.weight
    saved = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    engine.load_weights(model)
    for completion in engine.generate(prompts, params):
        assert completion.finish_reason == "error"
        with pytest.raises(RequestError, match="if all others end so too, load other weights"):
            completion.checked()
    with torch.no_grad():
        weight.copy_(saved)
    engine.load_weights(model)
    same(engine.generate(prompts, params), [(c.ids, c.logps) for c in want])
    assert want[0].checked() is want[0] and all_free(engine)


@pytest.mark.parametrize("bad", [set(), {0}, {6}, {2, 3}, {0, 1, 2, 3, 4, 5, 6}])
def test_isolate_does_the_rest_in_order_and_names_each_failure(bad: set):
    def work(places: np.ndarray) -> list[int]:
        if bad & set(places.tolist()):
            raise ValueError(f"one of\n{len(places)}")
        return places.tolist()

    done, errors = isolate(7, work)
    assert [place for part in done for place in part] == [place for place in range(7) if place not in bad]
    assert errors == dict.fromkeys(bad, "ValueError: one of 1")


def test_isolate_lets_ctrl_c_through():
    def work(places: np.ndarray) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        isolate(3, work)
