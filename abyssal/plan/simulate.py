"""A schedule gets its times: every job starts when its rank is free and its input has come.

The chain of a micro-batch is forward through all stages, then backward through all of them, so that each piece of work
has exactly one direct input; a weight gradient hangs on its own input gradient. A start is the later of two ends, so
nothing can begin before what it needs: an order that could never run is found, not drawn.
Each rank has two lanes: compute, and communication, which its sends to other stages pass one after the other.
Numbers are added and compared only: with whole numbers or fractions the results are exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from abyssal.plan.schedules import Schedule, ScheduleName, Slot, Work, WorkKind, build_schedule

JobKind = Literal[
    "forward", "backward", "backward_input", "backward_weight", "send", "hidden_experts", "exposed_experts"
]


@dataclass(frozen=True, kw_only=True)
class StageSeconds:
    """One micro-batch through one stage. The communication of experts (all-to-all) is inside `forward_seconds` and
    `backward_input_seconds`, exposed: the two `*_experts_seconds` say how much of them it is. A pair, the forward of
    one micro-batch together with the backward of another, takes less than their sum by what it hides."""

    forward_seconds: float
    backward_input_seconds: float
    backward_weight_seconds: float
    overlapped_pair_seconds: float | None = None  # None: nothing is won, forward and backward one after the other
    send_seconds: float = 0  # activations to the next stage or gradients to the one before, where that is another rank
    forward_experts_seconds: float = 0
    backward_experts_seconds: float = 0

    def __post_init__(self) -> None:
        for name, seconds in vars(self).items():
            if seconds is not None and not seconds >= 0:
                raise ValueError(f"{name}={seconds} is no duration; use 0 or more")
        if self.forward_experts_seconds > self.forward_seconds:
            raise ValueError(
                f"forward_experts_seconds={self.forward_experts_seconds} is part of forward_seconds="
                f"{self.forward_seconds} and cannot be more"
            )
        if self.backward_experts_seconds > self.backward_input_seconds:
            raise ValueError(
                f"backward_experts_seconds={self.backward_experts_seconds} is part of backward_input_seconds="
                f"{self.backward_input_seconds} and cannot be more"
            )

    @property
    def backward_seconds(self) -> float:
        """B of the papers: both halves."""
        return self.backward_input_seconds + self.backward_weight_seconds

    @property
    def pair_seconds(self) -> float:
        """F&B of the papers."""
        if self.overlapped_pair_seconds is None:
            return self.forward_seconds + self.backward_seconds
        return self.overlapped_pair_seconds


class TimedJob(NamedTuple):
    """Two jobs of a rank's compute lane with the same times run together. A send stands on the lane of its sender."""

    rank: int
    lane: Literal["compute", "communication"]
    kind: JobKind
    micro_batch: int
    stage: int
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """One training step on every rank, without the optimizer. Tuples have one entry a rank.

    A rank is busy or idle: its bubble is all that it is idle, of which it waits `waiting_seconds` for a message on its
    way. Hidden communication runs beside work; exposed is the experts' share of busy time, and the waiting.
    """

    schedule: Schedule
    times: tuple[StageSeconds, ...]
    slot_seconds: tuple[tuple[tuple[float, float], ...], ...]  # (start, end) of schedule.orders[rank][slot]
    sends: tuple[tuple[int, int, int, float, float], ...]  # (rank, micro-batch, stage, start, end)
    step_seconds: float
    bubble_seconds: tuple[float, ...]
    waiting_seconds: tuple[float, ...]
    hidden_communication_seconds: tuple[float, ...]
    exposed_communication_seconds: tuple[float, ...]

    @property
    def bubble_share(self) -> float:
        """Of all ranks' time; 0 where there is none."""
        return sum(self.bubble_seconds) / (self.step_seconds * len(self.bubble_seconds) or 1)

    @property
    def hidden_share(self) -> float:
        """Of all communication; 1 where there is none."""
        hidden, exposed = sum(self.hidden_communication_seconds), sum(self.exposed_communication_seconds)
        return hidden / (hidden + exposed) if hidden + exposed else 1.0

    @cached_property
    def jobs(self) -> list[TimedJob]:
        """All that happens, rank by rank in order of start: what is drawn. Experts' communication is drawn as one block
        a slot, hidden at its beginning, exposed at its end; really it comes in pieces, layer by layer."""
        timed = [
            TimedJob(rank, "communication", "send", m, stage, start, end) for rank, m, stage, start, end in self.sends
        ]
        for rank, order in enumerate(self.schedule.orders):
            for slot, (start, end) in zip(order, self.slot_seconds[rank], strict=True):
                timed += [TimedJob(rank, "compute", *work, start, end) for work in slot]
                cost, (_, m, stage) = slot_cost(slot, self.times), slot[0]
                if cost.hidden_seconds:
                    until = start + cost.hidden_seconds
                    timed.append(TimedJob(rank, "communication", "hidden_experts", m, stage, start, until))
                if cost.exposed_seconds:
                    since = end - cost.exposed_seconds
                    timed.append(TimedJob(rank, "communication", "exposed_experts", m, stage, since, end))
        return sorted(timed, key=lambda job: (job.rank, job.start_seconds))


