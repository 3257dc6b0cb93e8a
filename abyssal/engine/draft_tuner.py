"""How many drafts pay: measured acceptance against measured seconds, for each size of batch by itself.

With k drafts a row goes on by 1 + a_1 + .. + a_k ids a step, a_j being the share of steps in which the first j were
right, and a step takes c(k) seconds. The k with the most ids a second is used; 0 is one of them. a_j is measured
whenever at least j are drafted, and beyond that supposed to fall as it fell before. c(k) is measured with k alone: what
makes the steps of one k slower (a longer context, a busy machine) makes those of the others slower too, so all are
scaled together, and from time to time one other k is tried for a few steps, less often the longer nothing changes.
Owns no clock: seconds are told.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

FORGET = 1 / 256  # weight of one more row and step in the acceptance
BELIEF = 4.0  # rows and steps whose weight the supposed acceptance has against what was measured
DRIFT = 0.1  # weight of one more step in what the k in use costs
NEWS, LOWER = 0.3, 0.6  # and of a tried one; what is in the way makes a step longer, never shorter
SETTLED = 4  # steps of one k from which on its cost is known
OUTLIER = 3.0  # a step this many times as long as expected counts as if it were not longer
BETTER = 1.02  # by so much another k must be better to be used
LOOK_AGAIN = 8  # steps from one comparison to the next, while nothing is tried
TRY_STEPS = 3  # of which the first is not counted: it works off what the k before left
PROMISING = 1.01  # a try that makes more than that of what was hoped for is followed by another soon
FIRST_WAIT, LAST_WAIT = 32, 2048  # steps from one try to the next


class DraftStats(NamedTuple):
    """What drafting has come to since the engine was made.

    `acceptance[j]`: of the drafts for the place j + 1 ids ahead, the share that was right (and so were all before it).
    `tokens_per_step` of a row. `speed_up`: seconds that the same ids would have taken at the measured speed of this
    engine's steps without drafts, over the seconds they took, drafting, trying and all; below 1 it was a loss, None
    while there is nothing to compare with. `k` is in use now, 0 where drafting does not pay. `error`: why nobody drafts
    any more.
    """

    drafter: str
    k: int
    acceptance: tuple[float, ...]
    tokens_per_step: float
    speed_up: float | None
    n_drafted: int
    n_accepted: int
    error: str | None = None


class Step(NamedTuple):
    """What one step with k drafts a row did. Per place ahead (K): rows that might have drafted it (one that found
    nothing to draft was not right either), and rows that were right."""

    k: int
    n_rows: int
    seconds: float
    able_K: np.ndarray
    right_K: np.ndarray


@dataclass
class Arms:
    """One size of batch. `cost_K` holds seconds a step for each k, nan where it was never measured."""

    cost_K: np.ndarray
    best: int = 0
    trying: int | None = None
    last: int | None = None  # the k of the step before
    left: int = 0  # steps until the try ends, or the next begins
    wait: int = FIRST_WAIT
    n_tries: int = 0
    seen: dict[int, int] = field(default_factory=dict)  # how often k was measured here; other costs are another size's
    hope: float = 0.0  # ids a row and step that the try was supposed to give


@dataclass
class Tuner:
    """`fixed` k is used as it is; else the best of 0..most."""

    most: int
    fixed: int | None = None
    right_K: np.ndarray = field(init=False)  # shares of rows and steps, decayed, and their weights
    weight_K: np.ndarray = field(init=False)
    arms: dict[int, Arms] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Acceptance is of other weights now; what steps cost still holds."""
        self.right_K, self.weight_K = np.zeros(self.most), np.zeros(self.most)

    def k(self, n_rows: int) -> int:
        """How many drafts the next step of so many rows should have."""
        if self.fixed is not None:
            return self.fixed
        arms = self._arms(n_rows)
        return arms.best if arms.trying is None else arms.trying

    def learn(self, step: Step) -> None:
        if n := len(step.able_K):
            keep_K = (1 - FORGET) ** step.able_K
            share_K = step.right_K / np.maximum(step.able_K, 1)
            self.weight_K[:n] = self.weight_K[:n] * keep_K + (1 - keep_K)
            self.right_K[:n] = self.right_K[:n] * keep_K + share_K * (1 - keep_K)
        if self.fixed is None:
            arms = self._arms(step.n_rows)
            if arms.last == step.k:
                self._cost(arms, step.k, step.seconds)
            arms.last = step.k
            self._next(arms)

    def gain_K(self) -> np.ndarray:
        """Ids a row and step with 0, 1, .. most drafts."""
        gain_K, likely, before = np.ones(self.most + 1), 1.0, 1.0
        for j in range(self.most):
            supposed = likely * before  # falls as it fell before; at first everything is right
            weight = self.weight_K[j] / FORGET
            right = (self.right_K[j] / FORGET + BELIEF * supposed) / (weight + BELIEF)
            before = min(right / likely, 1.0) if likely else 0.0
            likely = min(right, likely)
            gain_K[j + 1] = gain_K[j] + likely
        return gain_K

    def seconds(self, n_rows: int, k: int) -> float:
        """What a step of so many rows with k drafts costs, nan where that was not measured."""
        arms = self._arms(n_rows)
        return float(arms.cost_K[k]) if arms.seen else np.nan

    def _arms(self, n_rows: int) -> Arms:
        """A new size begins with the best k and the ratios of costs of the one most like it."""
        size = n_rows.bit_length()
        if size not in self.arms:
            near = min(self.arms, key=lambda known: abs(known - size), default=None)
            if near is None:
                self.arms[size] = Arms(np.full(self.most + 1, np.nan))
            else:
                self.arms[size] = Arms(self.arms[near].cost_K.copy(), self.arms[near].best, left=FIRST_WAIT)
        return self.arms[size]

    def _cost(self, arms: Arms, k: int, seconds: float) -> None:
        known = arms.cost_K[k]
        n_before = arms.seen.get(k, 0)
        if n_before == 0:
            if not arms.seen:
                arms.cost_K *= seconds / known
            arms.cost_K[k] = seconds
        arms.seen[k] = n_before + 1
        if n_before == 0:
            return
        seconds = min(seconds, OUTLIER * known)
        if arms.trying is None and n_before >= SETTLED:
            arms.cost_K *= 1 + DRIFT * (seconds / known - 1)
        else:
            arms.cost_K[k] += (NEWS if seconds > known else LOWER) * (seconds - known)

    def _next(self, arms: Arms) -> None:
        arms.left -= 1
        is_over = arms.trying is not None and arms.left <= 0
        if arms.trying is not None and is_over:
            if self.gain_K()[arms.trying] > PROMISING * arms.hope:
                arms.wait = FIRST_WAIT
            arms.trying, arms.left = None, arms.wait
        if arms.trying is None and (is_over or arms.left % LOOK_AGAIN == 0 or len(arms.seen) < 2):
            best = self._best(arms)
            if best != arms.best:
                arms.best, arms.wait, arms.left = best, FIRST_WAIT, FIRST_WAIT
            unknown = [k for k in (0, 1) if k != arms.best and np.isnan(arms.cost_K[k])]
            if arms.best and 0 not in arms.seen:
                unknown = [0]
            if arms.seen.get(arms.best, 0) < SETTLED:  # the very first steps take longer than any behind them
                unknown = []
            if unknown:
                arms.trying, arms.left = unknown[0], TRY_STEPS
            elif arms.left <= 0:
                arms.trying, arms.left = self._another(arms), TRY_STEPS
                arms.hope = float(self.gain_K()[arms.trying])
                arms.wait = min(2 * arms.wait, LAST_WAIT)

    def _best(self, arms: Arms) -> int:
        cost_K = arms.cost_K.copy()
        if np.isnan(cost_K[0]):
            return arms.best
        known = np.flatnonzero(~np.isnan(cost_K))
        if len(known) > 1:  # what was never measured goes on as the last two that were
            low, high = known[-2], known[-1]
            slope = max((cost_K[high] - cost_K[low]) / (high - low), 0.0)
            cost_K[high + 1 :] = cost_K[high] + slope * np.arange(1, len(cost_K) - high)
            cost_K = np.interp(np.arange(len(cost_K)), np.flatnonzero(~np.isnan(cost_K)), cost_K[~np.isnan(cost_K)])
        rate_K = np.where(np.isnan(cost_K), 0.0, self.gain_K() / cost_K)
        best = int(rate_K.argmax())
        return best if rate_K[best] > BETTER * rate_K[arms.best] else arms.best

    def _another(self, arms: Arms) -> int:
        """Turn about 0, which the speed-up is measured by, and the neighbours of the k in use."""
        others = [k for k in dict.fromkeys((arms.best + 1, arms.best - 1, 0)) if 0 <= k <= self.most and k != arms.best]
        arms.n_tries += 1
        return others[arms.n_tries % len(others)]
