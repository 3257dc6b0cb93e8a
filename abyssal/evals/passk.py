"""Scores over k samples a problem, and how sure we may be of them: avg@k, pass@k, cons@k, bootstrap by problem.

Owns the arithmetic. Does not own sampling or judging: it is given who was right (evals/tasks.py).

The bootstrap draws problems, not answers: the k answers to one problem are not independent, and what we want to know is
how the number would move on other problems. The intervals are percentiles of that draw.

Letters: P problems, K answers a problem, R resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb
from typing import NamedTuple

import numpy as np

RESAMPLES_AT_ONCE = 256  # (256, P) counts in memory, whatever the number of resamples


class Interval(NamedTuple):
    """An estimate and the bounds of its interval."""

    value: float
    low: float
    high: float


def avg_at_k(correct_PK: Sequence[Sequence[float]]) -> float:
    """Mean over problems of the share of answers that are right. (DeepSeek-R1, section 3: pass@1 from k samples)"""
    return float(np.mean(per_problem(correct_PK)))


def pass_at_k(correct_PN: Sequence[Sequence[float]], *, k: int) -> float:
    """Chance that at least one of k answers is right, estimated without bias from the n >= k drawn for each problem."""
    chances = []
    for correct_N in correct_PN:
        n, n_right = len(correct_N), sum(value > 0.5 for value in correct_N)
        if n < k:
            raise ValueError(f"pass@{k} needs {k} answers a problem, one has {n}; sample more or lower k")
        chances.append(1 - comb(n - n_right, k) / comb(n, k))
    _need_some(chances)
    return float(np.mean(chances))


def cons_at_k(answers_PK: Sequence[Sequence[str | None]], correct_PK: Sequence[Sequence[float]]) -> float:
    """Mean over problems of whether the answer given most often is right. (DeepSeek-R1: cons@64)"""
    return float(np.mean(consensus_per_problem(answers_PK, correct_PK)))


def consensus_per_problem(
    answers_PK: Sequence[Sequence[str | None]], correct_PK: Sequence[Sequence[float]]
) -> list[float]:
    """For each problem 1.0 if the majority answer is right. A tie counts as the share of tied answers that are right.

    None or an empty answer (cut off, say) casts no vote; a problem without any vote is wrong. Spell equal answers
    equally: ["7", "7", "12"] has a majority, ["7", "x=7", "12"] has none.
    """
    _need_some(answers_PK)
    _same_length(answers_PK, correct_PK)
    results = []
    for answers_K, correct_K in zip(answers_PK, correct_PK, strict=True):
        _same_length(answers_K, correct_K)
        votes = Counter(answer for answer in answers_K if answer)
        most = max(votes.values(), default=0)
        winners = [answer for answer, count in votes.items() if count == most]
        right = {answer: float(value) for answer, value in zip(answers_K, correct_K, strict=True)}
        results.append(sum(right[answer] > 0.5 for answer in winners) / len(winners) if winners else 0.0)
    return results


def per_problem(values_PK: Sequence[Sequence[float]]) -> list[float]:
    """The mean over each problem's answers, the unit that the bootstrap draws."""
    _need_some(values_PK)
    for values_K in values_PK:
        _need_some(values_K)
    return [float(np.mean(values_K)) for values_K in values_PK]


def bootstrap_mean(
    values_P: Sequence[float], *, n_resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean over problems with its interval."""
    return bootstrap_ratio(values_P, np.ones(len(values_P)), n_resamples=n_resamples, seed=seed, level=level)


def bootstrap_ratio(
    numerators_P: Sequence[float] | np.ndarray,
    denominators_P: Sequence[float] | np.ndarray,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """sum(numerators) / sum(denominators) with its interval, for what not every answer has a share in.

    Mean length given thinking: numerators are the tokens of each problem's thinking answers, denominators their number.
    Resamples in which nothing remains to divide by are left out; if nothing is there at all, the result is nan.
    """
    _need_some(numerators_P)
    _same_length(numerators_P, denominators_P)
    top_P = np.asarray(numerators_P, dtype=np.float64)
    bottom_P = np.asarray(denominators_P, dtype=np.float64)
    if bottom_P.sum() == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    ratios_R = _resampled_ratios(top_P, bottom_P, n_resamples=n_resamples, seed=seed)
    low, high = np.quantile(ratios_R, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(top_P.sum() / bottom_P.sum()), float(low), float(high))


def bootstrap_difference(
    values_P: Sequence[float],
    baseline_P: Sequence[float],
    *,
    n_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Mean gain over a baseline on the same problems, paired: whether a problem is hard cancels out."""
    _same_length(values_P, baseline_P)
    gains_P = np.asarray(values_P, dtype=np.float64) - np.asarray(baseline_P, dtype=np.float64)
    return bootstrap_mean(gains_P.tolist(), n_resamples=n_resamples, seed=seed, level=level)


def _resampled_ratios(top_P: np.ndarray, bottom_P: np.ndarray, *, n_resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    n_problems = len(top_P)
    chance_P = np.full(n_problems, 1 / n_problems)
    ratios = []
    for start in range(0, n_resamples, RESAMPLES_AT_ONCE):
        n_now = min(RESAMPLES_AT_ONCE, n_resamples - start)
        counts_RP = rng.multinomial(n_problems, chance_P, size=n_now)  # how often each problem was drawn
        tops_R, bottoms_R = counts_RP @ top_P, counts_RP @ bottom_P
        ratios.append(tops_R[bottoms_R > 0] / bottoms_R[bottoms_R > 0])
    return np.concatenate(ratios)


def _need_some(values: Sequence | np.ndarray) -> None:
    if len(values) == 0:
        raise ValueError("nothing to average: give at least one problem with at least one answer")


def _same_length(left: Sequence | np.ndarray, right: Sequence | np.ndarray) -> None:
    if len(left) != len(right):
        raise ValueError(f"{len(left)} against {len(right)}: both sides must speak of the same problems and answers")
