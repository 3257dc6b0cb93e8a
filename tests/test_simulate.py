"""Schedules get their times: nothing starts before its input, and the bubble is the papers'."""

from __future__ import annotations

import pytest

from abyssal.plan.bubble import closed_form
from abyssal.plan.schedules import ScheduleName, Work, build_schedule
from abyssal.plan.simulate import StageSeconds, run_schedule, simulate

PLAIN = StageSeconds(forward_seconds=1, backward_input_seconds=1, backward_weight_seconds=1)


def test_two_ranks_two_micro_batches_by_hand():
    """F 1, B 2. Rank 0: F0 F1 . B0 . B1; rank 1: . F0 B0 F1 B1: nine units, of which each rank works six."""
    line = simulate("1f1b", n_stages=2, n_micro_batches=2, times=PLAIN)
    assert line.slot_seconds[0] == ((0, 1), (1, 2), (4, 6), (7, 9))
    assert line.slot_seconds[1] == ((1, 2), (2, 4), (4, 5), (5, 7))
    assert (line.step_seconds, line.bubble_seconds) == (9, (3, 3))
    assert line.bubble_share == pytest.approx(1 / 3)


@pytest.mark.parametrize("n_stages", range(1, 9))
@pytest.mark.parametrize("n_micro_batches", [1, 2, 3, 8, 13, 24, 40])
def test_the_bubble_of_1f1b(n_stages: int, n_micro_batches: int):
    times = StageSeconds(forward_seconds=5, backward_input_seconds=7, backward_weight_seconds=4)
    line = simulate("1f1b", n_stages=n_stages, n_micro_batches=n_micro_batches, times=times)
    assert set(line.bubble_seconds) == {(n_stages - 1) * (5 + 11)}
    form = closed_form("1f1b", n_stages=n_stages, times=times)
    assert form is not None and form.bubble_seconds == (n_stages - 1) * (5 + 11)


@pytest.mark.parametrize("n_stages", range(1, 9))
@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
def test_the_bubble_of_interleaved_1f1b(n_stages: int, chunks: int):
    times = StageSeconds(forward_seconds=5, backward_input_seconds=7, backward_weight_seconds=4)
    for rounds in (1, 2, 5):
        n_micro_batches = rounds * n_stages
        line = simulate("interleaved", n_stages=n_stages, n_micro_batches=n_micro_batches, times=times, chunks=chunks)
        assert set(line.bubble_seconds) == {(n_stages - 1) * (5 + 11)}


def test_an_order_that_cannot_run_is_found():
    good = build_schedule("1f1b", n_stages=2, n_micro_batches=2)
    first = (Work("backward", 0, 0),)
    swapped = (first, *(slot for slot in good.orders[0] if slot != first))
    bad = type(good)(name="1f1b", n_micro_batches=2, stage_ranks=good.stage_ranks, orders=(swapped, good.orders[1]))
    with pytest.raises(ValueError, match="rank 0 waits for ever for the input of"):
        run_schedule(bad, times=PLAIN)


def test_sends_delay_and_are_counted():
    """F0 sent 1..3, so rank 1 starts at 3, having waited 2; its gradient leaves at 6 and arrives at 8."""
    times = StageSeconds(forward_seconds=1, backward_input_seconds=1, backward_weight_seconds=1, send_seconds=2)
    line = simulate("1f1b", n_stages=2, n_micro_batches=1, times=times)
    assert line.slot_seconds == (((0, 1), (8, 10)), ((3, 4), (4, 6)))
    assert line.bubble_seconds == (7, 7)
    assert line.waiting_seconds == line.exposed_communication_seconds == (2, 2)
    assert line.hidden_communication_seconds == (0, 0)
    assert [(job.rank, job.start_seconds, job.end_seconds) for job in line.sends] == [(0, 1, 3), (1, 6, 8)]


@pytest.mark.parametrize(
    ("schedule", "n_stages", "n_micro_batches", "chunks", "says"),
    [
        ("none", 2, 4, 1, "schedule='none' is one rank, not n_stages=2"),
        ("1f1b", 0, 4, 1, "n_stages=0"),
        ("1f1b", 2, 4, 2, "chunks=2 belongs to schedule='interleaved'"),
        ("interleaved", 4, 6, 2, "n_micro_batches=6 is no multiple; use 8"),
        ("gpipe", 2, 4, 1, "schedule='gpipe' is unknown; use one of none, 1f1b"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    schedule: ScheduleName, n_stages: int, n_micro_batches: int, chunks: int, says: str
):
    with pytest.raises(ValueError, match=says) as caught:
        build_schedule(schedule, n_stages=n_stages, n_micro_batches=n_micro_batches, chunks=chunks)
    assert "\n" not in str(caught.value)
