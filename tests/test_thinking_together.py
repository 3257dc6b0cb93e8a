"""Budgets together with drafts, structures, stop strings, penalties and preemption: exact, and nobody sees another."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

import pytest
from small_models import thinking_model
from test_speculation import same_completions, scripted

from abyssal.engine import Engine
from abyssal.engine.grammar import Grammars
from abyssal.engine.stream_text import StreamText, text_of
from abyssal.engine.vocabulary import Vocabulary
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.chat import LANDING, landing_ids
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import SamplingParams, Structure, ThinkingLimits

TEXTS = ["one plus two is three", "time is up; the answer follows", "所以 12"] * 20
TOKENIZER = Tokenizer(train_bpe(TEXTS, vocab_size=400))
WORDS = Vocabulary.of(TOKENIZER)
LAST = landing_ids(TOKENIZER, LANDING)
KINDS = ["mla_moe_query_latent", "gqa_dense_norms"]  # drafts by MTP, and by prompt look-up
DIGITS = Structure(kind="regex", value="[0-9]{3}")


class Ask(NamedTuple):
    prompt: list[int]
    params: SamplingParams
    limits: ThinkingLimits | None


def asks() -> list[Ask]:
    """Free ones, cut ones, structured ones; prompts that open the thinking, and one that closes it."""
    assistant, think, closed = TOKENIZER.assistant_id, TOKENIZER.think_id, TOKENIZER.end_think_id
    n = len(LAST)
    cases = [
        (None, None, [assistant]), (0, None, [assistant]), (5, None, [assistant, think]), (n, None, [assistant]),
        (n + 7, None, [assistant, think]), (n + 9, DIGITS, [assistant]), (4, DIGITS, [assistant, think]),
        (None, DIGITS, [assistant, closed]), (n + 3, Structure(kind="json"), [assistant]),
    ]  # fmt: skip
    return [
        Ask([*TOKENIZER.encode("one plus"), *end],
            SamplingParams(max_tokens=n + 30, seed=i, temperature=0.0 if i % 4 == 3 else 1.0, structure=structure,
                           presence_penalty=0.5 if i == 4 else 0.0, stop=("zzzz",) if i == 2 else ()),
            None if budget is None else ThinkingLimits(budget=budget, landing=LAST))
        for i, (budget, structure, end) in enumerate(cases)
    ]  # fmt: skip


def engine_of(model, **options) -> Engine:
    return Engine(model, eos_ids=sorted(TOKENIZER.end_ids), vocabulary=WORDS, grammars=Grammars(TOKENIZER), **options)


def model_of(kind: str):
    never = [TOKENIZER.end_think_id, TOKENIZER.eos_id]
    return thinking_model(kind, opens_behind=TOKENIZER.assistant_id, think=TOKENIZER.think_id, never=never,
                          vocab_size=TOKENIZER.vocab_size, max_position_embeddings=128)


def run(engine: Engine, requests: list[Ask]):
    order = [engine.add(one.prompt, one.params, thinking=one.limits) for one in requests]
    done = {}
    while engine.n_unfinished:
        done |= dict(engine.step())
    assert engine.n_free_blocks == engine._scheduler.pool.n_usable
    return [done[i] for i in order]


@pytest.mark.parametrize("kind", KINDS)
def test_budgets_are_exact_with_drafts_structures_and_neighbours(kind):
    model, requests = model_of(kind), asks()
    engine = engine_of(model)
    alone = [run(engine, [one])[0] for one in requests]
    for one, completion in zip(requests, alone, strict=True):
        assert completion.error is None
        if one.limits is not None:
            ids, budget = completion.ids, one.limits.budget
            inner = ids[ids[0] == TOKENIZER.think_id : ids.index(TOKENIZER.end_think_id)]
            assert len(inner) == budget and completion.thinking == (budget, "budget")
            assert inner[-len(LAST):] == list(LAST) or budget < len(LAST)
        if one.params.structure == DIGITS:
            answer = completion.ids[completion.ids.index(TOKENIZER.end_think_id) + 1 if one.limits else 0 :]
            assert re.fullmatch("[0-9]{3}", text_of(answer, WORDS)) and completion.finish_reason == "stop"
    most = 1 if kind == KINDS[0] else 3
    same_completions(run(engine, requests), alone, tolerance=2e-5)
    for options in ({"speculate": most}, {"speculate": most, "n_blocks": 14, "block_size": 16},
                    {"speculate": "auto", "prefill_chunk": 3}):
        same_completions(run(engine_of(model, **options), requests), alone, tolerance=2e-5)
    drafting = scripted(engine_of(model, speculate=most), alone, 0.7)  # drafts that are often right
    drafting._speculation.drafter.most = most
    same_completions(run(drafting, requests), alone, tolerance=2e-5)
    assert drafting.draft_stats.n_accepted > 10


@pytest.mark.parametrize("speculate", ["off", 1])
def test_answer_now_takes_effect_with_the_next_ids_whatever_was_drafted(speculate):
    engine = engine_of(model_of(KINDS[0]), speculate=speculate)
    one = asks()[5]  # a structure behind the thinking
    for limits in (ThinkingLimits(landing=LAST), None):
        params = replace(one.params, structure=DIGITS if limits else None)
        request = engine.add(one.prompt, params, thinking=limits)
        for _ in range(4):
            engine.step()
        before = engine.drawn(request)
        assert TOKENIZER.end_think_id not in before and engine.answer_now(request) == "closing"
        done = {}
        while engine.n_unfinished:
            done |= dict(engine.step())
        ids = done[request].ids
        last = [*(LAST if limits else ()), TOKENIZER.end_think_id]
        assert ids[: len(before) + len(last)] == before + last
        if limits:
            assert re.fullmatch("[0-9]{3}", text_of(ids[len(before) + len(last):], WORDS))
    closed = asks()[7]
    request = engine.add(closed.prompt, replace(closed.params, structure=replace(DIGITS, may_think=False)))
    assert engine.answer_now(request) == "answering"
    done = {}
    while engine.n_unfinished:
        done |= dict(engine.step())
    assert re.fullmatch("[0-9]{3}", text_of(done[request].ids, WORDS))


def test_what_is_streamed_is_the_whole_also_where_thinking_was_cut():
    engine = engine_of(model_of(KINDS[0]))
    for one in asks()[2:6]:
        request, seen = engine.add(one.prompt, one.params, thinking=one.limits), 0
        stream = StreamText(WORDS, prompt_ids=one.prompt)
        text, done = "", {}
        while request not in done:
            done |= dict(engine.step())
            drawn = done[request].ids if request in done else engine.drawn(request)
            text += "".join(map(stream.feed, drawn[seen:]))
            seen = len(drawn)
        text += stream.end()
        assert text == text_of(done[request].ids, WORDS)
        if one.limits.budget >= len(LAST):
            assert LANDING in text
