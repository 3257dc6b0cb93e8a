"""Learning rate as a fraction of its peak and rows of a step, pure functions of progress. (DeepSeek-V3 section 4.2)"""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int,
    total: int,
    *,
    warmup: int,
    shape: Literal["wsd", "cosine", "constant"],
    stable: float = 0.7,
    floor: float = 0.1,
) -> float:
    """Linear warm-up, then: "wsd" flat until `stable` of the way, cosine to `floor`; "cosine" at once; or flat.

    V3 warms up for 2000 steps, is constant to two thirds and falls by cosine to a tenth.
    """
    if step < warmup:
        return (step + 1) / warmup
    if shape == "constant":
        return 1.0
    begin = warmup if shape == "cosine" else max(warmup, int(total * stable))
    if step < begin:
        return 1.0
    progress = min(1.0, (step - begin) / max(1, total - begin))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def v3_learning_rate(
    step: int,
    seen: float,
    *,
    warmup: int,
    stable: float = 10 / 14.8,
    fall_until: float = 14.3 / 14.8,
    last_from: float = 14.633 / 14.8,
    floor: float = 0.1,
    last: float = 7.3 / 220,
) -> float:
    """V3's five parts: warm-up, flat, cosine to `floor`, `floor`, and `last` to the end.

    The warm-up counts steps; the rest goes by `seen`, the share of all tokens before this step, because a growing batch
    makes later steps longer. The defaults are V3's: 10T, then 4.3T of falling, 333B at 2.2e-5 and 167B at 7.3e-6.
    """
    if step < warmup:
        return (step + 1) / warmup
    if seen >= last_from:
        return last
    if seen >= fall_until:
        return floor
    progress = max(0.0, (seen - stable) / max(fall_until - stable, 1e-9))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def ramped_rows(rows_seen: int, *, start: int, end: int, ramp_rows: int, multiple: int = 1) -> int:
    """Rows of the next step: from `start` to `end` in proportion to the rows seen, rounded down to a multiple.

    V3: 3072 to 15360 over the first 469B tokens. What is seen, not the step, is the argument, so a loader's position
    says it all.
    """
    if rows_seen >= ramp_rows:
        return end
    return start + (end - start) * rows_seen // ramp_rows // multiple * multiple


def total_rows(steps: int, *, start: int, end: int, ramp_rows: int, multiple: int = 1) -> int:
    """Rows of all `steps` together, the ramp included."""
    seen = 0
    for step in range(steps):
        if seen >= ramp_rows:
            return seen + (steps - step) * end
        seen += ramped_rows(seen, start=start, end=end, ramp_rows=ramp_rows, multiple=multiple)
    return seen
