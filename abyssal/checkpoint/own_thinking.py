"""How long a model thinks where it is right, and so what low, medium and high effort mean for it.

Kept as thinking.json beside the weights, `FILE.thinking.json` beside a GGUF file; written by whatever evaluates a
checkpoint. An effort is a budget in which so many of the model's own right answers would have thought to their end.
Nothing measured: a share of the context stands in, and says so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from abyssal.checkpoint.atomic import find_directory
from abyssal.checkpoint.source import gguf_at
from abyssal.checkpoint.strict_json import read_object, shown

Effort = Literal["low", "medium", "high"]
SHARES: dict[Effort, float] = {"low": 0.5, "medium": 0.8, "high": 0.95}  # of the right answers
FRACTIONS: dict[Effort, int] = {"low": 16, "medium": 4, "high": 2}  # of the context: one in so many
FEWEST = 20  # right answers that thought; fewer say nothing about a length in twenty
NAME = "thinking.json"


class ThinkingLengths(NamedTuple):
    """Ids between <think> and </think>: `lengths` that low, medium and high effort leave alone; from `n_answers`."""

    n_answers: int
    lengths: dict[Effort, int]
    landing: str | None = None  # the phrase that was measured with


class EffortBudget(NamedTuple):
    """`why` is for the user, a clause."""

    budget: int
    why: str


def effort_budget(effort: Effort, known: ThinkingLengths | None, *, landing: int, context: int) -> EffortBudget:
    """What an effort is in ids. `landing` is how many ids the phrase at the end of a cut takes."""
    if effort not in SHARES:
        raise ValueError(f"effort={effort!r}; use one of {', '.join(SHARES)}, or a budget in tokens")
    if known is None:
        share = FRACTIONS[effort]
        return EffortBudget(
            max(1, context // share),
            f"1/{share} of the context: nobody measured how long this model thinks; abyssal eval DIR --budget does",
        )
    # one more than the longest that shall close by itself, and room to land
    budget = known.lengths[effort] + landing + bool(landing)
    why = f"{SHARES[effort]:.0%} of {known.n_answers:,} right answers thought no longer than {known.lengths[effort]}"
    return EffortBudget(min(budget, context), why)


def measured_lengths(right: Sequence[int], *, landing: str | None = None) -> ThinkingLengths | None:
    """From the thinking lengths of right answers; None where they are too few."""
    if len(right) < FEWEST:
        return None
    ordered = sorted(right)
    lengths = {effort: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for effort, share in SHARES.items()}
    return ThinkingLengths(len(ordered), lengths, landing)


def own_thinking(path: Path) -> ThinkingLengths | None:
    """What was measured of a checkpoint, None where nothing was."""
    file = thinking_file(path)
    if not file.is_file():
        return None
    found = read_object(file)
    landing = found.get("landing")
    if landing is not None and not isinstance(landing, str):
        raise ValueError(f"{file}: landing={shown(landing)} is no text; delete the file and measure again")
    lengths: dict[Effort, int] = {effort: _count(found, effort, file) for effort in SHARES}
    return ThinkingLengths(_count(found, "n_answers", file), lengths, landing)


def write_lengths(path: Path, known: ThinkingLengths) -> Path:
    """Whole or not at all; returns the file."""
    file = thinking_file(path)
    partial = file.with_name(f"{file.name}.partial")
    content: dict[str, Any] = {"n_answers": known.n_answers, "landing": known.landing}
    content |= {str(effort): length for effort, length in known.lengths.items()}
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, file)
    return file


def thinking_file(path: Path) -> Path:
    gguf = gguf_at(path)
    return find_directory(path) / NAME if gguf is None else gguf.with_name(f"{gguf.name}.{NAME}")


def _count(found: dict[str, Any], name: str, file: Path) -> int:
    value = found.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{file}: {name}={shown(value)} is no count; delete the file and measure again")
    return value
