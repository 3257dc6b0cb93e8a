"""Orders of a training step's work on the ranks of a pipeline: 1F1B and interleaved 1F1B.

A schedule says who does what after what, never when: `simulate.py` gives it times. Per rank it is a list of slots, one
after the other; a slot is one piece of work, or a forward and a backward that run together (DualPipe's F&B).
Letters of the papers: PP ranks, F forward, B full backward, I backward for inputs, W backward for weights, B = I + W.
"""

from __future__ import annotations

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

    def rank_of(self, work: Work) -> int:
        direction = work.micro_batch * len(self.stage_ranks) // self.n_micro_batches
        return self.stage_ranks[direction][work.stage]


def build_schedule(name: ScheduleName, *, n_stages: int, n_micro_batches: int, chunks: int = 1) -> Schedule:
    """`n_stages` are the pipeline's ranks (PP); interleaved cuts the model into PP x chunks stages."""
    if n_stages < 1 or n_micro_batches < 1 or chunks < 1:
        raise ValueError(f"n_stages={n_stages}, n_micro_batches={n_micro_batches}, chunks={chunks} must be at least 1")
    if chunks > 1 and name != "interleaved":
        raise ValueError(f"chunks={chunks} belongs to schedule='interleaved', not {name!r}; leave it out")
    if name == "none":
        if n_stages > 1:
            raise ValueError(f"schedule='none' is one rank, not n_stages={n_stages}; choose '1f1b' or another")
        return _straight(name, one_f_one_b(n_ranks=1, n_micro_batches=n_micro_batches), n_micro_batches)
    if name == "1f1b":
        return _straight(name, one_f_one_b(n_ranks=n_stages, n_micro_batches=n_micro_batches), n_micro_batches)
    if name == "interleaved":
        orders = interleaved(n_ranks=n_stages, n_micro_batches=n_micro_batches, chunks=chunks)
        stage_ranks = tuple(range(n_stages)) * chunks
        return Schedule(name=name, n_micro_batches=n_micro_batches, stage_ranks=(stage_ranks,), orders=_slots(orders))
    raise ValueError(f"schedule={name!r} is unknown; use one of {', '.join(get_args(ScheduleName))}")


def one_f_one_b(*, n_ranks: int, n_micro_batches: int) -> list[list[Work]]:
    """Warm up, then one forward, one backward, then drain. (PipeDream-Flush, arXiv 2006.09503 section 3)"""
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


def _slots(orders: Sequence[Sequence[Work]]) -> tuple[tuple[Slot, ...], ...]:
    return tuple(tuple((work,) for work in order) for order in orders)


def _straight(name: ScheduleName, orders: Sequence[Sequence[Work]], n_micro_batches: int) -> Schedule:
    """Stage s lies on rank s."""
    stage_ranks = tuple(range(len(orders)))
    return Schedule(name=name, n_micro_batches=n_micro_batches, stage_ranks=(stage_ranks,), orders=_slots(orders))
