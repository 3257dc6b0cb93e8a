"""What a stage of a recipe takes, in one form for every kind of work: what tables, the page, --json and refusals read.

Owns the sums over steps and stages. Does not own how a step's seconds came about (training.py, rl.py) nor which stages
there are (stages/plan_recipe.py). Parts add up to their whole; a test holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

from abyssal.plan.training_plan import SECONDS_PER_HOUR, TrainingPlan

SECONDS_PER_DAY = 86400.0


class Sum(NamedTuple):
    """Over stages. Cost is None where a machine has no price."""

    seconds: float
    device_hours: float
    cost_usd: float | None


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """`what` says what is done in a step. Memory has one entry a pipeline rank: part -> bytes at its fullest."""

    stage: str
    what: str
    n_steps: float
    tokens: float  # trained on or drawn, in all steps
    n_devices: int
    price_usd_per_device_hour: float | None
    step_seconds_by_part: Mapping[str, float]
    memory_bytes_by_part: tuple[Mapping[str, float], ...]
    memory_limit_bytes: float  # of one device
    bottleneck: str
    advice: str  # what to change where it does not fit, else what would help most
    training: TrainingPlan | None = None  # of the part of it that trains
    answer_tokens: float = 0.0  # mean of what it draws; 0: it draws nothing
    assumed: tuple[str, ...] = ()  # what no section of the recipe says

    @property
    def step_seconds(self) -> float:
        return sum(self.step_seconds_by_part.values())

    @property
    def seconds(self) -> float:
        return self.n_steps * self.step_seconds

    @property
    def device_hours(self) -> float:
        return self.seconds * self.n_devices / SECONDS_PER_HOUR

    @property
    def cost_usd(self) -> float | None:
        price = self.price_usd_per_device_hour
        return None if price is None else price * self.device_hours

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def mfu(self) -> float | None:
        """Of a stage that does nothing but train."""
        trains_all_the_time = self.training is not None and self.step_seconds == self.training.step_seconds
        return self.training.mfu if self.training is not None and trains_all_the_time else None

    @property
    def rank_bytes(self) -> tuple[float, ...]:
        return tuple(sum(parts.values()) for parts in self.memory_bytes_by_part)

    @property
    def peak_memory_bytes(self) -> float:
        return max(self.rank_bytes, default=0.0)

    @property
    def fits(self) -> bool:
        return self.peak_memory_bytes <= self.memory_limit_bytes


@dataclass(frozen=True, kw_only=True)
class RecipePlan:
    """All stages that are planned, and what was given beside them."""

    name: str
    machine: str  # its title
    machine_note: str  # whether it was measured, and where its figures are
    stages: tuple[StagePlan, ...]
    given_device_hours: float = 0.0
    given_are: str = ""
    price_usd_per_device_hour: float | None = None

    @property
    def planned(self) -> Sum:
        costs = [stage.cost_usd for stage in self.stages]
        return Sum(
            sum(stage.seconds for stage in self.stages),
            sum(stage.device_hours for stage in self.stages),
            None if None in costs else sum(cost for cost in costs if cost is not None),
        )

    @property
    def given_cost_usd(self) -> float | None:
        price = self.price_usd_per_device_hour
        return None if price is None else price * self.given_device_hours

    @property
    def whole(self) -> Sum:
        """With what was given. Its seconds are the planned ones: given hours have no devices to divide by."""
        planned, given = self.planned, self.given_cost_usd
        cost = None if planned.cost_usd is None or given is None else planned.cost_usd + given
        return Sum(planned.seconds, planned.device_hours + self.given_device_hours, cost)

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages)

    @property
    def longest(self) -> StagePlan:
        return max(self.stages, key=lambda stage: stage.seconds)

    @property
    def fullest(self) -> StagePlan:
        return max(self.stages, key=lambda stage: stage.peak_memory_bytes / stage.memory_limit_bytes)


def of_training(
    plan: TrainingPlan, *, stage: str, what: str, tokens: float, assumed: tuple[str, ...] = ()
) -> StagePlan:
    """A stage that does nothing but training steps."""
    return StagePlan(
        stage=stage,
        what=what,
        n_steps=tokens / plan.tokens_per_step,
        tokens=tokens,
        n_devices=plan.layout.n_devices,
        price_usd_per_device_hour=plan.price_usd_per_device_hour,
        step_seconds_by_part=parts_of(plan.step, "_seconds"),
        memory_bytes_by_part=tuple(parts_of(rank, "_bytes") for rank in plan.memory),
        memory_limit_bytes=plan.memory_limit_bytes,
        bottleneck=plan.bottleneck,
        advice=plan.advice,
        training=plan,
        assumed=assumed,
    )


def parts_of(value: object, unit: str) -> dict[str, float]:
    """Fields of a dataclass that end in `unit`, by their name in words: exposed_communication_seconds is
    "exposed communication"."""
    return {
        f.name.removesuffix(unit).replace("_", " "): getattr(value, f.name)
        for f in fields(value)  # type: ignore[arg-type]
        if f.name.endswith(unit)
    }
