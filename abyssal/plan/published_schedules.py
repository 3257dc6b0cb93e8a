"""What was published of pipeline schedules, beside what the simulator makes of them."""

from __future__ import annotations

from abyssal.plan.bubble import closed_form
from abyssal.plan.published import Published
from abyssal.plan.schedules import ScheduleName
from abyssal.plan.simulate import StageSeconds, simulate

NAMES: dict[ScheduleName, str] = {"1f1b": "1F1B", "zb1p": "ZB1P", "dualpipe": "DualPipe"}
V3_RANKS, V3_MICRO_BATCHES = 16, 120  # 15,360 rows over 128 replicas, one row in a micro-batch (V3 sections 3.2, 4.2)
# the formulas' own case: forward and both halves of backward alike, and a pair that saves nothing
ALIKE = StageSeconds(forward_seconds=1, backward_input_seconds=1, backward_weight_seconds=1)


def published_schedules() -> list[Published]:
    """Bubble and activations of each schedule of DeepSeek-V3's table 2, on V3's pipeline."""
    lines = []
    for schedule, name in NAMES.items():
        line = simulate(schedule, n_stages=V3_RANKS, n_micro_batches=V3_MICRO_BATCHES, times=ALIKE)
        form = closed_form(schedule, n_stages=V3_RANKS, n_micro_batches=V3_MICRO_BATCHES, times=ALIKE)
        assert form is not None and form.applies
        inputs = f"PP {V3_RANKS}, {V3_MICRO_BATCHES} micro-batches"
        bubble = Published(
            name=f"{name}: bubble, {form.formula}",
            unit="forwards",
            published=form.bubble_seconds,
            planned=max(line.bubble_seconds),
            kind="arithmetic",
            source=form.source,
            inputs=f"{inputs}, F = W = B/2",
        )
        activations = Published(
            name=f"{name}: most activations held",
            unit="micro-batches",
            published=form.peak_activations,
            planned=max(line.schedule.most_in_flight()),
            kind="arithmetic",
            source=form.source,
            inputs=inputs,
        )
        lines += [bubble, activations]
    return lines
