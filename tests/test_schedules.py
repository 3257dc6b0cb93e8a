"""Orders of work: whatever the counts, everything happens once, in its place, and holds what the papers say."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.plan.schedules import Schedule, ScheduleName, Work, build_schedule


class Pipeline(NamedTuple):
    """What `build_schedule` is asked for."""

    name: ScheduleName
    n_stages: int
    n_micro_batches: int
    chunks: int

    def build(self) -> Schedule:
        return build_schedule(
            self.name, n_stages=self.n_stages, n_micro_batches=self.n_micro_batches, chunks=self.chunks
        )


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    """Every schedule, with counts that it takes."""
    name = draw(st.sampled_from(get_args(ScheduleName)))
    n_stages, n_micro_batches, chunks = draw(st.integers(1, 8)), draw(st.integers(1, 24)), 1
    if name == "none":
        n_stages = 1
    elif name == "interleaved":
        chunks = draw(st.integers(1, 4))
        n_micro_batches = n_stages * draw(st.integers(1, 4))
    elif name == "dualpipe":
        n_stages = 2 * draw(st.integers(1, 4))
        n_micro_batches = 2 * n_stages + 2 * draw(st.integers(0, 6))
    elif name == "dualpipev":
        n_micro_batches += 2 * n_stages
    return Pipeline(name, n_stages, n_micro_batches, chunks)


def rank_of(schedule: Schedule, micro_batch: int, stage: int) -> int:
    """With two directions the first half of the micro-batches goes one way, the second the other."""
    return schedule.stage_ranks[micro_batch * len(schedule.stage_ranks) // schedule.n_micro_batches][stage]


@given(pipelines())
@settings(max_examples=150, deadline=None)
def test_every_micro_batch_passes_every_stage_once_each_way(pipeline: Pipeline):
    schedule = pipeline.build()
    done: Counter[tuple[str, int, int]] = Counter()
    for rank, order in enumerate(schedule.orders):
        for slot in order:
            for kind, m, stage in slot:
                assert rank_of(schedule, m, stage) == rank
                halves = ("backward_input", "backward_weight") if kind == "backward" else (kind,)
                done.update((half, m, stage) for half in halves)
    kinds = ("forward", "backward_input", "backward_weight")
    stages, micro_batches = range(schedule.n_stages), range(pipeline.n_micro_batches)
    assert done == Counter((kind, m, stage) for kind in kinds for m in micro_batches for stage in stages)


@given(pipelines())
@settings(max_examples=100, deadline=None)
def test_a_pair_is_a_forward_beside_a_backward_of_the_rank_s_other_stage(pipeline: Pipeline):
    pairs = [slot for order in pipeline.build().orders for slot in order if len(slot) > 1]
    assert all([work.kind for work in pair] == ["forward", "backward"] for pair in pairs)
    assert all(pair[0].stage != pair[1].stage for pair in pairs)
    assert bool(pairs) <= (pipeline.name in ("dualpipe", "dualpipev"))


def letters(schedule: Schedule, rank: int) -> str:
    """F B I W with the micro-batch, stages of a rank's second chunk in lower case, pairs joined."""
    names = {"forward": "F", "backward": "B", "backward_input": "I", "backward_weight": "W"}
    first = schedule.orders[rank][0][0].stage

    def spell(work: Work) -> str:
        letter = names[work.kind]
        return f"{letter if work.stage == first else letter.lower()}{work.micro_batch}"

    return " ".join("&".join(spell(work) for work in slot) for slot in schedule.orders[rank])


def test_1f1b_as_drawn():
    schedule = build_schedule("1f1b", n_stages=3, n_micro_batches=4)
    assert letters(schedule, 0) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert letters(schedule, 2) == "F0 B0 F1 B1 F2 B2 F3 B3"


def test_interleaved_as_drawn():
    """Two ranks, two chunks: micro-batches 0 and 1 through the first chunk, then through the second."""
    schedule = build_schedule("interleaved", n_stages=2, n_micro_batches=4, chunks=2)
    assert letters(schedule, 1) == "F0 F1 f0 b0 f1 b1 F2 B0 F3 B1 f2 b2 f3 b3 B2 B3"
    assert [slot[0].stage for slot in schedule.orders[1][:4]] == [1, 1, 3, 3]


