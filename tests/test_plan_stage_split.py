from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.plan.layout import Layout
from abyssal.plan.stage_split import ALIKE, LEAST_HIDDEN, pair_load, split

COSTS = st.lists(st.integers(min_value=0, max_value=9), min_size=4, max_size=10)


def loads(costs, stages, layout: Layout) -> list[float]:
    """What the ranks of V shapes carry, or each stage by itself."""
    each = [sum(costs[i] for i in stage) for stage in stages]
    if layout.schedule in ("dualpipe", "dualpipev"):
        return [pair_load(each[i], each[-1 - i], LEAST_HIDDEN) for i in range(len(each) // 2)]
    return each


@pytest.mark.parametrize(
    "layout",
    [
        Layout(pp=4, schedule="1f1b"),
        Layout(pp=2, chunks=2, schedule="interleaved"),
        Layout(pp=4, schedule="dualpipe"),
        Layout(pp=2, schedule="dualpipev"),
    ],
    ids=lambda layout: layout.schedule,
)
@settings(max_examples=40)
@given(COSTS)
def test_no_other_cut_is_lighter(layout: Layout, costs: list[int]):
    stages = split(costs, layout)
    assert [i for stage in stages for i in stage] == list(range(len(costs)))
    assert all(len(stage) for stage in stages) and len(stages) == 4
    best = min(
        max(loads(costs, [range(a, b) for a, b in zip((0, *cuts), (*cuts, len(costs)), strict=True)], layout))
        for cuts in combinations(range(1, len(costs)), 3)
    )
    assert best - 1e-6 <= max(loads(costs, stages, layout)) <= best * (1 + ALIKE) + 1e-6


def test_both_stages_of_a_rank_are_alike():
    """61 layers, and head with MTP as heavy as four: ranks carry eight or nine, none more than five on one stage."""
    layout = Layout(pp=16, schedule="dualpipe")
    costs = [0.0, *[1.0] * 61, 4.0]
    stages = split(costs, layout)
    each = [sum(costs[i] for i in stage) for stage in stages]
    assert max(each[i] + each[-1 - i] for i in range(8)) == 9
    assert max(sum(costs[i] for i in stage) for stage in stages) == 5


def test_more_stages_than_units_are_refused():
    with pytest.raises(ValueError, match="4 stages are more than embedding, layers and head together"):
        split([1.0, 1.0, 1.0], Layout(pp=4, schedule="1f1b"))
