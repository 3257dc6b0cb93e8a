"""The plan of a run on the machine it runs on: what cannot fit is refused first, and in the end the plan stands beside
what was measured, on the screen and in metrics.jsonl.

Owns the comparison. Does not own the plan (plan_recipe.py), the limits (refuse.py) or the record (record.py). Cheap:
arithmetic alone, with the rates of the measured file if there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from abyssal.machine import return_freed_memory
from abyssal.plan.in_words import bytes_text, deviation_text, seconds_text
from abyssal.plan.machine_file import MachineSpec
from abyssal.plan.memory_limit import forget_peak, resident_bytes
from abyssal.plan.refuse import refuse_beyond
from abyssal.plan.stage_plan import StagePlan
from abyssal.record import amend_last, read_steps, seconds_of_work
from abyssal.stages.machine_here import MachineHere, machine_here
from abyssal.stages.plan_recipe import PLANNERS
from abyssal.stages.recipe import Recipe

PASSING = ("gradients", "activations", "temporary")  # parts of memory that come and go with every step


@dataclass(frozen=True)
class Forecast:
    """Plans by the directory that their work leaves its metrics in: `distil`, `distil/base`, `distil/traces`."""

    plans: dict[str, StagePlan]
    unplanned: dict[str, str]  # stage -> why
    here: MachineHere

    def of_stage(self, stage: str) -> list[StagePlan]:
        return [plan for name, plan in self.plans.items() if name.split("/")[0] == stage]


def forecast(recipe: Recipe, device: torch.device, stages: tuple[str, ...]) -> Forecast:
    """What these stages take here, on one device, whatever machine the recipe's [plan] names. What has no plan is no
    reason not to run."""
    here = machine_here(device, torch.get_num_threads())
    plans: dict[str, StagePlan] = {}
    unplanned: dict[str, str] = {}
    for stage in stages:
        if stage in PLANNERS:
            try:
                plans |= {plan.stage: plan for plan in PLANNERS[stage](recipe, here.spec, stage)}
            except ValueError as error:
                unplanned[stage] = str(error)
    return Forecast(plans, unplanned, here)


def check_fits(forecast: Forecast, stages: tuple[str, ...], console: Console) -> None:
    """Before anything is spent: a ValueError for the first stage that could never fit."""
    for plan in (plan for stage in stages for plan in forecast.of_stage(stage)):
        rank = max(range(len(plan.rank_bytes)), key=lambda r: plan.rank_bytes[r])
        warning = refuse_beyond(
            forecast.here.limit,
            plan.peak_memory_bytes,
            what=plan.stage,
            parts=plan.memory_bytes_by_part[rank],
            change=plan.advice or "make the model, the rows or the micro-batches smaller",
            override="--plan.no-refuse",
        )
        if warning:
            console.print(f"[dim]{warning}[/dim]", highlight=False, soft_wrap=True)


def begin_measuring(device: torch.device) -> int:
    """Bytes that this process holds before a stage; its peak begins anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return_freed_memory()
    forget_peak()
    return resident_bytes()


def peak_above(before_bytes: int, device: torch.device) -> int:
    """0 where the system does not say."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes("VmHWM")
    return max(0, peak - before_bytes) if peak else 0


def say_beside(forecast: Forecast, stage: str, directory: Path, *, memory_bytes: int, console: Console) -> None:
    """Planned beside measured, a line a part of the stage; the pair goes into the last entry of its metrics.jsonl.

    Memory is the whole stage's peak, so it stands beside the fullest of its parts.
    """
    plans = forecast.of_stage(stage)
    fullest = max((process_bytes(plan, forecast.here.spec) for plan in plans), default=0.0)
    for plan in plans:
        path = directory / plan.stage / "metrics.jsonl"
        steps = read_steps(path)
        if not steps:
            continue
        measured_seconds = seconds_of_work(steps) / len(steps)
        pair = {"planned_step_seconds": plan.step_seconds, "measured_step_seconds": measured_seconds}
        said = compared("a step", plan.step_seconds, measured_seconds, seconds_text)
        if plan.stage == stage and memory_bytes:
            pair |= {"planned_memory_bytes": fullest, "measured_memory_bytes": memory_bytes}
            said += "; " + compared("memory", fullest, memory_bytes, bytes_text)
        lengths = [step["length"] for step in steps if "length" in step]
        if plan.answer_tokens and lengths:
            said += f"; answers of {sum(lengths) / len(lengths):.0f} tokens, planned {plan.answer_tokens:.0f}"
        amend_last(path, pair)
        console.print(f"[dim]{plan.stage}: {said}; {forecast.here.note}[/dim]", highlight=False, soft_wrap=True)


def process_bytes(plan: StagePlan, machine: MachineSpec) -> float:
    """What the system shows of this process for the planned tensors: libraries, and holes between those that come and
    go with every step, as far as the machine's file has measured them."""
    (parts,) = plan.memory_bytes_by_part
    passing_bytes = sum(parts.get(name, 0.0) for name in PASSING)
    lasting_bytes = plan.peak_memory_bytes - passing_bytes
    return machine.resident_bytes(lasting_bytes=lasting_bytes, passing_bytes=passing_bytes)


def compared(what: str, planned: float, measured: float, text: Callable[[float], str]) -> str:
    return f"{what} planned {text(planned)}, measured {text(measured)} (plan {deviation_text(planned, measured)})"
