"""Whose turn it is: shares, priorities, ageing; and what the scheduler makes of it: a step's tokens, who gives way."""

from __future__ import annotations

import numpy as np
import pytest
from small_models import random_prompts, small_model
from test_engine import GREEDY
from test_scheduler import blocks_of, draw, scheduler

from abyssal.engine import Engine, QueueFull
from abyssal.engine.fair_queue import FairQueue
from abyssal.engine.scheduler import Scheduler
from abyssal.engine.sequence import Sequence
from abyssal.types import SamplingParams


def request(request_id: int, root: bytes = b"a", *, priority: int = 0) -> Sequence:
    return Sequence(request_id, [1], SamplingParams(), 32, root=root, priority=priority)


def served(queue: FairQueue, *, cost: int = 10) -> list[int]:
    """The order in which a queue is emptied, where every request costs the same and ends at once."""
    order = []
    while (sequence := queue.head()) is not None:
        queue.tick()
        queue.admitted(sequence)
        queue.charge(sequence, cost)
        queue.leave(sequence)
        order.append(sequence.request_id)
    return order


def test_one_request_is_served_beside_a_thousand_of_another():
    queue = FairQueue()
    for i in range(1000):
        queue.join(request(i))
    queue.join(request(1000, b"b"))
    assert served(queue)[:3] == [0, 1000, 1]


def test_namespaces_get_equal_tokens_not_equal_turns():
    queue = FairQueue()
    for i in range(40):
        queue.join(request(i, b"long" if i % 2 else b"short"))
    tokens = {b"long": 0, b"short": 0}
    while len(queue) > 10:
        sequence = queue.head()
        queue.admitted(sequence)
        n = 30 if sequence.root == b"long" else 10
        queue.charge(sequence, n)
        tokens[sequence.root] += n
        if len({s.root for s in queue}) == 2:
            assert abs(tokens[b"long"] - tokens[b"short"]) <= 30  # never more than one turn apart
    assert min(tokens.values()) >= 190


def test_who_pauses_saves_up_no_turns_and_loses_no_debt():
    queue = FairQueue()
    first = request(0, b"idle")
    queue.join(first)
    for i in range(1, 30):
        queue.join(request(i, b"busy"))
    for _ in range(20):
        sequence = queue.head()
        queue.admitted(sequence)
        queue.charge(sequence, 10)
        if sequence.root == b"idle":
            queue.leave(sequence)
    for i in range(30, 40):
        queue.join(request(i, b"idle"))
    order = served(queue)
    assert order[:4] == [20, 30, 21, 31]  # in turn, not ten of the late ones first
    again = FairQueue()
    again.join(request(0, b"greedy"))
    again.join(request(1, b"other"))
    greedy = again.head()
    again.admitted(greedy)
    again.charge(greedy, 500)
    again.leave(greedy)  # nothing of it is under way, and it owes
    again.join(request(2, b"greedy"))
    again.join(request(3, b"other"))
    assert served(again) == [1, 3, 2]


def test_namespaces_that_come_once_leave_nothing_behind():
    queue = FairQueue()
    queue.join(request(0, b"busy"))
    for i in range(1, 2000):
        visitor = request(i, b"%d" % i)
        queue.join(visitor)
        queue.remove(visitor)
        queue.leave(visitor)
    assert len(queue._spaces) < 100


def test_what_is_computed_again_is_paid_once():
    queue = FairQueue()
    one = request(0)
    queue.join(one)
    queue.charge(one, 50)
    queue.charge(one, 20)
    queue.charge(one, 60)
    assert queue._spaces[b"a"].served == 60


def test_a_higher_priority_goes_first_and_a_lower_one_is_never_forgotten():
    queue = FairQueue(ageing_steps=5)
    for i in range(30):
        queue.join(request(i, b"%d" % (i % 3), priority=1))
    for i in range(30, 33):
        queue.join(request(i, b"low"))
    order = served(queue)
    assert [order.index(i) for i in (30, 31, 32)] == [5, 11, 17]  # every fifth step that passed them over
    strict = FairQueue()
    for i, priority in enumerate((0, -3, 2, 0, 2)):
        strict.join(request(i, priority=priority))
    assert served(strict) == [2, 4, 0, 3, 1]


