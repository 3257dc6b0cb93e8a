"""A schedule gets its times: every job starts when its rank is free and its input has come.

The chain of a micro-batch is forward through all stages, then backward through all of them, so that each piece of work
has exactly one direct input; a weight gradient hangs on its own input gradient. A start is the later of two ends, so
nothing can begin before what it needs: an order that could never run is found, not drawn.
Each rank has two lanes: compute, and communication, which its sends to other stages pass one after the other.
Numbers are added and compared only: with whole numbers or fractions the results are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from abyssal.plan.schedules import Schedule, ScheduleName, Slot, build_schedule

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
    sends: tuple[TimedJob, ...]
    step_seconds: float
    busy_seconds: tuple[float, ...]
    bubble_seconds: tuple[float, ...]
    waiting_seconds: tuple[float, ...]
    hidden_communication_seconds: tuple[float, ...]
    exposed_communication_seconds: tuple[float, ...]

    @property
    def bubble_share(self) -> float:
        """Of all ranks' time."""
        return sum(self.bubble_seconds) / (self.step_seconds * len(self.bubble_seconds))

    @property
    def hidden_share(self) -> float:
        """Of all communication; 1 where there is none."""
        hidden, exposed = sum(self.hidden_communication_seconds), sum(self.exposed_communication_seconds)
        return hidden / (hidden + exposed) if hidden + exposed else 1.0

    @cached_property
    def jobs(self) -> list[TimedJob]:
        """All that happens, rank by rank in order of start: what is drawn. Experts' communication is drawn as one block
        a slot, hidden at its beginning, exposed at its end; really it comes in pieces, layer by layer."""
        timed: list[TimedJob] = list(self.sends)
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
    stuck = [rank for rank, order in enumerate(schedule.orders) if len(run.slots[rank]) < len(order)]
    if stuck:
        rank = stuck[0]
        raise ValueError(
            f"rank {rank} waits for ever for the input of {schedule.orders[rank][len(run.slots[rank])]}: no such order "
            f"can run; put what it needs before it"
        )
    step = max(run.clocks)
    return Timeline(
        schedule=schedule,
        times=per_stage,
        slot_seconds=tuple(tuple(spans) for spans in run.slots),
        sends=tuple(run.sends),
        step_seconds=step,
        busy_seconds=tuple(run.busy),
        bubble_seconds=tuple(step - busy for busy in run.busy),
        waiting_seconds=tuple(run.waiting),
        hidden_communication_seconds=tuple(run.hidden),
        exposed_communication_seconds=tuple(run.exposed),
    )


class _Run:
    """How far each rank has come. Work is numbered: forwards, backwards (or input gradients), weight gradients, each by
    micro-batch and stage; `came[number]` is when its input was there, None as long as it is not."""

    def __init__(self, schedule: Schedule, times: tuple[StageSeconds, ...]) -> None:
        self.schedule, self.times = schedule, times
        self.n_stages = schedule.n_stages
        self.n_each = schedule.n_micro_batches * schedule.n_stages
        self.first = {"forward": 0, "backward": self.n_each, "backward_input": self.n_each}
        self.first["backward_weight"] = 2 * self.n_each
        self.came: list[float | None] = [None] * (3 * self.n_each)
        self.came[0 : self.n_each : self.n_stages] = [0] * schedule.n_micro_batches
        self.sent: list[float | None] = [None] * (3 * self.n_each)  # when the message that brought it left
        self.waiter: dict[int, int] = {}  # number -> the rank that cannot go on without its input
        self.costs: dict[tuple[object, ...], SlotCost] = {}
        ranks = range(schedule.n_ranks)
        self.slots: list[list[tuple[float, float]]] = [[] for _ in ranks]
        self.sends: list[TimedJob] = []
        self.clocks: list[float] = [0 for _ in ranks]
        self.lanes: list[float] = [0 for _ in ranks]  # when a rank's communication lane is free
        self.busy: list[float] = [0 for _ in ranks]
        self.waiting: list[float] = [0 for _ in ranks]
        self.hidden: list[float] = [0 for _ in ranks]
        self.exposed: list[float] = [0 for _ in ranks]

    def advance(self, rank: int, runnable: list[int]) -> None:
        """Run a rank's slots until one lacks its input; whoever waited for what comes out is runnable again."""
        order, done = self.schedule.orders[rank], self.slots[rank]
        for k in range(len(done), len(order)):
            slot = order[k]
            clock = start = self.clocks[rank]
            message: float | None = None
            for kind, m, stage in slot:
                number = self.first[kind] + m * self.n_stages + stage
                came = self.came[number]
                if came is None:
                    self.waiter[number] = rank
                    return
                if came > start:
                    start, message = came, self.sent[number]
            if message is not None:
                late = start - max(clock, message)
                self.waiting[rank] += late
                self.exposed[rank] += late
                self.hidden[rank] -= late
            key = tuple(part for kind, _, stage in slot for part in (kind, stage))
            cost = self.costs.get(key)
            if cost is None:
                cost = self.costs[key] = slot_cost(slot, self.times)
            end = start + cost.seconds
            self.busy[rank] += cost.seconds
            self.hidden[rank] += cost.hidden_seconds
            self.exposed[rank] += cost.exposed_seconds
            self.clocks[rank] = end
            done.append((start, end))
            for kind, m, stage in slot:
                if kind != "backward_weight":
                    self._hand_on(kind, m, stage, rank, end, runnable)

    def _hand_on(self, kind: str, m: int, stage: int, rank: int, end: float, runnable: list[int]) -> None:
        """What came out goes to the next stage, back to the one before, or turns around at the last."""
        number = m * self.n_stages + stage
        if kind == "backward_input":
            self._arrive(2 * self.n_each + number, end, runnable)
        if kind == "forward" and stage == self.n_stages - 1:
            self._arrive(self.n_each + number, end, runnable)
            return
        if kind != "forward" and stage == 0:
            return
        to_stage = stage + 1 if kind == "forward" else stage - 1
        target = (0 if kind == "forward" else self.n_each) + m * self.n_stages + to_stage
        seconds = self.times[stage].send_seconds
        direction = self.schedule.stage_ranks[m * len(self.schedule.stage_ranks) // self.schedule.n_micro_batches]
        if seconds and direction[to_stage] != rank:
            start = max(end, self.lanes[rank])
            self.lanes[rank] = end = start + seconds
            self.sent[target] = start
            self.sends.append(TimedJob(rank, "communication", "send", m, stage, start, end))
            self.hidden[direction[to_stage]] += seconds
        self._arrive(target, end, runnable)

    def _arrive(self, number: int, came: float, runnable: list[int]) -> None:
        self.came[number] = came
        rank = self.waiter.pop(number, None)
        if rank is not None:
            runnable.append(rank)
