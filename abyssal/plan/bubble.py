"""What papers say that a schedule wastes and holds, in closed form. The simulator is held to it where it applies.

A bubble is the time that a rank stands idle in one step. All stages are alike and sends are free here.
Letters: PP ranks, F forward, B full backward, I and W its halves for inputs and for weights, F&B a pair.
"""

from __future__ import annotations

from typing import NamedTuple

from abyssal.plan.schedules import ScheduleName
from abyssal.plan.simulate import StageSeconds

TABLE_2 = "DeepSeek-V3 section 3.2.1, table 2; deepseek-ai/DualPipe README"


class ClosedForm(NamedTuple):
    """Of the rank that has the most: with pairs that save time, ranks of DualPipe differ. Activations are in
    micro-batches of a stage, and of a chunk where a rank holds several."""

    bubble_seconds: float
    formula: str
    parameter_copies: int
    peak_activations: int
    applies: bool  # whether these times and counts are those that the formula is made for
    condition: str
    source: str


def closed_form(
    schedule: ScheduleName, *, n_stages: int, n_micro_batches: int, times: StageSeconds, chunks: int = 1
) -> ClosedForm | None:
    """`n_stages` are the pipeline's ranks (PP), `times` of one stage, of one chunk where a rank holds several."""
    pp, f, b, w = n_stages, times.forward_seconds, times.backward_seconds, times.backward_weight_seconds
    i, pair = times.backward_input_seconds, times.pair_seconds
    full = n_micro_batches >= pp
    if schedule == "1f1b":
        return ClosedForm((pp - 1) * (f + b), "(PP-1)(F+B)", 1, pp, full, "micro-batches >= PP", TABLE_2)
    if schedule == "interleaved":
        peak = pp * chunks + (pp - 1 if chunks > 1 else 0)
        full = n_micro_batches >= (2 if chunks > 1 else 1) * pp
        source = "Narayanan et al. 2021, section 2.2; activations: Korthikanti et al. 2022, section 4.2.3 (memory)"
        return ClosedForm((pp - 1) * (f + b), "(PP-1)(F+B)", 1, peak, full, "micro-batches >= 2 PP", source)
    if schedule == "zb1p":
        applies = full and w <= min(f, i)
        condition = "W <= F, W <= I, micro-batches >= PP"
        return ClosedForm((pp - 1) * (f + b - 2 * w), "(PP-1)(F+B-2W)", 1, pp, applies, condition, TABLE_2)
    if schedule == "zbv":
        applies = f == i == w and n_micro_batches >= 2 * pp - 1
        source = "Qi et al. 2023, arXiv 2401.10241, section 6: none, if ranks need not begin and end at the same time"
        return ClosedForm((pp - 1) * f, "(PP-1)F", 1, 2 * pp, applies, "F = I = W, micro-batches >= 2 PP - 1", source)
    if schedule in ("dualpipe", "dualpipev"):
        half = pp // 2 if schedule == "dualpipe" else pp  # a V of PP ranks is a DualPipe of 2 PP, cut in half
        applies = f == i and w <= f and n_micro_batches >= 2 * pp and max(f, b) <= pair <= f + b
        formula = "(PP/2-1)(F&B+B-3W)" if schedule == "dualpipe" else "(PP-1)(F&B+B-3W)"
        return ClosedForm(
            (half - 1) * (pair + b - 3 * w),
            formula,
            2 if schedule == "dualpipe" else 1,
            2 * half + 1,
            applies,
            "F = I, W <= F, F&B between B and F + B, micro-batches >= 2 PP",
            TABLE_2,
        )
    return None