def test_who_lost_what_was_computed_goes_before_its_equals_and_after_its_betters():
    queue = FairQueue()
    high, poor, rich, back = request(0, priority=1), request(1, b"poor"), request(2, b"rich"), request(3, b"rich")
    for sequence in (high, poor, rich, back):
        queue.join(sequence)
    queue.charge(rich, 100)
    queue.turn_back(back)
    assert served(queue) == [0, 3, 1, 2]


# ---- the scheduler's part ----


def prefilled(s: Scheduler) -> list[tuple[int, int, int]]:
    """(request, start, length) of a step's prompts."""
    waiting = {id(x.prefix): x.request_id for x in s.waiting}
    admission = s.admit()
    s.computed(admission)
    return [(waiting[id(prefix)], chunk.start, len(chunk.ids)) for prefix, chunk in admission.prefills]


def add_for(s: Scheduler, prompt: list[int], request_id: int, *, root: bytes = b"", priority: int = 0) -> Sequence:
    sequence = Sequence(request_id, prompt, SamplingParams(), 32, root=root, priority=priority)
    s.add(sequence)
    return sequence


def test_a_short_prompt_comes_between_the_chunks_of_a_long_one():
    s = scheduler(prefill_chunk=4)
    long, other, short = random_prompts([20, 18, 3])
    add_for(s, long, 0)
    add_for(s, other, 1)
    assert prefilled(s) == [(0, 0, 4)]
    add_for(s, short, 2, root=b"b")
    # it begins where the long one's namespace was, which has been served since
    assert prefilled(s) == [(0, 4, 4)]
    assert prefilled(s) == [(2, 0, 3), (0, 8, 1)]
    assert prefilled(s) == [(0, 9, 4)]


def test_a_step_computes_no_more_than_its_tokens():
    s = scheduler(n_rows=4, step_tokens=8)
    prompts = random_prompts([10, 3, 9])
    first = add_for(s, prompts[0], 0)
    for i in (1, 2):
        add_for(s, prompts[i], i, root=b"%d" % i)
    # one token of each step is for the answer that may begin in it
    seen = []
    for _ in range(4):
        n_before = len(s.rows.active)
        chunks = prefilled(s)
        seen.append(sum(n for _, _, n in chunks) + len(s.rows.active))
        assert seen[-1] + s.n_left == 8 and len(s.rows.active) >= n_before
        draw(s)
    assert max(seen) <= 8 and len(s.rows.active) == 3 and first.row is not None


def test_drafts_get_what_is_left_of_tokens_answers_and_blocks():
    s = scheduler(n_rows=3, n_blocks=6, step_tokens=10)
    for i, prompt in enumerate(random_prompts([3, 5, 4])):
        add_for(s, prompt, i)
    s.admit()
    s.rows.length_R[s.rows.active] += 1
    rows_B = s.grow()
    assert s.n_left == 10 - (3 + 1) - (5 + 1) and len(rows_B) == 2  # the last prompt must wait for tokens
    s.n_left = 5
    wanted_B = np.array([3, 3])
    assert s.fit_drafts(rows_B, wanted_B).tolist() == [2, 2] and s.n_left == 1  # five tokens do not go three ways each
    assert blocks_of(s, s.rows.sequence_in(0))[1] > 0  # its four slots were full
    s.n_left = 50
    s.pool.take(s.pool.n_free)
    assert s.fit_drafts(rows_B, wanted_B * 9).tolist() == [4, 2]  # to the end of the blocks they have
    s.rows.limit_R[rows_B] = [5, 8]
    assert s.fit_drafts(rows_B, wanted_B).tolist() == [0, 1] and wanted_B.tolist() == [3, 3]


