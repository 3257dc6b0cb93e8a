"""Learning rate as a fraction of its peak, a pure function of progress. (DeepSeek-V3 section 4.2)"""

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
