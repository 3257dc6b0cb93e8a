"""When a stage evaluates, saves and ends, and how it opens its record. Owns nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

from abyssal.record import Recorder

RecorderAt = Callable[[int], Recorder]  # opens a stage's record, cut to the step it resumes from


def due(step: int, every: int, total: int) -> bool:
    """Every `every` steps (0: never), and after the last one."""
    return step + 1 == total or (every > 0 and (step + 1) % every == 0)


def steps_in_all(step: int, steps: int, *, worked_s: float, seconds: float) -> int:
    """How many steps a stage will have, as far as can be seen after `step`: `step + 1` says that it ends here.

    It ends after `steps`, or with the first step that has used up its `seconds` of work; until then, what the steps
    took so far says how many there may be.
    """
    if worked_s >= seconds:
        return step + 1
    if math.isinf(seconds):
        return steps
    return min(steps, max(step + 2, math.ceil(seconds / worked_s * (step + 1))))
