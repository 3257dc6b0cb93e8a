"""Schedules get their times: nothing starts before its input, a lane does one thing at a time, no time is lost."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schedules import pipelines, rank_of

from abyssal.plan.schedules import Work, build_schedule
from abyssal.plan.simulate import StageSeconds, Timeline, run_schedule, simulate, slot_cost

PLAIN = StageSeconds(forward_seconds=1, backward_input_seconds=1, backward_weight_seconds=1)


def test_two_ranks_two_micro_batches_by_hand():
    """F 1, B 2. Rank 0: F0 F1 . B0 . B1; rank 1: . F0 B0 F1 B1: nine units, of which each rank works six."""
    line = simulate("1f1b", n_stages=2, n_micro_batches=2, times=PLAIN)
    assert line.slot_seconds[0] == ((0, 1), (1, 2), (4, 6), (7, 9))
    assert line.slot_seconds[1] == ((1, 2), (2, 4), (4, 5), (5, 7))
    assert (line.step_seconds, line.bubble_seconds) == (9, (3, 3))
    assert line.bubble_share == pytest.approx(1 / 3)


def test_sends_delay_and_are_counted():
    """F0 sent 1..3, so rank 1 starts at 3, having waited 2; its gradient leaves at 6 and arrives at 8."""
    times = replace(PLAIN, send_seconds=2)
    line = simulate("1f1b", n_stages=2, n_micro_batches=1, times=times)
    assert line.slot_seconds == (((0, 1), (8, 10)), ((3, 4), (4, 6)))
    assert line.bubble_seconds == (7, 7)
    assert line.waiting_seconds == line.exposed_communication_seconds == (2, 2)
    assert line.hidden_communication_seconds == (0, 0)
    sends = [job for job in line.jobs if job.kind == "send"]
    assert [(job.rank, job.start_seconds, job.end_seconds) for job in sends] == [(0, 1, 3), (1, 6, 8)]


def test_a_rank_sends_one_message_at_a_time():
    """Two forwards of one unit, sent in two each: the second waits for the first, and rank 1 is held up by sends."""
    times = replace(PLAIN, send_seconds=2)
    line = simulate("1f1b", n_stages=2, n_micro_batches=2, times=times)
    sends = [(job.micro_batch, job.start_seconds, job.end_seconds) for job in line.jobs if job.kind == "send"]
    assert sends[:2] == [(0, 1, 3), (1, 3, 5)]


def test_queueing_behind_another_message_is_not_communication():
    """Rank 1's gradient, ready at 27, leaves at 32, behind its second forward. Rank 0, idle since 2, waits for what is
    on its way from 32 to 42; and for the next, ready at 37 and on its way from 42 to 52, since 44."""
    times = [replace(PLAIN, send_seconds=10), replace(PLAIN, send_seconds=10), PLAIN]
    line = simulate("1f1b", n_stages=3, n_micro_batches=2, times=times)
    assert [start for start, _ in line.slot_seconds[0]] == [0, 1, 42, 52]
    assert line.waiting_seconds[0] == 10 + 8


def test_a_stage_that_turns_round_on_its_own_rank_sends_nothing():
    """The V's lowest rank holds the middle stages, its highest the first and the last."""
    line = simulate("zbv", n_stages=2, n_micro_batches=3, times=replace(PLAIN, send_seconds=1))
    assert {job.stage for job in line.jobs if job.kind == "send"} == {0, 1, 2, 3}
    sent = [(job.rank, job.stage) for job in line.jobs if job.kind == "send" and job.micro_batch == 0]
    assert sorted(sent) == [(0, 0), (0, 3), (1, 1), (1, 2)]  # 0 -> 1 and 2 -> 3, and their gradients back


def test_a_pair_hides_what_it_saves():
    """F 4 of which 2 are all-to-all, B 3 + 2 with 1: alone 9. A pair of 7 hides 2 of its 3, one of 5 hides all 3."""
    times = StageSeconds(
        forward_seconds=4,
        backward_input_seconds=3,
        backward_weight_seconds=2,
        overlapped_pair_seconds=7,
        forward_experts_seconds=2,
        backward_experts_seconds=1,
    )
    for pair_seconds, hidden in ((7, 2), (5, 3), (9, 0), (10, 0)):
        line = simulate(
            "dualpipe",
            n_stages=2,
            n_micro_batches=6,
            times=replace(times, overlapped_pair_seconds=pair_seconds),
        )
        n_pairs = sum(len(slot) == 2 for slot in line.schedule.orders[0])
        assert n_pairs == 3
        assert line.hidden_communication_seconds == (n_pairs * hidden,) * 2
        assert line.exposed_communication_seconds == (6 * 3 - n_pairs * hidden,) * 2
        drawn = sum(job.end_seconds - job.start_seconds for job in line.jobs if job.kind == "hidden_experts")
        assert drawn == 2 * n_pairs * hidden
    assert line.hidden_share == 0


