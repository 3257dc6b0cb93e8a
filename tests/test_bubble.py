"""The simulated bubble is the published one, to the last unit, wherever the formula applies."""

from __future__ import annotations

import pytest

from abyssal.plan.bubble import closed_form
from abyssal.plan.published_schedules import published_schedules
from abyssal.plan.schedules import ScheduleName
from abyssal.plan.simulate import StageSeconds, simulate


def stage(forward: int, backward_input: int, backward_weight: int, pair: int | None = None) -> StageSeconds:
    """In whole units, so that equal is equal."""
    return StageSeconds(
        forward_seconds=forward,
        backward_input_seconds=backward_input,
        backward_weight_seconds=backward_weight,
        overlapped_pair_seconds=pair,
    )


V3 = (16, 120)  # PP16, and 15,360 sequences over 128 replicas, one in a micro-batch
# ranks and micro-batches: each of these lists has more than fifty, from the fewest that fill the pipeline
ONE_WAY = [(pp, m) for pp in range(1, 9) for m in (8, 9, 13, 16, 24, 31, 40)] + [V3]
BOTH_WAYS = [(pp, m) for pp in (2, 4, 6, 8, 10) for m in (20, 22, 24, 28, 30, 36, 40, 42, 50, 52)] + [V3]
A_V = [(pp, m) for pp in (1, 2, 3, 4, 5) for m in (10, 11, 12, 14, 15, 18, 20, 21, 25, 26)] + [(8, 120)]
IN_TURN = [(pp, rounds * pp, chunks) for pp in (1, 2, 3, 4, 8) for rounds in (2, 3, 5) for chunks in (1, 2, 3, 5)]


def check(name: ScheduleName, n_stages: int, n_micro_batches: int, times: StageSeconds, chunks: int = 1) -> None:
    line = simulate(name, n_stages=n_stages, n_micro_batches=n_micro_batches, times=times, chunks=chunks)
    form = closed_form(name, n_stages=n_stages, n_micro_batches=n_micro_batches, times=times, chunks=chunks)
    assert form is not None and form.applies
    assert max(line.bubble_seconds) == form.bubble_seconds
    assert max(line.schedule.most_in_flight()) == form.peak_activations
    if times.overlapped_pair_seconds is None:
        assert len(set(line.bubble_seconds)) == 1  # pairs save nothing: all ranks have as much work, and idle alike


def test_there_are_fifty_combinations_of_each():
    assert all(len(set(counts)) > 50 for counts in (ONE_WAY, BOTH_WAYS, A_V, IN_TURN))


@pytest.mark.parametrize(("n_stages", "n_micro_batches"), ONE_WAY)
def test_1f1b(n_stages: int, n_micro_batches: int):
    """(PP-1)(F+B)."""
    for times in (stage(1, 1, 1), stage(9, 4, 11)):
        check("1f1b", n_stages, n_micro_batches, times)


@pytest.mark.parametrize(("n_stages", "n_micro_batches", "chunks"), IN_TURN)
def test_interleaved(n_stages: int, n_micro_batches: int, chunks: int):
    """(PP-1)(F+B) of a chunk: 1 / chunks of 1F1B's."""
    check("interleaved", n_stages, n_micro_batches, stage(5, 7, 4), chunks)


@pytest.mark.parametrize(("n_stages", "n_micro_batches"), ONE_WAY)
def test_zb1p(n_stages: int, n_micro_batches: int):
    """(PP-1)(F+B-2W), B being the full backward."""
    for times in (stage(1, 1, 1), stage(5, 7, 4), stage(7, 5, 3)):
        check("zb1p", n_stages, n_micro_batches, times)


@pytest.mark.parametrize(("n_stages", "n_micro_batches"), A_V)
def test_zbv(n_stages: int, n_micro_batches: int):
    """(PP-1)F of half a stage: each rank begins one forward after the one above, and then never waits."""
    check("zbv", n_stages, n_micro_batches, stage(3, 3, 3))


@pytest.mark.parametrize(("n_stages", "n_micro_batches"), BOTH_WAYS)
def test_dualpipe(n_stages: int, n_micro_batches: int):
    """(PP/2-1)(F&B+B-3W), whatever a pair saves."""
    for times in (stage(6, 6, 4), stage(6, 6, 4, 13), stage(6, 6, 4, 10)):
        check("dualpipe", n_stages, n_micro_batches, times)


@pytest.mark.parametrize(("n_stages", "n_micro_batches"), A_V)
def test_dualpipev(n_stages: int, n_micro_batches: int):
    """That of a DualPipe on twice as many ranks."""
    for times in (stage(6, 6, 4), stage(9, 9, 2, 17)):
        check("dualpipev", n_stages, n_micro_batches, times)


def test_the_table_of_the_paper_by_hand():
    """PP 8, F = I = W = 1: B 2, F&B 3. (DeepSeek-V3 table 2)"""
    forms = {
        name: closed_form(name, n_stages=8, n_micro_batches=20, times=stage(1, 1, 1))
        for name in ("1f1b", "zb1p", "dualpipe")
    }
    assert [form.bubble_seconds for form in forms.values() if form] == [7 * (1 + 2), 7 * (1 + 2 - 2), 3 * (3 + 2 - 3)]
    assert [form.parameter_copies for form in forms.values() if form] == [1, 1, 2]
    assert [form.peak_activations for form in forms.values() if form] == [8, 8, 9]


@pytest.mark.parametrize(
    ("name", "times", "simulated", "formula"),
    [
        ("zb1p", stage(2, 2, 5), 14, -7),  # the weight gradients owed take longer than the end has room for
        ("zb1p", stage(2, 6, 4), 42, 28),  # in draining, a weight gradient is in the way of the next input gradient
        ("dualpipe", stage(5, 6, 4), 36, 39),  # I longer than F: the drain, which the formula counts in I, ends early
        ("zbv", stage(5, 6, 4), 42, 35),  # its order is for three equal times
    ],
)
def test_where_a_formula_does_not_apply_it_says_so(
    name: ScheduleName, times: StageSeconds, simulated: int, formula: int
):
    line = simulate(name, n_stages=8, n_micro_batches=20, times=times)
    form = closed_form(name, n_stages=8, n_micro_batches=20, times=times)
    assert form is not None and not form.applies
    assert (max(line.bubble_seconds), form.bubble_seconds) == (simulated, formula)


def test_too_few_micro_batches_hold_less():
    form = closed_form("1f1b", n_stages=8, n_micro_batches=3, times=stage(1, 1, 1))
    assert form is not None and not form.applies
    assert max(simulate("1f1b", n_stages=8, n_micro_batches=3, times=stage(1, 1, 1)).schedule.most_in_flight()) == 3


def test_one_rank_without_a_pipeline_has_no_form():
    assert closed_form("none", n_stages=1, n_micro_batches=4, times=stage(1, 1, 1)) is None
    assert simulate("none", n_stages=1, n_micro_batches=4, times=stage(1, 1, 1)).bubble_seconds == (0,)


def test_published_lines_are_exact():
    """V3's pipeline: 15 x (1 + 2), 15 x (1 + 2 - 2), 7 x (3 + 2 - 3) forwards; 16, 16 and 17 micro-batches held."""
    lines = published_schedules()
    assert [line.published for line in lines] == [45, 16, 15, 16, 14, 17]
    assert all(line.is_exact and line.deviation == 0 for line in lines)
