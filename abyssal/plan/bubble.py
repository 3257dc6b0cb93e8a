"""What papers say a schedule wastes and holds, in closed form; the simulator is held to it where it applies.

A bubble is the time that a rank stands idle in one step. All stages alike, sends free.
"""

from __future__ import annotations

from typing import NamedTuple

from abyssal.plan.schedules import ScheduleName
from abyssal.plan.simulate import StageSeconds

DUALPIPE = "deepseek-ai/DualPipe README, table of pipeline bubbles; DeepSeek-V3 section 3.2.1, table 2"


class ClosedForm(NamedTuple):
    bubble_seconds: float
    formula: str
    source: str


def closed_form(schedule: ScheduleName, *, n_stages: int, times: StageSeconds) -> ClosedForm | None:
    """The published bubble of `n_stages` ranks (PP); None where none is published. Times are of one stage: of one chunk
    for interleaved."""
    f, b = times.forward_seconds, times.backward_seconds
    if schedule == "1f1b":
        return ClosedForm(
            (n_stages - 1) * (f + b),
            "(PP-1)(F+B)",
            DUALPIPE,
        )
    if schedule == "interleaved":
        return ClosedForm((n_stages - 1) * (f + b), "(PP-1)(F+B) of a chunk", "Narayanan et al. 2021, section 2.2")
    return None
