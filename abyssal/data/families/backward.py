"""Chains taken from right to left: 4+3*2 is 4+1 is 0. Never trained on; it shows what transfers from chain.py.

The looks are a chain's and so is every single operation; the order is not, and so a step rewrites the other end.
"""

from __future__ import annotations

import random

from abyssal.data.families.chain import MODULUS, MULTIPLIERS, SUMMANDS, calculate, draw_operators
from abyssal.data.families.instance import Instance
from abyssal.types import Language

WORDING: dict[Language, str] = {"en": "Right to left modulo 5:", "zh": "从右到左模5："}


def draw_backward(rng: random.Random, level: int) -> Instance:
    """`level` operations; a step carries out the last one."""
    # What stands left of "*" is the multiplier here, so that is what must be 2 or 3 to keep answers uniform.
    state = "".join(
        rng.choice(MULTIPLIERS if operator == "*" else SUMMANDS) + operator
        for operator in draw_operators(rng, level)
    ) + str(rng.randrange(MODULUS))
    steps, rest = [], state
    while len(rest) > 1:
        rest = rest[:-3] + calculate(rest[-3], rest[-2], rest[-1])
        steps.append(rest)
    return Instance(key=f"backward|{state}", state=state, steps=tuple(steps), answer=rest)
