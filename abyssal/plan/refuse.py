"""What cannot fit is refused before it starts, in one line: what it would take, what there is, what to change.

Owns the margin and the words. Does not own the planned bytes (training.py, parameters.py) nor the limits
(memory_limit.py). It must never refuse what would fit: a plan is right within a tenth, so only what is a quarter above
the limit is refused, and the limit is the most that this process could ever have, swap included. What is merely not
free just now is said, no more.
"""

from __future__ import annotations

from collections.abc import Mapping

from abyssal.plan.in_words import bytes_text
from abyssal.plan.memory_limit import MemoryLimit

MARGIN = 1.25  # planned over limit


def refuse_beyond(
    limit: MemoryLimit, needed_bytes: float, *, what: str, parts: Mapping[str, float], change: str, override: str
) -> str:
    """A ValueError where `needed_bytes` cannot fit into `limit`; else a warning where they are not free now, or ""."""
    if needed_bytes > MARGIN * limit.limit_bytes:
        largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
        told = ", ".join(f"{name} {bytes_text(n_bytes)}" for name, n_bytes in largest if n_bytes)
        raise ValueError(
            f"{what} cannot fit: it takes about {bytes_text(needed_bytes)}{f' ({told})' if told else ''} and "
            f"{limit.limited_by} has {bytes_text(limit.limit_bytes)}; {change}, or try all the same with {override}"
        )
    if needed_bytes > limit.free_bytes:
        return (
            f"{what} takes about {bytes_text(needed_bytes)} and {bytes_text(limit.free_bytes)} are free: it may be "
            f"stopped for want of memory"
        )
    return ""