class SlotCost(NamedTuple):
    seconds: float
    hidden_seconds: float  # communication of experts beside computation
    exposed_seconds: float  # communication of experts for which computation waits


def slot_cost(slot: Slot, times: Sequence[StageSeconds]) -> SlotCost:
    """What a slot takes of its rank. What a pair saves is the communication it hides; two unlike stages save together
    the smaller of what each saves with its like."""
    kind, _, stage = slot[0]
    one = times[stage]
    if len(slot) == 2:
        other = times[slot[1].stage]
        apart = one.forward_seconds + other.backward_seconds
        saved = min(t.forward_seconds + t.backward_seconds - t.pair_seconds for t in (one, other))
        experts = one.forward_experts_seconds + other.backward_experts_seconds
        hidden = max(0, min(saved, experts))
        return SlotCost(apart - saved, hidden, experts - hidden)
    if kind == "forward":
        return SlotCost(one.forward_seconds, 0, one.forward_experts_seconds)
    if kind == "backward":
        return SlotCost(one.backward_seconds, 0, one.backward_experts_seconds)
    if kind == "backward_input":
        return SlotCost(one.backward_input_seconds, 0, one.backward_experts_seconds)
    return SlotCost(one.backward_weight_seconds, 0, 0)


def simulate(
    schedule: ScheduleName,
    *,
    n_stages: int,
    n_micro_batches: int,
    times: StageSeconds | Sequence[StageSeconds],
    chunks: int = 1,
) -> Timeline:
    """`n_stages` are the pipeline's ranks (PP). `times` are of one stage, all alike, or of each in order: PP of them,
    PP x chunks for interleaved, 2 PP for zbv and dualpipev, whose ranks hold two stages."""
    built = build_schedule(schedule, n_stages=n_stages, n_micro_batches=n_micro_batches, chunks=chunks)
    return run_schedule(built, times=times)


def run_schedule(schedule: Schedule, *, times: StageSeconds | Sequence[StageSeconds]) -> Timeline:
    """The earliest times at which this order can run."""
    per_stage = (times,) * schedule.n_stages if isinstance(times, StageSeconds) else tuple(times)
    if len(per_stage) != schedule.n_stages:
        raise ValueError(
            f"times are of {len(per_stage)} stages, schedule={schedule.name!r} has {schedule.n_stages}; give each"
        )
    run = _Run(schedule, per_stage)
    runnable = list(range(schedule.n_ranks))
    while runnable:
        run.advance(runnable.pop(), runnable)
    for rank, order in enumerate(schedule.orders):
        if len(run.spans[rank]) < len(order):
            slot = order[len(run.spans[rank])]
            raise ValueError(f"rank {rank} waits for ever for the input of {slot}; put what it needs before it")
    step = max(run.clocks)
    experts = [_experts(order, per_stage) for order in schedule.orders]
    return Timeline(
        schedule=schedule,
        times=per_stage,
        slot_seconds=tuple(tuple(spans) for spans in run.spans),
        sends=tuple(run.sends),
        step_seconds=step,
        bubble_seconds=tuple(idle + step - clock for idle, clock in zip(run.idle, run.clocks, strict=True)),
        waiting_seconds=tuple(run.waited),
        hidden_communication_seconds=tuple(
            hidden + received - waited
            for (hidden, _), received, waited in zip(experts, run.received, run.waited, strict=True)
        ),
        exposed_communication_seconds=tuple(
            exposed + waited for (_, exposed), waited in zip(experts, run.waited, strict=True)
        ),
    )


def _experts(order: Sequence[Slot], times: Sequence[StageSeconds]) -> tuple[float, float]:
    """Hidden and exposed seconds of a rank's communication among experts."""
    if not any(one.forward_experts_seconds or one.backward_experts_seconds for one in times):
        return 0, 0
    counts = Counter(tuple((work.kind, work.stage) for work in slot) for slot in order)
    costs = [(n, slot_cost(tuple(Work(kind, 0, stage) for kind, stage in key), times)) for key, n in counts.items()]
    return sum(n * cost.hidden_seconds for n, cost in costs), sum(n * cost.exposed_seconds for n, cost in costs)


