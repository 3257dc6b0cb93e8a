"""What a family hands back: one drawn puzzle without wording.

A family is a function `(rng, level) -> Instance`. It owns the puzzle, the rewriting that solves it, and the phrase that
asks for it in each language; it does not know of splits, weights or prompts (problems.py does).

Every state is compact text in which digits and letters stand alone, so that a byte-level BPE with single digits cuts
it the same way wherever it stands. Each step writes down all that remains to be done: whoever copies it needs only
the line before, never the question.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from abyssal.types import Language


class Instance(NamedTuple):
    """`steps` are the states after the question's own `state`, in order; the last one is the answer."""

    key: str
    state: str
    steps: tuple[str, ...]
    answer: str
    verifier: str = "exact"
    metadata: dict[str, Any] | None = None


def joined(words: str, state: str, language: Language) -> str:
    """Words, then a state: "then 7+5", "然后7+5", "然后 b a d c". Letters get their space always, as inside a state."""
    needs_space = language == "en" or state[:1].isalpha()
    return f"{words} {state}" if needs_space else words + state
