"""In words: what holds a step up most, and what to change where it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from abyssal.plan.in_words import bytes_text, percent_text
from abyssal.plan.layout import Layout
from abyssal.plan.roofline import WorkSeconds
from abyssal.plan.training_plan import StepSeconds, TrainingPlan


def bottleneck_of(step: StepSeconds, busy: WorkSeconds) -> str:
    """`busy`: work of the busiest rank, whose shares divide what computing takes."""
    parts = {
        "products and attention": step.compute_seconds * busy.units_seconds / busy.total_seconds,
        "passes over memory": step.compute_seconds * busy.passes_seconds / busy.total_seconds,
        "starting operations": step.compute_seconds * busy.calls_seconds / busy.total_seconds,
        "communication that nothing hides": step.exposed_communication_seconds,
        "the pipeline's bubble": step.bubble_seconds,
        "summing gradients over ranks": step.gradient_communication_seconds,
        "the optimizer": step.optimizer_seconds,
    }
    first, second = sorted(parts, key=lambda name: -parts[name])[:2]
    shares = {name: percent_text(parts[name] / step.total_seconds) for name in (first, second)}
    return f"{first}, {shares[first]} of a step, then {second}, {shares[second]}"


def advice_for(plan: TrainingPlan, planned: Callable[[Layout], TrainingPlan]) -> str:
    """The smallest change of the layout after which it fits, or what remains where there is none."""
    for words, layout in _changes(plan):
        try:
            other = planned(layout)
        except ValueError:
            continue  # sizes do not divide
        if other.fits:
            return f"with {words} it fits, in {bytes_text(other.peak_memory_bytes)}"
    return "no layout of these devices fits: use a smaller model, shorter rows, or more devices"


def _changes(plan: TrainingPlan) -> Iterator[tuple[str, Layout]]:
    layout = plan.layout
    rows = plan.n_micro_batches * layout.micro_rows if layout.micro_rows else 0
    if not layout.micro_rows or layout.micro_rows > 1:
        for fewer in (4, 2, 1):
            if not rows or fewer < layout.micro_rows:
                yield f"micro_rows={fewer}", replace(layout, micro_rows=fewer)
    if layout.is_one_device:
        return
    if layout.recompute == "none":
        yield "parallel.recompute='selective'", replace(layout, recompute="selective")
    if layout.recompute != "full":
        yield "parallel.recompute='full'", replace(layout, recompute="full")
    if layout.zero < 1 and layout.dp > 1:
        yield "parallel.zero=1", replace(layout, zero=1)
    for zero in (2, 3):
        if layout.zero < zero and layout.dp > 1:
            yield f"parallel.zero={zero}, recompute='full'", replace(layout, zero=zero, recompute="full")
