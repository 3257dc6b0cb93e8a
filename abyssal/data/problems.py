"""Problems with checkable answers: families behind one interface, and an endless stream of them by position.

Owns weights, levels and the split into train and held out. Does not own puzzles and their wording (families/), worked
solutions (worked.py), or what a right answer is (reward/).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from abyssal.data.families.backward import WORDING as BACKWARD_WORDING
from abyssal.data.families.backward import draw_backward
from abyssal.data.families.chain import WORDING as CHAIN_WORDING
from abyssal.data.families.chain import draw_chain
from abyssal.data.families.gym import AB_WORDING, draw_ab, draw_gym
from abyssal.data.families.instance import Instance, joined
from abyssal.data.families.instructions import instruct
from abyssal.data.families.nested import WORDING as NESTED_WORDING
from abyssal.data.families.nested import draw_nested
from abyssal.data.families.swaps import WORDING as SWAPS_WORDING
from abyssal.data.families.swaps import draw_swaps
from abyssal.data.held_out import is_held_out
from abyssal.types import Language, Problem

Split = Literal["train", "held_out"]

GYM = "reasoning_gym:"
NEVER_TRAINED = ("backward",)  # kept wholly out of training, to see what transfers
MAX_DRAWS = 5000  # a family so small that this many draws miss one side of the split cannot feed a stream


class Family(NamedTuple):
    draw: Callable[[random.Random, int], Instance]
    wording: dict[Language, str]


FAMILIES: dict[str, Family] = {
    "chain": Family(draw_chain, CHAIN_WORDING),
    "swaps": Family(draw_swaps, SWAPS_WORDING),
    "nested": Family(draw_nested, NESTED_WORDING),
    "ab": Family(draw_ab, AB_WORDING),
    "backward": Family(draw_backward, BACKWARD_WORDING),
}


@dataclass(frozen=True, kw_only=True)
class ProblemSource:
    """What a stream of problems is made of. Weights need not sum to 1.

    A family is a name of `FAMILIES` or "reasoning_gym:<task>" (asked in English, default settings, no levels).
    """

    families: dict[str, float] = field(default_factory=lambda: {"chain": 1.0, "swaps": 1.0, "nested": 1.0})
    levels: tuple[int, int] = (3, 6)  # least and most, both included, drawn evenly
    levels_of: dict[str, tuple[int, int]] = field(default_factory=dict)  # where one family needs its own range
    languages: dict[str, float] = field(default_factory=lambda: {"en": 1.0, "zh": 1.0})
    held_out: float = 0.1  # share of all instances, chosen by a hash of their key, that no stage trains on
    instruction_share: float = 0.0  # share of problems that carry a rule about the form of the answer

    def __post_init__(self) -> None:
        for name in self.families:
            check_family(name)
        for what, weights in (("families", self.families), ("languages", self.languages)):
            if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
                raise ValueError(f"{what}={dict(weights)} cannot be drawn from; give weights of 0 or above, not all 0")
        if unknown := set(self.languages) - {"en", "zh"}:
            raise ValueError(f"languages: {sorted(unknown)} are not known; choose among en, zh")
        if stray := set(self.levels_of) - set(self.families):
            raise ValueError(f"levels_of names {sorted(stray)}, which families does not; add them there or drop them")
        for low, high in (self.levels, *self.levels_of.values()):
            if not 1 <= low <= high:
                raise ValueError(f"levels ({low}, {high}): give the least and the most, 1 or above")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} is a share; give a number from 0 to below 1")
        if not 0 <= self.instruction_share <= 1:
            raise ValueError(f"instruction_share={self.instruction_share} is a share; give a number from 0 to 1")


def make_problem(family: str, level: int, language: Language, rng: random.Random) -> Problem:
    """One problem. The same generator state gives the same instance, hence the same key, in every language."""
    check_family(family)
    if family.startswith(GYM):
        instance = draw_gym(family.removeprefix(GYM), rng)
        prompt, level, language = instance.state, 0, "en"
    else:
        draw, wording = FAMILIES[family]
        instance = draw(rng, level)
        prompt = joined(wording[language], instance.state, language)
    return Problem(
        prompt=prompt,
        answer=instance.answer,
        family=family,
        level=level,
        language=language,
        key=instance.key,
        verifier=instance.verifier,
        steps=instance.steps,
        metadata=instance.metadata or {},
    )


def problem_at(source: ProblemSource, seed: int, index: int, split: Split = "train") -> Problem:
    """The problem at one place of the stream: a pure function, so a resumed run needs the index and nothing else."""
    check_split(source, split)
    rng = random.Random(f"{seed}|{split}|{index}")
    language: Language = weighted(rng, source.languages)
    family: str = weighted(rng, source.families)
    level = rng.randint(*source.levels_of.get(family, source.levels))
    for _ in range(MAX_DRAWS):
        problem = make_problem(family, level, language, rng)
        if family in NEVER_TRAINED or is_held_out(problem.key, source.held_out) == (split == "held_out"):
            return instruct(problem, rng) if rng.random() < source.instruction_share else problem
    raise ValueError(
        f"{MAX_DRAWS} draws of {family} at level {level} gave no {split} problem with held_out={source.held_out}; "
        f"raise its level, or give held_out another value"
    )


def check_family(name: str) -> None:
    if name not in FAMILIES and not (name.startswith(GYM) and len(name) > len(GYM)):
        raise ValueError(f"no family {name!r}; choose among {', '.join(FAMILIES)} or {GYM}<task>")


def check_split(source: ProblemSource, split: Split) -> None:
    if split not in ("train", "held_out"):
        raise ValueError(f"split={split!r}; choose train or held_out")
    barred = [name for name in NEVER_TRAINED if source.families.get(name, 0) > 0]
    if split == "train" and barred:
        raise ValueError(f"family {barred[0]!r} is kept out of training; take it out of families, or ask for held_out")


def weighted(rng: random.Random, weights: Mapping[Any, float]) -> Any:
    return rng.choices(list(weights), weights=list(weights.values()))[0]
