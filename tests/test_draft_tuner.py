"""The tuner on made-up machines: acceptance and seconds that a reader can multiply out."""

from __future__ import annotations

import numpy as np
import pytest

from abyssal.engine.draft_tuner import FIRST_WAIT, LAST_WAIT, Step, Tuner


def run(tuner: Tuner, n_steps: int, *, share: float, seconds, n_rows: int = 1) -> list[int]:
    """Each draft is right with the same share of those before it; a step with k drafts takes seconds(k)."""
    rng, used = np.random.default_rng(0), []
    for _ in range(n_steps):
        k = tuner.k(n_rows)
        used.append(k)
        right_BK = (rng.random((n_rows, k)) < share).cumprod(1)
        tuner.learn(Step(k, n_rows, seconds(k), np.full(k, n_rows), right_BK.sum(0)))
    return used


def most_used(used: list[int]) -> int:
    return max(set(used), key=used.count)


@pytest.mark.parametrize("share, cost, best", [
    # ids a step are 1, 1.8, 2.44, 2.952, 3.36; each draft costs a tenth of a step: per second 1, 1.64, 2.03, 2.27, 2.40
    (0.8, 0.1, 4),
    # ids a step are 1, 1.5, 1.75, 1.875, 1.94; per second 1, 1.20, 1.17, 1.07, 0.97
    (0.5, 0.25, 1),
    # as before, but a draft costs half a step: per second 1, 1, 0.88, ..: not worth it
    (0.5, 0.5, 0),
    # a bandwidth-bound expert model: 1 + 0.57 ids for 1.58 steps
    (0.57, 0.58, 0),
])  # fmt: skip
def test_the_best_number_of_drafts_is_found_and_kept(share, cost, best):
    used = run(Tuner(4), 600, share=share, seconds=lambda k: 0.010 * (1 + cost * k))
    late = np.array(used[200:])

    def ids_a_second(k):
        return (1 - share ** (k + 1)) / (1 - share) / (1 + cost * k)

    assert abs(most_used(used[200:]) - best) <= 1  # neighbours may be within what 256 steps can tell apart
    assert np.mean(ids_a_second(late)) > 0.94 * ids_a_second(best)  # tries included


def test_gain_is_measured_where_drafts_were_made_and_supposed_beyond():
    """Half of the first drafts are right, and half of the second given the first: 1 + 1/2 + 1/4 and, supposed, 1/8."""
    tuner = Tuner(3)
    for _ in range(400):
        tuner.learn(Step(2, 4, 0.01, np.array([4, 4]), np.array([2, 1])))
    assert tuner.gain_K() == pytest.approx([1, 1.5, 1.75, 1.875], abs=0.03)
    assert Tuner(3).gain_K() == pytest.approx([1, 2, 3, 4])  # nothing known: try


def test_costs_are_those_of_the_size_of_batch():
    """One row: drafts are nearly free. Sixteen: each costs as much as the token it may save."""
    tuner = Tuner(4)
    for _ in range(4):
        alone = run(tuner, 150, share=0.7, seconds=lambda k: 0.01 * (1 + 0.05 * k))
        many = run(tuner, 150, share=0.7, seconds=lambda k: 0.05 * (1 + k), n_rows=16)
    assert most_used(alone) >= 3 and most_used(many) == 0
    assert [tuner.seconds(n, 0) for n in (1, 16)] == pytest.approx([0.01, 0.05], rel=0.05)


def test_drafting_comes_back_when_it_begins_to_pay_and_goes_when_it_ceases_to():
    tuner = Tuner(4)
    cost = lambda k: 0.01 * (1 + 0.3 * k)  # noqa: E731
    assert most_used(run(tuner, 400, share=0.1, seconds=cost)[100:]) == 0
    assert most_used(run(tuner, 3000, share=0.95, seconds=cost)[-500:]) == 4
    assert most_used(run(tuner, 1000, share=0.1, seconds=cost)[-500:]) == 0
    tuner.reset()  # new weights: it is asked again, and what steps cost is still known
    assert tuner.k(1) == 0 and not np.isnan(tuner.seconds(1, 1))
    assert most_used(run(tuner, 300, share=0.95, seconds=cost)[100:]) == 4


def test_tries_become_rare_while_nothing_changes():
    tuner = Tuner(4)
    used = run(tuner, 8_000, share=0.0, seconds=lambda k: 0.01 * (1 + k))
    tries = np.flatnonzero(np.diff((np.array(used) > 0).astype(int)) == 1)
    assert np.diff(tries[-3:]).min() >= LAST_WAIT and np.diff(tries[1:4]).min() >= FIRST_WAIT
    assert np.count_nonzero(used[1000:]) < 0.005 * 8_000


def test_a_machine_that_slows_down_for_all_changes_no_choice():
    """The longer context makes every step slower, also those with other numbers of drafts that were not tried since."""
    tuner, clock = Tuner(4), iter(range(10**6))
    used = run(tuner, 4000, share=0.6, seconds=lambda k: 0.01 * (1 + next(clock) / 500) * (1 + 0.25 * k))
    # ids a step 1, 1.6, 1.96, 2.18, 2.31; per second 1, 1.28, 1.31, 1.24, 1.15
    late = used[500:]
    assert late.count(1) + late.count(2) > 0.9 * len(late)


def test_a_hiccup_is_not_a_cost():
    tuner = Tuner(2)
    run(tuner, 100, share=0.9, seconds=lambda k: 0.01)
    before = tuner.seconds(1, 2)
    tuner.learn(Step(2, 1, 10.0, np.ones(2), np.ones(2)))
    assert tuner.seconds(1, 2) <= 1.3 * before


def test_a_fixed_number_stays():
    tuner = Tuner(4, fixed=3)
    assert set(run(tuner, 50, share=0.0, seconds=lambda k: 1.0 + k)) == {3}


def test_a_size_that_was_never_seen_begins_with_what_the_nearest_one_knows():
    """Eight rows have shown that no draft pays. One row starts with none, and its seconds are its own from the first
    step that was measured on, those of a try too: all keep their ratios."""
    tuner = Tuner(2)
    run(tuner, 300, share=0.2, seconds=lambda k: 0.08 * (1 + k), n_rows=8)
    assert run(tuner, 3, share=0.2, seconds=lambda k: 0.02 * (1 + k)) == [0, 0, 0]
    assert tuner.seconds(1, 0) == pytest.approx(0.02) and tuner.seconds(1, 1) == pytest.approx(0.04, rel=0.02)
