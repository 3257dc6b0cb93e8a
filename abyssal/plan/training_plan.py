"""What a training plan says: seconds of a step by part, memory of each rank by part, and hours and cost of many steps.

Owns the answers; `training.py` works them out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from abyssal.plan.layout import Layout
from abyssal.plan.machine_file import Precision
from abyssal.plan.memory import RankMemory
from abyssal.plan.simulate import Timeline

SECONDS_PER_HOUR = 3600.0

Way = Literal["experts", "tensor", "context", "pipeline", "gradients"]


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """One optimizer step of the busiest rank, by part; the parts add up."""

    compute_seconds: float  # forward, backward and what is computed again
    exposed_communication_seconds: float  # of experts, tensor and context parallel, as far as nothing hides it
    bubble_seconds: float
    gradient_communication_seconds: float  # as far as nothing hides it
    optimizer_seconds: float

    @property
    def total_seconds(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True, kw_only=True)
class SentBytes:
    """What a device of the busiest pipeline rank sends in a step, whether anything hides it or not."""

    way: Way  # gradients: and the new weights
    inter_node_bytes: float
    intra_node_bytes: float


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    tokens: float
    steps: float
    hours: float
    device_hours: float
    cost_usd: float | None  # None: the machine has no price


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    layout: Layout
    precision: Precision  # that products are computed in
    stages: tuple[range, ...]  # units of each stage: embedding, layers, head, MTP modules, counted from 0
    timeline: Timeline
    price_usd_per_device_hour: float | None
    tokens_per_step: int
    n_micro_batches: int
    step: StepSeconds
    sent: tuple[SentBytes, ...]
    flops_per_token: float  # forward and backward; MTP and what is computed again left out (as ISCA 2025, table 2)
    peak_flops_per_second: float  # of one device, in the precision of the products, from the data sheet
    memory: tuple[RankMemory, ...]  # by pipeline rank
    memory_limit_bytes: float  # of one device
    bottleneck: str
    advice: str  # what to change, where it does not fit; "" where it does

    @property
    def step_seconds(self) -> float:
        return self.step.total_seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together."""
        return self.tokens_per_step / self.step_seconds

    @property
    def flops_per_second_per_device(self) -> float:
        return self.flops_per_token * self.tokens_per_second / self.layout.n_devices

    @property
    def mfu(self) -> float:
        """Share of the data sheet's peak that the model's own FLOP make use of."""
        return self.flops_per_second_per_device / self.peak_flops_per_second

    @property
    def peak_memory_bytes(self) -> float:
        return max(rank.total_bytes for rank in self.memory)

    @property
    def fits(self) -> bool:
        return self.peak_memory_bytes <= self.memory_limit_bytes

    def for_tokens(self, tokens: float) -> TrainingCost:
        hours = tokens / self.tokens_per_second / SECONDS_PER_HOUR
        device_hours = hours * self.layout.n_devices
        price = self.price_usd_per_device_hour
        return TrainingCost(
            tokens=tokens,
            steps=tokens / self.tokens_per_step,
            hours=hours,
            device_hours=device_hours,
            cost_usd=None if price is None else price * device_hours,
        )
