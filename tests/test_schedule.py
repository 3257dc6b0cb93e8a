"""The learning rate at the points where it turns."""

from __future__ import annotations

import pytest

from abyssal.optim.schedule import learning_rate, ramped_rows, total_rows, v3_learning_rate


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


V3_TOKENS, V3_ROW = 14.8e12, 4096


def v3(tokens: float, *, step: int = 100_000) -> float:
    """V3's own rate, in units of 1e-6, after so many tokens."""
    return 220 * v3_learning_rate(step, tokens / V3_TOKENS, warmup=2000)


def test_v3s_rate_at_the_numbers_of_the_paper():
    assert [v3(0, step=step) for step in (0, 999, 1999)] == pytest.approx([0.11, 110, 220])
    assert v3(1e12) == v3(9.99e12) == 220
    assert v3(10e12 + 4.3e12 / 2) == pytest.approx(121)  # half of the way from 220 to 22
    assert v3(14.2999e12) == pytest.approx(22, abs=1e-3)
    assert v3(14.31e12) == v3(14.632e12) == pytest.approx(22)
    assert v3(14.634e12) == v3(14.8e12) == pytest.approx(7.3)


def test_v3s_rate_never_rises_after_the_warm_up():
    rates = [v3(share * 1e10) for share in range(0, 1481)]
    assert all(later <= earlier for earlier, later in zip(rates, rates[1:], strict=False))


def test_the_batch_grows_with_the_rows_seen():
    ramp = {"start": 2, "end": 10, "ramp_rows": 40}
    # 2 + 8 x seen / 40: after 0, 2, 4, 6, 9, 12, 16, 21, 27, 34 and 42 rows
    seen, steps = 0, []
    for _ in range(12):
        steps.append(ramped_rows(seen, **ramp))
        seen += steps[-1]
    assert steps == [2, 2, 2, 3, 3, 4, 5, 6, 7, 8, 10, 10]
    assert total_rows(12, **ramp) == seen == 62
    assert [total_rows(n, **ramp) for n in (0, 1, 4)] == [0, 2, 9]
    assert [ramped_rows(n, start=4, end=12, ramp_rows=40, multiple=4) for n in (0, 19, 20, 39, 40)] == [4, 4, 8, 8, 12]


def test_v3s_ramp_from_3072_to_15360_over_469b_tokens():
    ramp = {"start": 3072, "end": 15360, "ramp_rows": int(469e9 / V3_ROW)}
    assert ramped_rows(0, **ramp) == 3072
    assert ramped_rows(int(469e9 / V3_ROW / 2), **ramp) == pytest.approx(9216, abs=1)
    assert ramped_rows(int(469e9 / V3_ROW), **ramp) == 15360
    # the ramp takes ramp_rows / 12288 x ln 5 = 14,997 steps; all 14.8T take 242,800, "about 240K" as the papers have it
    assert total_rows(242_800, **ramp) * V3_ROW == pytest.approx(V3_TOKENS, rel=1e-3)
