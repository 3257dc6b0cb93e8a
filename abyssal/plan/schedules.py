"""Orders of a training step's work on the ranks of a pipeline: 1F1B, interleaved, ZB1P, ZBV, DualPipe and DualPipeV.

A schedule says who does what after what, never when: `simulate.py` gives it times. Per rank it is a list of slots, one
after the other; a slot is one piece of work, or a forward and a backward that run together (DualPipe's F&B).
Letters of the papers: PP ranks, F forward, B full backward, I backward for inputs, W backward for weights, B = I + W.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

ScheduleName = Literal["none", "1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev"]
WorkKind = Literal["forward", "backward", "backward_input", "backward_weight"]


class Work(NamedTuple):
    """One micro-batch through one stage, once. "backward" is both halves at once."""

    kind: WorkKind
    micro_batch: int
    stage: int


Slot = tuple[Work, ...]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """`orders[rank]` are its slots. `stage_ranks[direction][stage]` is where a stage lies: DualPipe lays every stage on
    two ranks, and the second half of the micro-batches goes the other way; all others have one direction."""

    name: ScheduleName
    n_micro_batches: int
    stage_ranks: tuple[tuple[int, ...], ...]
    orders: tuple[tuple[Slot, ...], ...]

    @property
    def n_ranks(self) -> int:
        return len(self.orders)

    @property
    def n_stages(self) -> int:
        return len(self.stage_ranks[0])

    def most_in_flight(self, stage_weights: Sequence[float] | None = None) -> tuple[float, ...]:
        """The most activations that each rank holds at once, from a forward to the last backward that reads them: in
        micro-batches of a stage, or in what one of each stage weighs, in bytes for instance. A pair's forward makes
        its own before its backward frees others."""
        weights = [1.0] * self.n_stages if stage_weights is None else stage_weights
        peaks = []
        for order in self.orders:
            held = peak = 0.0
            for slot in order:
                for kind, _, stage in slot:  # a pair's forward stands before its backward
                    if kind == "forward":
                        held += weights[stage]
                        peak = max(peak, held)
                    elif kind != "backward_input":
                        held -= weights[stage]
            peaks.append(peak)
        return tuple(peaks)


def build_schedule(name: ScheduleName, *, n_stages: int, n_micro_batches: int, chunks: int = 1) -> Schedule:
    """`n_stages` are the pipeline's ranks (PP). Interleaved cuts the model into PP x chunks stages, zbv and dualpipev
    into 2 PP; dualpipe has PP, each twice."""
    if n_stages < 1 or n_micro_batches < 1 or chunks < 1:
        raise ValueError(f"n_stages={n_stages}, n_micro_batches={n_micro_batches}, chunks={chunks} must be at least 1")
    if chunks > 1 and name != "interleaved":
        raise ValueError(f"chunks={chunks} belongs to schedule='interleaved', not {name!r}; leave it out")
    down = tuple(range(n_stages))
    stage_ranks: tuple[tuple[int, ...], ...] = (down,)
    if name == "none":
        if n_stages > 1:
            raise ValueError(f"schedule='none' is one rank, not n_stages={n_stages}; choose '1f1b' or another")
        orders = _alone(one_f_one_b(n_ranks=1, n_micro_batches=n_micro_batches))
    elif name == "1f1b":
        orders = _alone(one_f_one_b(n_ranks=n_stages, n_micro_batches=n_micro_batches))
    elif name == "interleaved":
        stage_ranks = (down * chunks,)
        orders = _alone(interleaved(n_ranks=n_stages, n_micro_batches=n_micro_batches, chunks=chunks))
    elif name == "zb1p":
        orders = _alone(zb1p(n_ranks=n_stages, n_micro_batches=n_micro_batches))
    elif name == "zbv":
        stage_ranks = (down + down[::-1],)
        orders = _alone(zbv(n_ranks=n_stages, n_micro_batches=n_micro_batches))
    elif name == "dualpipe":
        stage_ranks = (down, down[::-1])
        orders = dualpipe(n_ranks=n_stages, n_micro_batches=n_micro_batches)
    elif name == "dualpipev":
        stage_ranks = (down + down[::-1],)
        orders = dualpipev(n_ranks=n_stages, n_micro_batches=n_micro_batches)
    else:
        raise ValueError(f"schedule={name!r} is unknown; use one of {', '.join(get_args(ScheduleName))}")
    return Schedule(
        name=name,
        n_micro_batches=n_micro_batches,
        stage_ranks=stage_ranks,
        orders=tuple(tuple(order) for order in orders),
    )


def one_f_one_b(*, n_ranks: int, n_micro_batches: int) -> list[list[Work]]:
    """Warm up, then one forward, one backward, then drain. (PipeDream-Flush, arXiv 2006.09503)"""
    orders = []
    for rank in range(n_ranks):
        ahead = min(n_ranks - 1 - rank, n_micro_batches)  # forwards before the first backward can come back
        order = [Work("forward", m, rank) for m in range(ahead)]
        for m in range(n_micro_batches):
            if m + ahead < n_micro_batches:
                order.append(Work("forward", m + ahead, rank))
            order.append(Work("backward", m, rank))
        orders.append(order)
    return orders


def interleaved(*, n_ranks: int, n_micro_batches: int, chunks: int) -> list[list[Work]]:
    """1F1B with several chunks of layers a rank, PP micro-batches at a time. (Narayanan et al. 2021, section 2.2)"""
    if n_micro_batches % n_ranks:
        raise ValueError(
            f"interleaved feeds n_stages={n_ranks} micro-batches at a time, and n_micro_batches={n_micro_batches} "
            f"is no multiple; use {-(-n_micro_batches // n_ranks) * n_ranks}"
        )
    n_works = n_micro_batches * chunks

    def numbered(k: int, rank: int, *, backward: bool) -> Work:
        """The k-th forward (or backward) of a rank: PP micro-batches through a chunk, then through the next."""
        round_, within = divmod(k, n_ranks * chunks)
        chunk, m = divmod(within, n_ranks)
        stage = (chunks - 1 - chunk if backward else chunk) * n_ranks + rank
        return Work("backward" if backward else "forward", round_ * n_ranks + m, stage)

    orders = []
    for rank in range(n_ranks):
        ahead = min(2 * (n_ranks - 1 - rank) + (chunks - 1) * n_ranks, n_works)
        if chunks == 1:
            ahead = n_ranks - 1 - rank  # 1F1B itself
        order = [numbered(k, rank, backward=False) for k in range(ahead)]
        for k in range(n_works):
            if k + ahead < n_works:
                order.append(numbered(k + ahead, rank, backward=False))
            order.append(numbered(k, rank, backward=True))
        orders.append(order)
    return orders


def zb1p(*, n_ranks: int, n_micro_batches: int) -> list[list[Work]]:
    """1F1B whose weight gradients lag behind: rank r owes r of them, so that all ranks hold as much as the first, input
    gradients go back at once, and the debts fill the end. (ZB-H1: Qi et al. 2023, arXiv 2401.10241, section 2.1)"""
    orders = []
    for rank, order in enumerate(one_f_one_b(n_ranks=n_ranks, n_micro_batches=n_micro_batches)):
        split = []
        for work in order:
            if work.kind == "forward":
                split.append(work)
                continue
            split.append(work._replace(kind="backward_input"))
            if work.micro_batch >= rank:
                split.append(Work("backward_weight", work.micro_batch - rank, rank))
        owed = range(max(0, n_micro_batches - rank), n_micro_batches)
        orders.append(split + [Work("backward_weight", m, rank) for m in owed])
    return orders


def zbv(*, n_ranks: int, n_micro_batches: int) -> list[list[Work]]:
    """Stages go down the ranks and up again, so that the loss is where the micro-batch came in and backwards begin
    early. Made for F = I = W. (Qi et al. 2023, arXiv 2401.10241, section 6)"""
    n = max(n_micro_batches, 2 * n_ranks - 1)  # fewer leave places of the order empty
    orders = []
    for rank in range(n_ranks):
        down, up = _Chunk(range(n), rank), _Chunk(range(n), 2 * n_ranks - 1 - rank)
        order = [down.forward() for _ in range(2 * (n_ranks - rank) - 1)]
        for _ in range(rank):
            order += [up.forward(), down.forward()]
        for _ in range(n_ranks - rank):
            order += [up.forward(), up.backward_input(), up.backward_weight()]
        while up.n_forward < n:
            if down.n_forward < n:
                order.append(down.forward())
            order += [down.backward_input(), down.backward_weight()]
            order += [up.forward(), up.backward_input(), up.backward_weight()]
        for _ in range(rank):
            order += [down.backward_input(), up.backward_input()]
        for _ in range(n_ranks - rank):
            order += [down.backward_input(), down.backward_weight()]
        order += [up.backward_weight() for _ in range(n - up.n_weight)]
        order += [down.backward_weight() for _ in range(n - down.n_weight)]
        orders.append([work for work in order if work.micro_batch < n_micro_batches])
    return orders


def dualpipe(*, n_ranks: int, n_micro_batches: int) -> list[list[Slot]]:
    """Micro-batches enter at both ends, and the forward of one direction runs beside the backward of the other.
    (DeepSeek-V3 section 3.2.1; deepseek-ai/DualPipe)"""
    if n_ranks % 2 or n_micro_batches % 2:
        raise ValueError(
            f"dualpipe feeds both ends alike: n_stages={n_ranks} and n_micro_batches={n_micro_batches} must be even"
        )
    _enough("dualpipe", n_ranks, n_micro_batches)
    half, n = n_ranks // 2, n_micro_batches // 2
    one_way, other_way = range(n), range(n, n_micro_batches)
    orders = []
    for rank in range(n_ranks):
        ours, theirs = (one_way, other_way) if rank < half else (other_way, one_way)
        depth = min(rank, n_ranks - 1 - rank)  # of the end at which ours come in
        near, far = _Chunk(ours, depth), _Chunk(theirs, n_ranks - 1 - depth)
        orders.append(_both_ways(near, far, depth=depth, n_depths=half, n=n))
    return orders


def dualpipev(*, n_ranks: int, n_micro_batches: int) -> list[list[Slot]]:
    """DualPipe cut in half: what came from the other end comes back up a V, and no stage is held twice.
    (deepseek-ai/DualPipe, dualpipev.py)"""
    _enough("dualpipev", n_ranks, n_micro_batches)
    ids = range(n_micro_batches)
    return [
        _both_ways(
            _Chunk(ids, rank), _Chunk(ids, 2 * n_ranks - 1 - rank), depth=rank, n_depths=n_ranks, n=n_micro_batches
        )
        for rank in range(n_ranks)
    ]


def _enough(name: str, n_ranks: int, n_micro_batches: int) -> None:
    if n_micro_batches < 2 * n_ranks:
        raise ValueError(
            f"{name} fills its pipeline with two micro-batches a rank: n_micro_batches={n_micro_batches} is less than "
            f"{2 * n_ranks} for n_stages={n_ranks}; use more micro-batches or fewer stages"
        )


def _both_ways(near: _Chunk, far: _Chunk, *, depth: int, n_depths: int, n: int) -> list[Slot]:
    """A rank at `depth` from where `near`'s n micro-batches come in; `far`'s reach it late, and turn around early."""
    below = n_depths - 1 - depth
    owed: deque[_Chunk] = deque()  # whose weight gradients are still to come
    order: list[Slot] = [(near.forward(),) for _ in range(2 * below)]
    for _ in range(depth + 1):
        order += [(near.forward(),), (far.forward(),)]
    for _ in range(below):
        order += [(far.backward_input(),), (far.backward_weight(),), (far.forward(),)]
    for k in range(n - 2 * n_depths + depth + 1):
        if k == 0 and below == 0:  # the innermost has nothing to wait for yet: one after the other is sooner
            order += [(near.forward(),), (far.backward(),)]
        else:
            order.append((near.forward(), far.backward()))
        order.append((far.forward(), near.backward()))
    for _ in range(below):
        order += [(far.backward(),), (far.forward(), near.backward())]
    for k in range(2 * (depth + 1)):
        chunk = near if k % 2 else far
        if k <= depth:
            order.append((chunk.backward(),))
        else:
            order.append((chunk.backward_input(),))
            owed.append(chunk)
    for _ in range(below):
        order += [(owed.popleft().backward_weight(),), (near.backward_input(),)]
        owed.append(near)
    return order + [(chunk.backward_weight(),) for chunk in owed]


class _Chunk:
    """One stage on one rank: each kind of work takes its micro-batches in their order."""

    def __init__(self, micro_batches: Sequence[int], stage: int) -> None:
        self.micro_batches, self.stage = micro_batches, stage
        self.n_forward = self.n_backward = self.n_weight = 0

    def forward(self) -> Work:
        self.n_forward += 1
        return Work("forward", self.micro_batches[self.n_forward - 1], self.stage)

    def backward(self) -> Work:
        """Both halves. No weight gradient may be owed from before."""
        self.n_backward += 1
        self.n_weight += 1
        return Work("backward", self.micro_batches[self.n_backward - 1], self.stage)

    def backward_input(self) -> Work:
        self.n_backward += 1
        return Work("backward_input", self.micro_batches[self.n_backward - 1], self.stage)

    def backward_weight(self) -> Work:
        self.n_weight += 1
        return Work("backward_weight", self.micro_batches[self.n_weight - 1], self.stage)


def _alone(orders: Sequence[Sequence[Work]]) -> list[list[Slot]]:
    """Nothing runs together."""
    return [[(work,) for work in order] for order in orders]
