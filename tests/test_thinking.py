"""Budgets exact to the token, a soft landing, a minimum, "answer now" and loops: alone and in the engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import N_VOCAB, random_prompts, small_model, thinking_model

from abyssal.engine import Engine
from abyssal.engine.thinking import ThinkingControl, phase_behind, thought
from abyssal.engine.vocabulary import Vocabulary
from abyssal.types import SamplingParams, ThinkingLimits

THINK, END_THINK, EOS, USER = 57, 58, 59, 60
WORDS = Vocabulary(bytes_of=[b"."] * 57 + [b""] * 4, end_ids=frozenset({EOS}),
                   control_ids=frozenset({THINK, END_THINK, EOS, USER}), think_id=THINK, end_think_id=END_THINK)
LANDING = (3, 1, 4)
OPEN, FREE, CLOSED = [USER, 5, THINK], [USER, 5], [USER, 5, END_THINK]


def limits(budget=None, at_least=0, landing=LANDING, stop_loops=True):
    return ThinkingLimits(budget=budget, at_least=at_least, landing=landing, stop_loops=stop_loops)


def play(control, wishes, *, n=40, answer_now_at=None):
    """The ids of an answer whose model would say `wishes`, one after another, where it is free to."""
    ids, wishes = [], iter(wishes)
    while len(ids) < n and EOS not in ids:
        if len(ids) == answer_now_at:
            control.answer_now()
        token = next(wishes, 9)
        if forced := control.forced():
            token = forced[0]
        else:
            allowed_V = np.ones(N_VOCAB, bool)
            if control.mask(allowed_V):
                token = token if allowed_V[token] else int(allowed_V.argmax())
        ids.append(token)
        control.drawn(token)
    return ids


def between(prompt, ids):
    """Plainly counted: ids between the marks, and whether the thinking was closed."""
    start = 0 if prompt == OPEN else 1
    if prompt != OPEN and ids[:1] != [THINK]:
        return None, False
    inner = ids[start:]
    for i, token in enumerate(inner):
        if token in (END_THINK, EOS):
            return i, token == END_THINK
    return len(inner), False


@settings(max_examples=300)
@given(prompt=st.sampled_from([OPEN, FREE, CLOSED]),
       wishes=st.lists(st.sampled_from([*range(8), THINK, END_THINK, EOS]), max_size=30),
       opens=st.booleans(), budget=st.none() | st.integers(0, 20), at_least=st.integers(0, 20),
       landing=st.sampled_from([(), LANDING]), answer_now_at=st.none() | st.integers(0, 25))
def test_no_stream_of_wishes_breaks_a_limit(prompt, wishes, opens, budget, at_least, landing, answer_now_at):
    at_least = 0 if prompt is CLOSED else min(at_least, 20 if budget is None else budget)
    wishes = [THINK, *wishes] if opens else wishes
    control = ThinkingControl(limits(budget, at_least, landing), WORDS, prompt)
    ids = play(control, wishes, answer_now_at=answer_now_at)
    n, closed = between(prompt, ids)
    assert control.report == (n or 0, control.report.closed_by)
    if n is None:
        assert control.report.closed_by is None and control.forced() == [] and not (at_least and answer_now_at is None)
        return
    assert (control.report.closed_by is not None) == closed
    assert budget is None or n <= budget
    if control.report.closed_by == "budget":
        assert n == budget
        fits = len(landing) <= budget
        assert not fits or ids[: ids.index(END_THINK)][-len(landing) or len(ids):] == list(landing)
    if answer_now_at is None:
        assert n >= at_least
    else:  # within one id: the landing and the mark, or what was under way already
        start = 0 if prompt == OPEN else 1
        assert n <= max(answer_now_at - start, 0) + len(landing)
    if control.report.closed_by == "model":
        assert ids == play(ThinkingControl(limits(), WORDS, prompt), ids)  # untouched


def test_a_budget_lands_softly_and_is_used_up_to_the_token():
    ids = play(ThinkingControl(limits(10), WORDS, OPEN), [9] * 7 + [9, 9, 9], n=13)
    assert ids == [9] * 7 + [3, 1, 4, END_THINK, 9, 9]
    assert play(ThinkingControl(limits(3), WORDS, FREE), [THINK, 9], n=6) == [THINK, 3, 1, 4, END_THINK, 9]
    assert play(ThinkingControl(limits(2), WORDS, FREE), [THINK, 7, 8], n=5) == [THINK, 7, 8, END_THINK, 9]  # no room
    assert play(ThinkingControl(limits(0), WORDS, FREE), [THINK, 7], n=3) == [THINK, END_THINK, 9]
    assert play(ThinkingControl(limits(0), WORDS, OPEN), [7], n=2) == [END_THINK, 9]
    assert play(ThinkingControl(limits(0), WORDS, FREE), [7], n=2) == [7, 9]  # it did not want to think


def test_a_minimum_opens_the_thinking_and_holds_its_end_off():
    ids = play(ThinkingControl(limits(at_least=3), WORDS, FREE), [7, END_THINK, EOS, END_THINK, END_THINK, 8], n=6)
    assert ids == [THINK, 0, 0, 0, END_THINK, 8]
    with pytest.raises(ValueError, match="the prompt has closed it; ask with thinking='on'"):
        ThinkingControl(limits(at_least=3), WORDS, CLOSED)


def test_answer_now_is_a_wish_that_says_what_became_of_it():
    control = ThinkingControl(limits(20), WORDS, OPEN)
    for token in (9, 9):
        control.drawn(token)
    assert control.answer_now() == "closing" and control.forced() == [3, 1, 4, END_THINK]
    control.drawn(3)
    assert control.answer_now() == "closing" and control.forced() == [1, 4, END_THINK]  # once is enough
    for token in (1, 4, END_THINK):
        control.drawn(token)
    assert control.report == (5, "answer_now") and control.answer_now() == "answering" and control.forced() == []
    tight = ThinkingControl(limits(4), WORDS, OPEN)  # what is left of the budget is what the landing has
    tight.drawn(9)
    assert tight.answer_now() == "closing" and tight.report == (1, None) and len(tight.forced()) == 4
    unopened = ThinkingControl(limits(), WORDS, FREE)
    assert unopened.answer_now() == "closing" and unopened.forced() == []
    unopened.drawn(THINK)
    assert unopened.forced() == [3, 1, 4, END_THINK]
    assert ThinkingControl(limits(), WORDS, CLOSED).answer_now() == "answering"


def test_thinking_that_turns_in_circles_is_closed_and_an_answer_may_repeat_itself():
    circles = [t for _ in range(60) for t in (11, 12, 13)]
    ids = play(ThinkingControl(limits(), WORDS, OPEN), circles, n=100)
    assert ids[:70] == circles[:64] + [3, 1, 4, END_THINK] + circles[68:70]
    control = ThinkingControl(limits(stop_loops=False), WORDS, OPEN)
    assert play(control, circles, n=100) == circles[:100] and control.report == (100, None)
    answer = ThinkingControl(limits(), WORDS, FREE)
    assert play(answer, circles, n=100) == circles[:100] and answer.report == (0, None)


@pytest.mark.parametrize(("prompt", "phase"), [
    (OPEN, "open"), ([*OPEN, 10], "open"), (CLOSED, "closed"), (FREE, "may open"), ([7], "may open"),
    ([THINK, 4, END_THINK, 5, EOS, USER, 6], "may open"),  # an earlier turn
])
def test_where_an_answer_begins(prompt, phase):
    assert phase_behind(prompt, WORDS) == phase


def test_an_answer_that_nobody_controlled_is_counted_in_the_same_way():
    for prompt, ids in [(OPEN, [1, 2, END_THINK, 3]), (FREE, [THINK, 1, END_THINK, 3]), (FREE, [1, THINK, END_THINK]),
                        (CLOSED, [1, 2]), (OPEN, [1, 2, EOS]), (FREE, [THINK, 1]), (OPEN, []), (FREE, [THINK, EOS]),
                        (CLOSED, [THINK, 1, END_THINK])]:
        control = ThinkingControl(limits(), WORDS, prompt)
        for token in ids:
            control.drawn(token)
        assert thought(prompt, ids, WORDS) == control.report


def thinker(**changes):
    """A model for which thinking is everything: without limits it opens with <think> and never closes."""
    return thinking_model(opens_behind=USER, think=THINK, never=[END_THINK, EOS], **changes)


def run(engine, requests):
    """Completions of (prompt, params, limits), all at once."""
    order = [engine.add(prompt, params, thinking=own) for prompt, params, own in requests]
    done = {}
    while engine.n_unfinished:
        done |= dict(engine.step())
    return [done[i] for i in order]


@pytest.mark.parametrize("options", [{}, {"n_blocks": 10, "block_size": 8}, {"prefill_chunk": 3},
                                     {"prefix_cache": True}, {"invariant": True}],
                         ids=["plain", "preempted", "chunked", "cached", "invariant"])
def test_budgets_are_exact_in_a_batch_and_change_nobody_else(options):
    model = thinker()
    engine = Engine(model, eos_ids=[EOS], vocabulary=WORDS, **options)
    prompts = [[*p, THINK] if i % 2 else [*p, USER] for i, p in enumerate(random_prompts([4, 9, 3, 12, 7, 5]))]
    prompts = [[token % 57 for token in p[:-1]] + p[-1:] for p in prompts]
    each = [SamplingParams(max_tokens=24, seed=i) for i in range(6)]
    alone = run(engine, [(p, own, None) for p, own in zip(prompts, each, strict=True)])
    budgets = [None, 7, 5, None, 0, 12]
    found = run(engine, [(p, own, None if b is None else limits(b))
                         for p, own, b in zip(prompts, each, budgets, strict=True)])
    behind, wanted = [], []
    for free, under, own, budget in zip(alone, found, each, budgets, strict=True):
        assert under.thinking is not None
        if budget is None or free.thinking.n_tokens <= budget - (len(LANDING) if budget >= len(LANDING) else 0):
            assert under.ids == free.ids
            continue
        start = 0 if under.prompt_ids[-1] == THINK else 1
        end = under.ids.index(END_THINK)
        assert end - start == budget == under.thinking.n_tokens and under.thinking.closed_by == "budget"
        landing = len(LANDING) if budget >= len(LANDING) else 0
        assert under.ids[end - landing : end] == list(LANDING)[:landing]
        assert under.ids[: end - landing] == free.ids[: end - landing]  # what it thought is what it would have thought
        behind.append((under.prompt_ids + under.ids[: end + 1], replace(own, max_tokens=24 - end - 1), None))
        wanted.append(under.ids[end + 1 :])
    assert len(wanted) == 4 and all(wanted)
    assert [c.ids for c in run(engine, behind)] == wanted  # and what follows is what the model says behind it
    assert engine.n_free_blocks == engine._scheduler.pool.n_usable


def test_answer_now_takes_effect_with_the_next_ids_in_the_middle_of_a_batch():
    engine = Engine(thinker(), eos_ids=[EOS], vocabulary=WORDS)
    params = SamplingParams(max_tokens=30, seed=5)
    free, other = (c.ids for c in run(engine, [([4, USER], params, None), ([8, 9, USER], params, None)]))
    watched, plain = engine.add([4, USER], params, thinking=limits()), engine.add([8, 9, USER], params)
    for _ in range(5):
        engine.step()
    n = len(engine.drawn(watched))
    assert engine.answer_now(watched) == "closing"
    done = {}
    while engine.n_unfinished:
        done |= dict(engine.step())
    ids = done[watched].ids
    assert 4 < n < 9 and ids[: n + 4] == [*free[:n], *LANDING, END_THINK]
    assert done[watched].thinking == (n - 1 + 3, "answer_now")
    assert done[plain].ids == other and engine.answer_now(watched) == "ended" == engine.answer_now(10**6)
    # a request that never asked for limits, in the middle, waiting, and behind its thinking
    plain = engine.add([4, USER], params)
    for _ in range(5):
        engine.step()
    assert engine.answer_now(plain) == "closing"
    engine.step()
    assert engine.drawn(plain) == [*free[:n], END_THINK] and engine.answer_now(plain) == "answering"
    engine._scheduler.preempt_all()
    assert engine.answer_now(plain) == "answering"
    assert engine.abort(plain).thinking == (n - 1, "answer_now")


def test_a_looping_model_is_stopped():
    model = thinker(max_position_embeddings=256)
    with torch.no_grad():  # 20 -> 21 -> 22 -> 20 ..., and USER -> THINK -> 20
        model.embed_tokens.weight[:, 1:6] = 0.0
        model.lm_head.weight[:, 1:6] = 0.0
        for place, (token, behind) in enumerate([(USER, THINK), (THINK, 20), (20, 21), (21, 22), (22, 20)], start=1):
            model.embed_tokens.weight[token, place] = 30.0
            model.lm_head.weight[behind, place] = 6.0
    engine = Engine(model, eos_ids=[EOS], vocabulary=WORDS)
    greedy = SamplingParams(temperature=0.0, max_tokens=100)
    looping, stopped = run(engine, [([7, USER], greedy, None), ([7, USER], greedy, limits())])
    assert looping.ids == [THINK, *([20, 21, 22] * 40)][:100] and looping.thinking == (99, None)
    assert stopped.ids[:69] == [THINK, *looping.ids[1:65], *LANDING, END_THINK]
    assert stopped.thinking == (67, "loop")


def test_thinking_is_no_burden_once_it_is_over():
    engine = Engine(thinker(), eos_ids=[EOS], vocabulary=WORDS)
    request = engine.add([4, USER], SamplingParams(max_tokens=30), thinking=limits(4))
    steered = []
    drawing, steer = engine._drawing, engine._drawing._steer
    drawing._steer = lambda *rows: steered.append(1) or steer(*rows)
    while engine.n_unfinished:
        engine.step()
    assert len(steered) == 1 + 4 + 1 and request == 0


class Heard:
    """The control of an answer: it forces its first id and remembers what it hears."""

    def __init__(self):
        self.ids = []

    def forced(self):
        return [] if self.ids else [42]

    def mask(self, allowed_V):
        return False

    def drawn(self, token):
        self.ids.append(token)


def test_a_control_of_the_answer_begins_where_the_thinking_ends():
    engine = Engine(thinker(), eos_ids=[EOS], vocabulary=WORDS)
    control = Heard()
    request = engine.add([4, USER], SamplingParams(max_tokens=20, seed=1), control=control, thinking=limits(6))
    done = {}
    while engine.n_unfinished:
        done |= dict(engine.step())
    ids = done[request].ids
    assert ids[0] == THINK and ids[7] == END_THINK and ids[8] == 42 and control.ids == ids[8:]


def test_what_cannot_be_limited_is_refused_with_the_remedy():
    engine, params = Engine(small_model(), eos_ids=[]), SamplingParams()
    with pytest.raises(ValueError, match="knows no marks of thinking"):
        engine.add([1], params, thinking=limits(3))
    unmarked = Vocabulary(bytes_of=[b"."] * N_VOCAB, end_ids=frozenset({EOS}), control_ids=frozenset({EOS}))
    engine = Engine(small_model(), eos_ids=[], vocabulary=unmarked)
    with pytest.raises(ValueError, match="no <think> and </think>"):
        engine.add([1], params, thinking=limits(3))
    assert engine.n_unfinished == 0 and engine.generate([[1]], params)[0].thinking is None
    engine = Engine(small_model(), eos_ids=[], vocabulary=WORDS)
    with pytest.raises(ValueError, match="contains a control token"):
        engine.add([1], params, thinking=limits(9, landing=(3, END_THINK)))
    for options, message in [({"budget": -1}, "budget=-1"), ({"at_least": -1}, "at_least=-1"),
                             ({"budget": 3, "at_least": 4}, "do not fit into budget=3")]:
        with pytest.raises(ValueError, match=message):
            ThinkingLimits(**options)
