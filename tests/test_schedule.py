"""The learning rate at the points where it turns."""

from __future__ import annotations

import pytest

from abyssal.optim.schedule import learning_rate


def wsd(step: int) -> float:
    return learning_rate(step, 1000, warmup=10, shape="wsd", stable=0.6, floor=0.1)


def test_it_warms_up_in_even_steps_and_never_starts_at_zero():
    assert [wsd(step) for step in (0, 1, 4, 9)] == pytest.approx([0.1, 0.2, 0.5, 1.0])


def test_it_is_flat_until_the_fall_and_ends_at_the_floor():
    assert wsd(10) == wsd(300) == wsd(599) == 1.0
    assert wsd(600) == pytest.approx(1.0)
    assert wsd(800) == pytest.approx(0.55)  # half of the way down from 1 to 0.1
    assert wsd(700) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + 0.5**0.5))  # a quarter: cos(45 degrees)
    assert wsd(1000) == pytest.approx(0.1)
    assert wsd(2000) == pytest.approx(0.1)


def test_it_never_rises_after_the_warm_up():
    rates = [wsd(step) for step in range(10, 1001)]
    assert all(later <= earlier for earlier, later in zip(rates, rates[1:], strict=False))


def test_cosine_falls_from_the_end_of_the_warm_up():
    rates = [learning_rate(step, 110, warmup=10, shape="cosine", floor=0.0) for step in (9, 10, 60, 110)]
    assert rates == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_constant_stays():
    assert [learning_rate(s, 100, warmup=2, shape="constant") for s in (0, 1, 2, 99)] == [0.5, 1.0, 1.0, 1.0]


def test_without_warm_up_the_first_step_is_whole():
    assert learning_rate(0, 10, warmup=0, shape="constant") == 1.0
    assert learning_rate(0, 10, warmup=0, shape="cosine") == 1.0


def test_a_warm_up_longer_than_the_run_is_all_there_is():
    assert [learning_rate(s, 4, warmup=8, shape="wsd") for s in range(4)] == [1 / 8, 2 / 8, 3 / 8, 4 / 8]