def test_a_pair_of_unlike_stages_saves_the_smaller_of_what_each_would():
    """Forward 1 of stage 0 and backward 5 of stage 1: of 6, with its like stage 0 would save 1 and stage 1 two."""
    little = replace(PLAIN, overlapped_pair_seconds=2)
    much = StageSeconds(
        forward_seconds=3, backward_input_seconds=3, backward_weight_seconds=2, overlapped_pair_seconds=6
    )
    pair = (Work("forward", 0, 0), Work("backward", 1, 1))
    assert slot_cost(pair, [little, much]).seconds == 1 + 5 - 1
    assert slot_cost(pair, [much, little]).seconds == 3 + 2 - 1


def test_without_overlap_a_pair_is_one_after_the_other():
    assert PLAIN.pair_seconds == 3
    line = simulate("dualpipe", n_stages=2, n_micro_batches=4, times=PLAIN)
    assert (line.step_seconds, line.bubble_seconds) == (12, (0, 0))


def test_one_slow_stage_holds_up_the_others():
    """Stage 1 takes twice as long: 1 until it starts, 1 in which it waits for its first gradient, 30 times 6, and stage
    0's last backward, 2."""
    slow = StageSeconds(forward_seconds=2, backward_input_seconds=2, backward_weight_seconds=2)
    line = simulate("1f1b", n_stages=3, n_micro_batches=30, times=[PLAIN, slow, PLAIN])
    assert line.step_seconds == 1 + 1 + 30 * 6 + 2
    assert line.bubble_seconds == (184 - 90, 184 - 180, 184 - 90)


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    """Any pipeline with stages that differ, in whole units, so that sums are exact."""
    schedule = draw(pipelines()).build()
    units = st.integers(0, 9)
    stages = [
        StageSeconds(
            forward_seconds=2 * forward,
            backward_input_seconds=3 * backward,
            backward_weight_seconds=weight,
            overlapped_pair_seconds=max(2 * forward, 3 * backward + weight),
            send_seconds=send,
            forward_experts_seconds=forward,
            backward_experts_seconds=backward,
        )
        for forward, backward, weight, send in draw(
            st.lists(st.tuples(units, units, units, units), min_size=3, max_size=3)
        )
    ]
    return run_schedule(schedule, times=[stages[stage % 3] for stage in range(schedule.n_stages)])


@given(timelines())
@settings(max_examples=60, deadline=None)
def test_nothing_starts_before_its_input_is_there(line: Timeline):
    """Checked from the drawn jobs alone, in the words of the model: the simulator knows only chains of numbers."""
    ends: dict[tuple[str, int, int], float] = {}
    arrivals: dict[tuple[int, int, int], float] = {}
    for job in line.jobs:
        if job.kind == "send":
            arrivals[job.rank, job.micro_batch, job.stage] = job.end_seconds
        elif job.lane == "compute":
            ends["backward" if job.kind == "backward_input" else job.kind, job.micro_batch, job.stage] = job.end_seconds
    last = line.schedule.n_stages - 1

    def there(kind: str, m: int, stage: int, rank: int) -> float:
        """When what came out of that work was on that rank."""
        sender = rank_of(line.schedule, m, stage)
        if sender == rank or not line.times[stage].send_seconds:
            return ends[kind, m, stage]
        return arrivals[sender, m, stage]

    sends = [job for job in line.jobs if job.kind == "send"]
    assert len({(job.rank, job.micro_batch, job.stage, job.start_seconds) for job in sends}) == len(sends)
    for job in line.jobs:
        if job.lane == "communication":
            continue
        m, stage, start = job.micro_batch, job.stage, job.start_seconds
        if job.kind == "forward" and stage:
            assert start >= ends["forward", m, stage - 1]
        elif job.kind in ("backward", "backward_input"):
            assert start >= ends["forward", m, stage]
            assert stage == last or start >= ends["backward", m, stage + 1]
        elif job.kind == "backward_weight":
            assert start >= ends["backward", m, stage]


