"""What is wrong with many tensors, said in one line: the names of a few, of many the first and how many there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SHOWN = 10


def listed(names: Sequence[str], *, most: int = SHOWN) -> str:
    """All of a few; of many the first ones."""
    return ", ".join(names[:most]) + (f", and {len(names) - most:,} more" if len(names) > most else "")


def told(faults: Mapping[str, Sequence[str]]) -> str:
    """ "1 missing (a); 2 unexpected (b, c)", or nothing."""
    return "; ".join(f"{len(names):,} {fault} ({listed(names)})" for fault, names in faults.items() if names)
