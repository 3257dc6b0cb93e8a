"""Chains of one-digit operations, taken from left to right modulo 5: 4+3*2 is 2*2 is 4.

Without a step in between, a shallow network would have to compose a string of maps x -> a*x + b modulo 5, which do not
commute: attention cannot add them up in one go. That is why a chain always holds multiplications and never only those.
Multipliers are 2 or 3, so that every operation is a permutation of the digits, none undoes all the others, and answers
stay uniform. Modulo 5 there are 50 facts to know, which a small model has room for.
"""

from __future__ import annotations

import random

from abyssal.data.families.instance import Instance
from abyssal.types import Language

WORDING: dict[Language, str] = {"en": "Left to right modulo 5:", "zh": "从左到右模5："}

MODULUS = 5
MULTIPLIERS, SUMMANDS = "23", "1234"


def draw_chain(rng: random.Random, level: int) -> Instance:
    """`level` operations; a step carries out the first one."""
    state = str(rng.randrange(MODULUS)) + "".join(
        operator + rng.choice(MULTIPLIERS if operator == "*" else SUMMANDS) for operator in draw_operators(rng, level)
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
    """One operation on two digits, modulo 5: 3 - 4 is 4."""
    a, b = int(left), int(right)
    return str((a + b if operator == "+" else a - b if operator == "-" else a * b) % MODULUS)
