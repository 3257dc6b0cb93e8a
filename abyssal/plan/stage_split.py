"""Which units of a model (embedding, layers, head) stand on which pipeline stage, so that the fullest rank is lightest.

Stages are contiguous and none is empty. Owns no times: it is told what each unit costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate

from abyssal.plan.layout import Layout

LEAST_HIDDEN = 0.05  # share of a pair's work that counts as hidden at least: of cuts as good, the even one is taken
ALIKE = 0.02  # a rank fuller by this share is as good where it makes stages more even
ROUNDS = 30  # of halving the interval that the best fullest rank lies in


def split(costs: Sequence[float], layout: Layout, *, hidden_share: float = 0.0) -> list[range]:
    """Indices of the units of each stage. Stages that one rank holds from both ends (DualPipe, V shapes) are weighed
    together: they run in pairs, which hide `hidden_share` of the work of the smaller one twice over. Other stages are
    weighed each by itself, since each is a link of the chain that every micro-batch passes."""
    if len(costs) < layout.n_stages:
        raise ValueError(
            f"parallel: {layout.n_stages} stages are more than embedding, layers and head together ({len(costs)}); "
            f"use less pp or chunks"
        )
    in_pairs = layout.schedule in ("dualpipe", "dualpipev", "zbv")
    cuts = _cuts(tuple(costs), layout.n_stages, max(LEAST_HIDDEN, hidden_share) if in_pairs else None)
    return [range(start, end) for start, end in zip([0, *cuts], [*cuts, len(costs)], strict=True)]


def pair_load(front: float, back: float, hidden_share: float) -> float:
    """What a rank with these two stages is busy for."""
    return front + back - 2 * hidden_share * min(front, back)


@lru_cache(maxsize=64)  # plans of one model under many batches and layouts ask for the same again and again
def _cuts(costs: tuple[float, ...], n: int, hidden_share: float | None) -> tuple[int, ...]:
    sums = [0.0, *accumulate(costs)]
    if hidden_share is None:
        return _lightest(lambda most: _one_way(sums, n, most), 0.0, 2 * sums[-1])[0]
    whole = 2 * sums[-1]
    _, fullest = _lightest(lambda most: _from_both_ends(sums, n // 2, most, whole, hidden_share), 0.0, whole)
    # what the fullest rank leaves open, and a little more, makes stages even
    enough = fullest * (1 + ALIKE)
    return _lightest(lambda most: _from_both_ends(sums, n // 2, enough, most, hidden_share), 0.0, whole)[0]


def _lightest(attempt: Callable[[float], list[int] | None], low: float, high: float) -> tuple[tuple[int, ...], float]:
    """The cuts that the least bound gives for which there are any, and that bound."""
    best = attempt(high)
    assert best is not None, "everything fits under the whole"
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        found = attempt(middle)
        low, high, best = (low, middle, found) if found is not None else (middle, high, best)
    return tuple(best), high


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


def _from_both_ends(
    sums: Sequence[float], n_pairs: int, most: float, most_alone: float, hidden_share: float
) -> list[int] | None:
    """The same where stages `r` and `-1 - r` together are at most `most`, each by itself at most `most_alone`. From the
    outside in: whatever the front takes, it is best that the back takes as much as it may."""
    failed: set[tuple[int, int, int]] = set()

    def fits(start: int, front: int, back: int, end: int) -> bool:
        one, other = sums[front] - sums[start], sums[end] - sums[back]
        return max(one, other) <= most_alone and pair_load(one, other, hidden_share) <= most

    def search(left: int, start: int, end: int) -> list[int] | None:
        """Cuts for `left` pairs within units start..end."""
        if left == 1:
            return next(([middle] for middle in range(start + 1, end) if fits(start, middle, middle, end)), None)
        if (left, start, end) in failed:
            return None
        others = 2 * (left - 1)
        for front in range(start + 1, end - others):
            back = end
            while back - 1 >= front + others and fits(start, front, back - 1, end):
                back -= 1
            if back == end:
                break  # no room for one unit at the far end; a longer front leaves even less
            inside = search(left - 1, front, back)
            if inside is not None:
                return [front, *inside, back]
        failed.add((left, start, end))
        return None

    return search(n_pairs, 0, len(sums) - 1)
