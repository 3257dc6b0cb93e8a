"""Loops in a stream of ids: found when they must be, not before, and against the plain definition."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.engine.loops import Loops


def period_ref(ids, *, longest, repeats, at_least):
    """The definition, looked at anew for every id."""
    for p in range(1, longest + 1):
        n = max(repeats * p, at_least)
        tail = ids[-n:]
        if len(ids) >= n and all(tail[i] == tail[i - p] for i in range(p, n)):
            return p
    return None


SMALL = {"longest": 5, "repeats": 3, "at_least": 6}


@settings(max_examples=200)
@given(st.lists(st.integers(0, 2), max_size=60))
def test_after_every_id_it_says_what_the_definition_says(ids):
    loops, seen = Loops(**SMALL), []
    for token in ids:
        loops.push(token)
        seen.append(token)
        assert loops.period == period_ref(seen, **SMALL)


def first_found(ids, **options):
    loops = Loops(**options)
    for i, token in enumerate(ids):
        loops.push(token)
        if loops.period is not None:
            return i + 1, loops.period
    return None


@pytest.mark.parametrize("period", [1, 2, 16, 17, 100, 256])
def test_a_loop_is_stopped_after_four_rounds_and_64_ids(period):
    before = [1000 + i for i in range(37)]
    found = first_found(before + [i % period for i in range(2000)])
    assert found == (37 + max(4 * period, 64), period)


def test_what_repeats_at_a_greater_distance_three_times_or_almost_is_no_loop():
    assert first_found([i % 257 for i in range(4000)]) is None
    assert first_found([i % 100 for i in range(399)]) is None
    assert first_found(list(range(63)) + [7] * 63) is None  # a ruler
    counted = [token for i in range(300) for token in (5, 6, 7, 100 + i)]  # the same but for the number in it
    assert first_found(counted) is None


@pytest.mark.parametrize("options", [{"longest": 0}, {"repeats": 1}, {"at_least": 0}])
def test_what_detects_nothing_is_refused(options):
    with pytest.raises(ValueError, match="give 1, 2 and 1 or more"):
        Loops(**options)