def test_a_long_prompt_that_waits_for_blocks_is_not_overtaken():
    s = scheduler(n_blocks=9, n_rows=3)
    running = add_for(s, random_prompts([15])[0], 0)
    s.admit()
    long = add_for(s, random_prompts([18], seed=1)[0], 1, root=b"b")
    later = [add_for(s, p, 2 + i, root=b"c%d" % i) for i, p in enumerate(random_prompts([2, 2, 2], seed=2))]
    for _ in range(3):
        assert not s.admit().placed
    s.remove(running)
    assert [x for x, _ in s.admit().placed][0] is long
    assert all(x.row is None or x.row != long.row for x in later)


def test_of_two_that_run_the_lower_priority_gives_way_and_then_the_younger():
    s = scheduler(n_blocks=7, n_rows=3)
    prompts = random_prompts([6, 7, 7])
    low, high, young = (add_for(s, p, i, priority=int(i > 0)) for i, p in enumerate(prompts))
    s.admit()
    s.rows.length_R[s.rows.active] += 1
    draw(s, 2)
    assert low.row is None and high.row is not None and young.row is not None
    draw(s, 8)
    assert high.row is not None and young.row is None


def test_a_prompt_kept_for_a_higher_priority_outlasts_a_lower_one_that_runs():
    s = scheduler(n_blocks=6, prefill_chunk=4)
    low = add_for(s, random_prompts([4])[0], 0)
    prefilled(s)
    waiting = add_for(s, random_prompts([9], seed=1)[0], 1, priority=1)
    assert prefilled(s) == [(1, 0, 4)]  # it holds three blocks of five
    s.rows.length_R[low.row] = 5
    draw(s, 4)
    assert low.row is not None and s.pool.n_free == 0
    draw(s)
    assert low.row is None and waiting.prefix.n_computed == 4
    # as an equal it gives way itself
    s = scheduler(n_blocks=6, prefill_chunk=4)
    low = add_for(s, random_prompts([4])[0], 0)
    prefilled(s)
    waiting = add_for(s, random_prompts([9], seed=1)[0], 1)
    prefilled(s)
    s.rows.length_R[low.row] = 5
    draw(s, 5)
    assert low.row is not None and waiting.prefix.blocks is None


def ends(engine: Engine) -> list[int]:
    """Requests in the order in which they end."""
    order = []
    while engine.n_unfinished:
        order += [request for request, _ in engine.step()]
    return order


def test_who_asks_once_does_not_wait_for_who_asks_a_hundred_times():
    engine = Engine(small_model(), eos_ids=[], max_batch=2)
    params = SamplingParams(max_tokens=3)
    [prompt] = random_prompts([5])
    many = [engine.add(prompt, params, namespace="many") for _ in range(100)]
    once = engine.add(prompt, params, namespace="once")
    urgent = engine.add(prompt, params, namespace="many", priority=1)
    order = ends(engine)
    assert order == [urgent, once, *many]  # the urgent one was served to "many"


def test_the_low_wait_no_longer_than_ageing_says_however_many_high_ones_come():
    engine = Engine(small_model(), eos_ids=[], max_batch=1)
    engine._scheduler.waiting.ageing_steps = 6
    params = SamplingParams(max_tokens=2)  # one step each
    [prompt] = random_prompts([5])
    low = engine.add(prompt, params, priority=-1)
    n_steps, done = 0, set()
    while low not in done:
        engine.add(prompt, params, priority=1)
        done |= {request for request, _ in engine.step()}
        n_steps += 1
    assert n_steps == 6


def test_a_full_queue_says_so_and_takes_nothing():
    engine = Engine(small_model(), eos_ids=[], max_batch=1, max_waiting=2)
    prompts = random_prompts([3, 4, 5, 6])
    for prompt in prompts[:2]:
        engine.add(prompt, GREEDY)
    with pytest.raises(QueueFull, match="2 requests wait already, and max_waiting=2"):
        engine.add(prompts[2], GREEDY)
    assert engine.n_unfinished == 2
    engine.step()  # one runs now
    engine.add(prompts[2], GREEDY)
    assert engine.n_unfinished == 3
    with pytest.raises(ValueError, match="step_tokens=4 leaves no token for prompts beside max_batch=4"):
        Engine(small_model(), eos_ids=[], max_batch=4, step_tokens=4)
