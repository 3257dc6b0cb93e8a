"""Which units of a model (embedding, layers, head) stand on which pipeline stage, so that the fullest rank is lightest.

Stages are contiguous and none is empty. Owns no times: it is told what each unit costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate

from abyssal.plan.layout import Layout

ALIKE = 0.02  # a rank fuller by this share is as good where it makes stages more even
ROUNDS = 30  # of halving the interval that the best fullest rank lies in


def split(costs: Sequence[float], layout: Layout) -> list[range]:
    """Indices of the units of each stage. Ranks that hold a stage from each end (DualPipe, V shapes) are weighed whole,
    other stages each by itself, since each is a link of the chain that every micro-batch passes."""
    if len(costs) < layout.n_stages:
        raise ValueError(
            f"parallel: {layout.n_stages} stages are more than embedding, layers and head together ({len(costs)}); "
            f"use less pp or chunks"
        )
    from_both_ends = layout.schedule in ("dualpipe", "dualpipev", "zbv")
    cuts = _cuts(tuple(costs), layout.n_stages, from_both_ends)
    return [range(start, end) for start, end in zip([0, *cuts], [*cuts, len(costs)], strict=True)]


@lru_cache(maxsize=64)  # plans of one model under many batches and layouts ask for the same again and again
def _cuts(costs: tuple[float, ...], n: int, from_both_ends: bool) -> list[int]:
    sums = [0.0, *accumulate(costs)]
    low, high = sums[-1] / n, 2 * sums[-1]
    if not from_both_ends:
        return _lightest(lambda most: _one_way(sums, n, most), low, high)[0]
    _, fullest = _lightest(lambda most: _from_both_ends(sums, n // 2, most, most), 2 * low, high)
    # of the cuts that are about as good, the one with the lightest single stage: the two of a rank run as pairs
    enough = fullest * (1 + ALIKE)
    return _lightest(lambda most: _from_both_ends(sums, n // 2, enough, most), low, enough)[0]


def _lightest(attempt: Callable[[float], list[int] | None], low: float, high: float) -> tuple[list[int], float]:
    """The cuts that the least bound gives for which there are any, and that bound."""
    best = attempt(high)
    assert best is not None, "everything fits under the whole"
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        found = attempt(middle)
        low, high, best = (low, middle, found) if found is not None else (middle, high, best)
    return best, high


def _one_way(sums: Sequence[float], n_stages: int, most: float) -> list[int] | None:
    """Cuts between stages of at most `most`, or None. Filling each stage as far as it goes is best."""
    n, start, cuts = len(sums) - 1, 0, []
    for later in range(n_stages - 1, -1, -1):
        end = start
        while end < n - later and sums[end + 1] - sums[start] <= most:
            end += 1
        if end == start:
            return None
        cuts.append(end)
        start = end
    return cuts[:-1] if start == n else None


def _from_both_ends(sums: Sequence[float], n_pairs: int, most: float, most_alone: float) -> list[int] | None:
    """The same where stages `r` and `-1 - r` are at most `most` together and `most_alone` by themselves. From the
    outside in: whatever the front takes, it is best that the back takes as much as it may."""
    failed: set[tuple[int, int, int]] = set()

    def search(left: int, start: int, end: int) -> list[int] | None:
        """Cuts for `left` pairs within units start..end."""
        if left == 1:
            return _halved(sums, start, end, most_alone) if sums[end] - sums[start] <= most else None
        if (left, start, end) in failed:
            return None
        others = 2 * (left - 1)
        for front in range(start + 1, end - others):
            if sums[front] - sums[start] > most_alone:
                break
            room = min(most_alone, most - (sums[front] - sums[start]))
            back = end
            while back - 1 >= front + others and sums[end] - sums[back - 1] <= room:
                back -= 1
            if back == end:
                break  # no room for one unit at the far end; a longer front leaves even less
            inside = search(left - 1, front, back)
            if inside is not None:
                return [front, *inside, back]
        failed.add((left, start, end))
        return None

    return search(n_pairs, 0, len(sums) - 1)


def _halved(sums: Sequence[float], start: int, end: int, most_alone: float) -> list[int] | None:
    for middle in range(start + 1, end):
        if max(sums[middle] - sums[start], sums[end] - sums[middle]) <= most_alone:
            return [middle]
    return None
