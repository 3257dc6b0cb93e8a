"""When a stage evaluates, saves and ends: by steps, by seconds, by whichever comes first."""

from __future__ import annotations

import math

import pytest

from abyssal.stages.schedule_points import due, steps_in_all


@pytest.mark.parametrize(
    ("step", "worked_s", "seconds", "total"),
    [
        (3, 8.0, math.inf, 10),  # no limit of time: the steps alone
        (3, 8.0, 8.0, 4),  # the seconds are used up: this step was the last
        (3, 8.0, 7.5, 4),
        (3, 8.0, 12.0, 6),  # at two seconds a step, six steps
        (3, 8.0, 8.1, 5),  # hardly any time left is one more step
        (3, 8.0, 1000.0, 10),  # the cap holds
        (9, 8.0, 1000.0, 10),
    ],
)
def test_how_many_steps_there_will_be(step: int, worked_s: float, seconds: float, total: int):
    assert steps_in_all(step, 10, worked_s=worked_s, seconds=seconds) == total
    assert due(step, 0, total) == (total == step + 1)


def test_only_the_last_step_is_taken_for_the_last():
    """Whatever the steps take, a stage that has not used up its seconds is never saved as finished."""
    for n in range(1, 200):
        worked_s = 0.37 * n
        total = steps_in_all(n - 1, 10_000, worked_s=worked_s, seconds=50.0)
        assert (total == n) == (worked_s >= 50.0)
