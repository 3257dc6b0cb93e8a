"""How long sampled answers are, when only their mean and their limit are known: who still runs after so many tokens.

Of all distributions over 0 to the longest with that mean, the one that supposes nothing else (maximum entropy; Jaynes
1957): a cut exponential, short answers likelier where the mean is below half the limit. It decides how long the last
answer of a batch keeps a machine waiting. Letters: l tokens drawn so far, n answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

UNLIKELY = 1e-6  # that any answer still runs: no step is planned for it
STEEPEST = 700.0  # exp of more overflows; a mean below a 700th of the limit is as good as uncut


class Stretch(NamedTuple):
    """A run of steps in which about as many answers run and about as much has been drawn."""

    n_steps: float
    drawn_tokens: float  # by each that runs, at the middle of the stretch
    running: float  # answers, where any runs


@dataclass(frozen=True, kw_only=True)
class AnswerLengths:
    """Tokens of an answer. The longest is the limit that cuts them (`max_tokens`)."""

    mean_tokens: float
    max_tokens: float

    def __post_init__(self) -> None:
        if not 0 < self.mean_tokens <= self.max_tokens:
            raise ValueError(
                f"a mean answer of {self.mean_tokens} tokens must be above 0 and at most the longest, {self.max_tokens}"
            )

    @cached_property
    def steepness(self) -> float:
        """k of the density exp(-k l / max): 0 is uniform, above 0 favours short answers."""
        wanted = self.mean_tokens / self.max_tokens
        low, high = -STEEPEST, STEEPEST
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if _mean_share(middle) > wanted else (low, middle)
        return (low + high) / 2

    def running_share(self, drawn_tokens: float) -> float:
        """Of the answers, those that go on after so many tokens."""
        if drawn_tokens >= self.max_tokens:
            return 0.0
        k, at = self.steepness, drawn_tokens / self.max_tokens
        if abs(k) < 1e-9:
            return 1.0 - at
        if k > 0:
            return (math.exp(-k * at) - math.exp(-k)) / -math.expm1(-k)
        return math.expm1(-k * (at - 1)) / math.expm1(k)

    def any_runs(self, drawn_tokens: float, n_answers: float) -> float:
        """How likely at least one of them is still running."""
        return -math.expm1(n_answers * math.log1p(-min(self.running_share(drawn_tokens), 1 - 1e-15)))

    def longest_tokens(self, n_answers: float) -> float:
        """Expected length of the longest of them: a batch ends with it."""
        return sum(stretch.n_steps for stretch in self.stretches(n_answers))

    def stretches(self, n_answers: float, *, pieces: int = 32) -> Iterator[Stretch]:
        """The steps of a batch that starts together and whose answers end one by one, in pieces of equal length."""
        reach = self.mean_tokens * math.log(n_answers / UNLIKELY)  # beyond it an uncut exponential has nobody left
        width = (min(self.max_tokens, reach) if self.steepness > 0 else self.max_tokens) / pieces
        for piece in range(pieces):
            drawn = (piece + 0.5) * width
            alive = self.any_runs(drawn, n_answers)
            if alive > UNLIKELY:
                yield Stretch(alive * width, drawn, n_answers * self.running_share(drawn) / alive)


def _mean_share(k: float) -> float:
    """Mean over limit of the cut exponential; it falls from 1 to 0 as k grows."""
    if abs(k) < 1e-6:
        return 0.5 - k / 12
    return 1 / k - 1 / math.expm1(k) if k < STEEPEST / 2 else 1 / k
