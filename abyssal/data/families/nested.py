"""Nested expressions in Polish notation modulo 5: "add max3 min421" is add(max(3, min(4, 2)), 1).

Every operator takes two operands and a digit is one character, so the text has one reading without brackets or commas.
max and min do not commute with add and sub, and the shape of the tree is random: what to do first has to be found.
Modulo 5 there are 100 facts to know (four operators on 25 pairs), which a small model has room for.
"""

from __future__ import annotations

import random

from abyssal.data.families.instance import Instance
from abyssal.types import Language

WORDING: dict[Language, str] = {"en": "Work out modulo 5:", "zh": "计算模5："}

MODULUS = 5
OPERATORS = ("add", "sub", "max", "min")


def draw_nested(rng: random.Random, level: int) -> Instance:
    """`level` operators, add or sub at the root (so answers stay near uniform), max or min inside from level 3 on."""
    while True:
        tokens = draw_tree(rng, level, choices=("add", "sub"))
        if level < 3 or "max" in tokens or "min" in tokens:
            break
    state = written(tokens)
    steps = []
    while len(tokens) > 1:
        tokens = reduce_leftmost(tokens)
        steps.append(written(tokens))
    return Instance(key=f"nested|{state}", state=state, steps=tuple(steps), answer=steps[-1])


def draw_tree(rng: random.Random, n_operators: int, *, choices: tuple[str, ...] = OPERATORS) -> list[str]:
    """A random tree as its tokens in prefix order: operators are words, leaves are digits."""
    if n_operators == 0:
        return [str(rng.randrange(MODULUS))]
    n_left = rng.randrange(n_operators)
    left, right = draw_tree(rng, n_left), draw_tree(rng, n_operators - 1 - n_left)
    return [rng.choice(choices), *left, *right]


def reduce_leftmost(tokens: list[str]) -> list[str]:
    """Replace the first operator that is followed by two digits with its value."""
    for i in range(len(tokens) - 2):
        if not tokens[i].isdigit() and tokens[i + 1].isdigit() and tokens[i + 2].isdigit():
            return [*tokens[:i], calculate(tokens[i], int(tokens[i + 1]), int(tokens[i + 2])), *tokens[i + 3 :]]
    raise AssertionError(f"no operator of {tokens} has two digits: not a whole expression")


def calculate(operator: str, a: int, b: int) -> str:
    """One operation on two digits, modulo 5."""
    if operator == "add":
        return str((a + b) % MODULUS)
    if operator == "sub":
        return str((a - b) % MODULUS)
    return str(max(a, b) if operator == "max" else min(a, b))


def written(tokens: list[str]) -> str:
    """A space before every operator, none before a digit; the first token stands bare."""
    return "".join(token if token.isdigit() else " " + token for token in tokens).lstrip()
