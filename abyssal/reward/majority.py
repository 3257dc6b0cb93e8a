"""What most of several answers to one question say. (self-consistency; cons@k in DeepSeek-R1)

Owns which answers count as the same: those of one normal form, numbers by value. Algebra is not done here: 1/2 and 0.5
are two answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from abyssal.reward.math_answer import normalise


def answer_key(text: str) -> str | None:
    """Equal for equal answers; None for no answer."""
    answer = normalise(text)
    if answer.isascii() and answer.isdecimal():
        return answer.lstrip("0") or "0"
    return answer or None


def votes(keys: Sequence[str | None]) -> list[int]:
    """For each answer how many say the same, itself included; 0 for no answer."""
    counts = Counter(key for key in keys if key is not None)
    return [0 if key is None else counts[key] for key in keys]