class _Run:
    """How far each rank has come. Work is numbered along the chain of its micro-batch: forward through S stages, back
    through S stages, and behind the chain the weight gradients. `came[number]` is when its input was there, None as
    long as it is not."""

    def __init__(self, schedule: Schedule, times: tuple[StageSeconds, ...]) -> None:
        self.schedule, self.times = schedule, times
        n_stages, n_ranks = schedule.n_stages, schedule.n_ranks
        back = range(2 * n_stages - 1, n_stages - 1, -1)
        self.place: dict[WorkKind, Sequence[int]] = {
            "forward": range(n_stages),
            "backward": back,
            "backward_input": back,
            "backward_weight": range(2 * n_stages, 3 * n_stages),
        }
        self.stride = 3 * n_stages  # from the numbers of one micro-batch to those of the next
        self.ranks = [(*ranks, *reversed(ranks)) for ranks in schedule.stage_ranks]  # along the chain
        self.came: list[float | None] = [None] * (self.stride * schedule.n_micro_batches)
        self.came[:: self.stride] = [0] * schedule.n_micro_batches
        self.left: dict[int, float] = {}  # number -> when the message with its input began to move
        self.waiter: dict[int, int] = {}  # number -> the rank that cannot go on without its input
        self.alone = {
            kind: [slot_cost((Work(kind, 0, stage),), times).seconds for stage in range(n_stages)]
            for kind in self.place
        }
        self.together: dict[tuple[int, int], float] = {}  # stages of forward and backward -> seconds of the pair
        self.any_send = any(one.send_seconds for one in times)
        self.sends: list[tuple[int, int, int, float, float]] = []
        self.spans: list[list[tuple[float, float]]] = [[] for _ in range(n_ranks)]
        self.clocks: list[float] = [0] * n_ranks
        self.lanes: list[float] = [0] * n_ranks  # when a rank's communication lane is free
        self.idle: list[float] = [0] * n_ranks
        self.waited: list[float] = [0] * n_ranks
        self.received: list[float] = [0] * n_ranks

    def advance(self, rank: int, runnable: list[int]) -> None:
        """Run a rank's slots until one lacks its input; whoever waited for what comes out is runnable again."""
        order, spans = self.schedule.orders[rank], self.spans[rank]
        came, waiter, place = self.came, self.waiter, self.place
        stride, last, any_send = self.stride, 2 * self.schedule.n_stages - 1, self.any_send
        for k in range(len(spans), len(order)):
            slot, clock = order[k], self.clocks[rank]
            start, critical = clock, -1
            for kind, m, stage in slot:
                number = m * stride + place[kind][stage]
                at = came[number]
                if at is None:
                    waiter[number] = rank
                    return
                if at > start:
                    start, critical = at, number
            if start > clock:
                self.idle[rank] += start - clock
                if critical in self.left:
                    self.waited[rank] += start - max(clock, self.left[critical])
            end = start + self._seconds(slot)
            self.clocks[rank] = end
            spans.append((start, end))
            for kind, m, stage in slot:
                at_place = place[kind][stage]
                number = m * stride + at_place
                if kind == "backward_input":
                    came[m * stride + place["backward_weight"][stage]] = end
                if at_place < last:
                    came[number + 1] = self._sent(rank, kind, m, stage, end) if any_send else end
                    if number + 1 in waiter:
                        runnable.append(waiter.pop(number + 1))

    def _seconds(self, slot: Slot) -> float:
        kind, _, stage = slot[0]
        if len(slot) == 1:
            return self.alone[kind][stage]
        pair = (stage, slot[1].stage)
        if pair not in self.together:
            self.together[pair] = slot_cost(slot, self.times).seconds
        return self.together[pair]

    def _sent(self, rank: int, kind: WorkKind, m: int, stage: int, end: float) -> float:
        """When what came out is where it is needed next: at once where that is the same rank."""
        seconds, number = self.times[stage].send_seconds, self.place[kind][stage] + 1
        to_rank = self.ranks[m * len(self.ranks) // self.schedule.n_micro_batches][number]
        if to_rank == rank or not seconds:
            return end
        start = max(end, self.lanes[rank])
        self.lanes[rank] = arrival = start + seconds
        self.left[m * self.stride + number] = start
        self.received[to_rank] += seconds
        self.sends.append((rank, m, stage, start, arrival))
        return arrival