def test_zb1p_as_drawn():
    """The last of three ranks owes two weight gradients, the first none."""
    schedule = build_schedule("zb1p", n_stages=3, n_micro_batches=4)
    assert letters(schedule, 0) == "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3"
    assert letters(schedule, 2) == "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3"


def test_zbv_as_drawn():
    schedule = build_schedule("zbv", n_stages=2, n_micro_batches=4)
    assert letters(schedule, 0) == "F0 F1 F2 f0 i0 w0 f1 i1 w1 F3 I0 W0 f2 i2 w2 I1 W1 f3 i3 w3 I2 W2 I3 W3"
    assert letters(schedule, 1) == "F0 f0 F1 f1 i0 w0 F2 I0 W0 f2 i1 w1 F3 I1 W1 f3 i2 w2 I2 i3 I3 W2 w3 W3"


def test_dualpipe_as_published():
    """Two of the eight ranks of the figure in DeepSeek's repository: 20 micro-batches, from 10 on the other way."""
    schedule = build_schedule("dualpipe", n_stages=8, n_micro_batches=20)
    outermost = letters(schedule, 0)
    assert outermost.startswith(
        "F0 F1 F2 F3 F4 F5 F6 f10 i10 w10 f11 i11 w11 f12 i12 w12 f13 F7&b13 f14&B0 F8&b14 f15&B1"
    )
    assert outermost.endswith("f19&B5 b19 I6 W6 I7 W7 I8 W8 I9 W9")
    innermost = letters(schedule, 3)
    assert innermost.startswith("F0 f10 F1 f11 F2 f12 F3 f13 F4 b10 f14&B0 F5&b11 f15&B1")
    assert innermost.endswith("F9&b15 f19&B5 b16 B6 b17 B7 i18 I8 i19 I9 w18 W8 w19 W9")


@given(pipelines())
@settings(max_examples=100, deadline=None)
def test_what_is_held_is_weighed(pipeline: Pipeline):
    """In bytes it is what it is in pieces, where all stages weigh the same; nothing is held in the end."""
    schedule = pipeline.build()
    pieces = schedule.most_in_flight()
    assert schedule.most_in_flight([3.0] * schedule.n_stages) == tuple(3 * n for n in pieces)
    stages_of_a_rank = schedule.n_stages * len(schedule.stage_ranks) // schedule.n_ranks
    assert all(1 <= n <= stages_of_a_rank * pipeline.n_micro_batches for n in pieces)


def test_activations_of_the_published_table():
    """1F1B: rank r holds PP - r; ZB1P: PP on every rank; DualPipe: PP + 1. (DeepSeek-V3 table 2)"""
    assert build_schedule("1f1b", n_stages=4, n_micro_batches=8).most_in_flight() == (4, 3, 2, 1)
    assert build_schedule("zb1p", n_stages=4, n_micro_batches=8).most_in_flight() == (4, 4, 4, 4)
    assert build_schedule("dualpipe", n_stages=4, n_micro_batches=8).most_in_flight() == (5, 5, 5, 5)


@pytest.mark.parametrize(
    ("name", "n_stages", "n_micro_batches", "chunks", "says"),
    [
        ("none", 2, 4, 1, "schedule='none' is one rank, not n_stages=2"),
        ("1f1b", 0, 4, 1, "n_stages=0"),
        ("1f1b", 2, 4, 2, "chunks=2 belongs to schedule='interleaved'"),
        ("interleaved", 4, 6, 2, "n_micro_batches=6 is no multiple; use 8"),
        ("dualpipe", 3, 12, 1, "n_stages=3 and n_micro_batches=12 must be even"),
        ("dualpipe", 4, 6, 1, "n_micro_batches=6 is less than 8 for n_stages=4"),
        ("dualpipev", 4, 7, 1, "n_micro_batches=7 is less than 8 for n_stages=4"),
        ("gpipe", 2, 4, 1, "schedule='gpipe' is unknown; use one of none, 1f1b"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    name: ScheduleName, n_stages: int, n_micro_batches: int, chunks: int, says: str
):
    with pytest.raises(ValueError, match=says) as caught:
        build_schedule(name, n_stages=n_stages, n_micro_batches=n_micro_batches, chunks=chunks)
    assert "\n" not in str(caught.value)
