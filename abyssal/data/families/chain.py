"""Chains of one-digit operations, taken from left to right modulo 10: 7+5*3 is 2*3 is 6.

Without a step in between, a shallow network would have to compose a string of maps x -> a*x + b modulo 10, which do not
commute: attention cannot add them up in one go. That is why a chain always holds multiplications and never only those.
Multipliers are 3, 7 or 9, so that every operation is a permutation of the digits and answers stay uniform; sums add or
take 1 to 5, so that there are 130 facts to know and a small model has room for them.
"""

from __future__ import annotations

import random

from abyssal.data.families.instance import Instance
from abyssal.types import Language

WORDING: dict[Language, str] = {"en": "Left to right modulo 10:", "zh": "从左到右模10："}


def draw_chain(rng: random.Random, level: int) -> Instance:
    """`level` operations; a step carries out the first one."""
    state = str(rng.randrange(10)) + "".join(
        operator + (rng.choice("379") if operator == "*" else rng.choice("12345"))
        for operator in draw_operators(rng, level)
    )
    steps, rest = [], state
    while len(rest) > 1:
        rest = calculate(rest[0], rest[1], rest[2]) + rest[3:]
        steps.append(rest)
    return Instance(key=f"chain|{state}", state=state, steps=tuple(steps), answer=rest)


def draw_operators(rng: random.Random, level: int) -> list[str]:
    """Some sums and some products: either kind alone would commute and need no thinking."""
    while True:
        operators = rng.choices("+-*", weights=(3, 3, 4), k=level)
        if level < 2 or level // 2 <= operators.count("*") < level:
            return operators


def calculate(left: str, operator: str, right: str) -> str:
    """One operation on two digits, modulo 10: 3 - 4 is 9."""
    a, b = int(left), int(right)
    return str((a + b if operator == "+" else a - b if operator == "-" else a * b) % 10)
