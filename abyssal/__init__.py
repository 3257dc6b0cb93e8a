"""Abyssal: from raw text to a reasoning model that people talk to. `load(DIR)` gives a checkpoint to talk to."""

from abyssal.lm import LM, Generated, load
from abyssal.types import Message, SamplingParams

__all__ = ["LM", "Generated", "Message", "SamplingParams", "load"]
