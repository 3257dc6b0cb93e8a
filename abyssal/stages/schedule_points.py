"""When a stage evaluates and saves, and how it opens its record. Owns nothing."""

from __future__ import annotations

from collections.abc import Callable

from abyssal.record import Recorder

RecorderAt = Callable[[int], Recorder]  # opens a stage's record, cut to the step it resumes from


def due(step: int, every: int, total: int) -> bool:
    """Every `every` steps (0: never), and after the last one."""
    return step + 1 == total or (every > 0 and (step + 1) % every == 0)
