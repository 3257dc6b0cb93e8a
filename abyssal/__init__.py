"""Abyssal: from raw text to a reasoning model that people talk to. `load(DIR)` gives a checkpoint to talk to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from abyssal.types import Message, RequestError, SamplingParams, Structure

if TYPE_CHECKING:
    from abyssal.lm import LM, Generated, load

__all__ = ["LM", "Generated", "Message", "RequestError", "SamplingParams", "Structure", "load"]


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is asked for: a reward in its worker imports the types alone."""
    if name in ("LM", "Generated", "load"):
        from abyssal import lm

        return getattr(lm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
