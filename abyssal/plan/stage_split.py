"""Which units of a model (embedding, layers, head) stand on which pipeline stage, so that the fullest rank is lightest.

Stages are contiguous and none is empty. Owns no times: it is told what each unit costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from abyssal.plan.layout import Layout

ROUNDS = 30  # of halving the interval that the best fullest rank lies in


def split(costs: Sequence[float], layout: Layout) -> list[range]:
    """Indices of the units of each stage. Ranks that hold a stage from each end (DualPipe, V shapes) are weighed whole,
    other stages each by itself, since each is a link of the chain that every micro-batch passes."""
    if len(costs) < layout.n_stages:
        raise ValueError(
            f"parallel: {layout.n_stages} stages are more than embedding, layers and head together ({len(costs)}); "
            f"use less pp or chunks"
        )
    sums = [0.0, *accumulate(costs)]
    from_both_ends = layout.schedule in ("dualpipe", "dualpipev", "zbv")
    attempt: Callable[[float], list[int] | None]
    if from_both_ends:
        attempt = lambda most: _from_both_ends(sums, layout.n_stages // 2, most)  # noqa: E731
    else:
        attempt = lambda most: _one_way(sums, layout.n_stages, most)  # noqa: E731
    low, high = sums[-1] / layout.n_stages, 2 * sums[-1]
    best = attempt(high)
    assert best is not None, "everything fits under the whole"
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        found = attempt(middle)
        low, high, best = (low, middle, found) if found is not None else (middle, high, best)
    return [range(start, end) for start, end in zip([0, *best], [*best, len(costs)], strict=True)]


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


def _from_both_ends(sums: Sequence[float], n_pairs: int, most: float) -> list[int] | None:
    """The same where stages `r` and `-1 - r` together are at most `most`, found from the outside in."""
    failed: set[tuple[int, int, int]] = set()

    def search(left: int, start: int, end: int) -> list[int] | None:
        """Cuts for `left` pairs within units start..end."""
        if left == 1:
            whole = sums[end] - sums[start] <= most and end - start >= 2
            return [(start + end) // 2] if whole else None
        if (left, start, end) in failed:
            return None
        others = 2 * (left - 1)
        for front in range(start + 1, end - others):
            room = most - (sums[front] - sums[start])
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
