"""Scores and intervals against numbers that can be checked by hand."""

import math

import numpy as np
import pytest

from abyssal.evals.passk import (
    avg_at_k,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    cons_at_k,
    consensus_per_problem,
    pass_at_k,
    per_problem,
)


def test_avg_at_k_weighs_problems_equally():
    assert avg_at_k([[1, 0, 0, 1], [1, 1]]) == 0.75  # (1/2 + 2/2) / 2, not 4/6
    assert per_problem([[1, 0], [1, 1]]) == [0.5, 1.0]


def test_pass_at_k_is_one_minus_the_chance_to_draw_only_wrong_ones():
    # 1 of 4 right, draw 2: C(3,2) = 3 of the C(4,2) = 6 pairs are all wrong
    assert pass_at_k([[1, 0, 0, 0]], k=2) == 0.5
    assert pass_at_k([[1, 0, 0, 0], [0, 0, 0, 0]], k=4) == 0.5
    with pytest.raises(ValueError, match="pass@8 needs 8"):
        pass_at_k([[1, 0]], k=8)


def test_the_majority_answers_for_the_problem():
    answers = [["7", "7", "12"], ["3", "4", "4"]]
    correct = [[1, 1, 0], [1, 0, 0]]
    assert consensus_per_problem(answers, correct) == [1.0, 0.0]
    assert cons_at_k(answers, correct) == 0.5


def test_a_tie_counts_in_part_and_a_cut_off_answer_does_not_vote():
    assert consensus_per_problem([["7", "8"]], [[1, 0]]) == [0.5]
    assert consensus_per_problem([[None, None, "7"]], [[0, 0, 1]]) == [1.0]
    assert consensus_per_problem([[None, ""]], [[0, 0]]) == [0.0]


def test_the_interval_has_the_width_of_the_binomial():
    values = [1.0] * 150 + [0.0] * 150
    value, low, high = bootstrap_mean(values)
    half = 1.96 * math.sqrt(0.25 / 300)  # 5.7 points
    assert value == 0.5
    assert low == pytest.approx(0.5 - half, abs=0.01) and high == pytest.approx(0.5 + half, abs=0.01)


def test_problems_are_drawn_not_answers():
    # 50 problems whose 20 answers agree are worth 50 draws, not 1000
    correct = [[1.0] * 20] * 25 + [[0.0] * 20] * 25
    by_problem = bootstrap_mean(per_problem(correct))
    by_answer = bootstrap_mean(np.ravel(correct).tolist())
    assert (by_problem.high - by_problem.low) > 3 * (by_answer.high - by_answer.low)


def test_pairing_cancels_how_hard_a_problem_is():
    hard_and_easy = [0.0, 0.25, 0.5, 0.75] * 50
    better = [value + 0.25 for value in hard_and_easy]
    assert bootstrap_difference(better, hard_and_easy) == (0.25, 0.25, 0.25)


def test_coverage_is_near_its_level():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(100):
        _, low, high = bootstrap_mean(rng.random(60).tolist(), n_resamples=300, seed=seed)
        hits += low <= 0.5 <= high
    assert 87 <= hits <= 100


def test_a_ratio_divides_sums_so_length_given_thinking_counts_thinking_answers():
    # problem 1: three thinking answers of 30 tokens; problem 2: one of 10
    assert bootstrap_ratio([90, 10], [3, 1]).value == 25
    assert all(math.isnan(x) for x in bootstrap_ratio([0, 0], [0, 0]))  # nobody thought


def test_same_seed_same_interval():
    assert bootstrap_mean([0, 1, 1], seed=3) == bootstrap_mean([0, 1, 1], seed=3)


def test_bad_input_says_what_is_wrong():
    with pytest.raises(ValueError, match="nothing to average"):
        avg_at_k([])
    with pytest.raises(ValueError, match="2 against 1"):
        bootstrap_difference([1, 0], [1])