@given(timelines())
@settings(max_examples=30, deadline=None)
def test_a_lane_does_one_thing_at_a_time(line: Timeline):
    for rank in range(line.schedule.n_ranks):
        assert all(before[1] <= after[0] for before, after in pairwise(line.slot_seconds[rank]))
        sends = [job for job in line.jobs if job.rank == rank and job.kind == "send"]
        assert all(before.end_seconds <= after.start_seconds for before, after in pairwise(sends))


@given(timelines())
@settings(max_examples=30, deadline=None)
def test_all_time_and_all_communication_are_accounted_for(line: Timeline):
    """Busy and idle make the step; hidden and exposed make all that is communicated; waiting is idle."""
    communicated = sum(job.end_seconds - job.start_seconds for job in line.jobs if job.kind == "send")
    for rank, order in enumerate(line.schedule.orders):
        busy = sum(end - start for start, end in line.slot_seconds[rank])
        assert busy + line.bubble_seconds[rank] == line.step_seconds
        assert 0 <= line.waiting_seconds[rank] <= line.bubble_seconds[rank]
        assert line.hidden_communication_seconds[rank] >= 0
        for work in (work for slot in order for work in slot):
            if work.kind == "forward":
                communicated += line.times[work.stage].forward_experts_seconds
            elif work.kind in ("backward", "backward_input"):
                communicated += line.times[work.stage].backward_experts_seconds
    assert sum(line.hidden_communication_seconds) + sum(line.exposed_communication_seconds) == communicated


@given(timelines(), st.sampled_from(["forward", "backward_input", "backward_weight", "send"]), st.integers(0, 31))
@settings(max_examples=30, deadline=None)
def test_no_step_is_shorter_than_its_work_nor_for_slower_work(line: Timeline, name: str, stage: int):
    """A step takes at least what its fullest rank does, and what one micro-batch needs to pass all stages and back;
    where one stage takes longer, so does the step, or as long."""
    ranks = zip(line.bubble_seconds, line.slot_seconds, strict=True)
    assert all(idle >= 0 and line.step_seconds >= sum(end - start for start, end in spans) for idle, spans in ranks)
    assert line.step_seconds >= sum(time.forward_seconds + time.backward_input_seconds for time in line.times)
    field, stage = f"{name}_seconds", stage % line.schedule.n_stages
    times = [replace(time, overlapped_pair_seconds=None) for time in line.times]
    slower = replace(times[stage], **{field: getattr(times[stage], field) + 1})
    before = run_schedule(line.schedule, times=times)
    after = run_schedule(line.schedule, times=[*times[:stage], slower, *times[stage + 1 :]])
    assert before.step_seconds <= after.step_seconds <= before.step_seconds + 3 * line.schedule.n_micro_batches


def test_an_order_that_cannot_run_is_found():
    good = build_schedule("1f1b", n_stages=2, n_micro_batches=2)
    first = (Work("backward", 0, 0),)
    swapped = (first, *(slot for slot in good.orders[0] if slot != first))
    with pytest.raises(ValueError, match="rank 0 waits for ever for the input of .*; put what it needs before it"):
        run_schedule(replace(good, orders=(swapped, good.orders[1])), times=PLAIN)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"forward_seconds": -1}, "forward_seconds=-1 is no duration"),
        ({"send_seconds": float("nan")}, "send_seconds=nan is no duration"),
        ({"forward_experts_seconds": 2}, "forward_experts_seconds=2 is part of forward_seconds=1"),
        ({"backward_experts_seconds": 2}, "backward_experts_seconds=2 is part of backward_input_seconds=1"),
    ],
)
def test_times_that_cannot_be(fields: dict[str, float], says: str):
    with pytest.raises(ValueError, match=says):
        replace(PLAIN, **fields)


def test_nothing_to_do_takes_no_time():
    nothing = StageSeconds(forward_seconds=0, backward_input_seconds=0, backward_weight_seconds=0)
    line = simulate("zb1p", n_stages=2, n_micro_batches=2, times=nothing)
    assert (line.step_seconds, line.bubble_share, line.hidden_share) == (0, 0, 1)


def test_times_of_another_number_of_stages():
    with pytest.raises(ValueError, match="times are of 3 stages, schedule='zbv' has 4; give each"):
        simulate("zbv", n_stages=2, n_micro_batches=4, times=[PLAIN] * 3)
