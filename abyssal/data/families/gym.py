"""Tasks of the package reasoning-gym as problems: any task as it is asked there, and A::B with the way to its answer.

Owns the adapters. The instances are reasoning-gym's, and so is the verdict: each problem carries its entry, and its
verifier "reasoning_gym:<task>" hands answer and entry to the task's own `score_answer`.
"""

from __future__ import annotations

import difflib
import importlib
import random
from typing import Any

from abyssal.data.families.instance import Instance
from abyssal.types import Language

AB_WORDING: dict[Language, str] = {"en": "Rewrite until nothing faces:", "zh": "改写到底："}

# A letter that faces right (A#) is written large, one that faces left (#A) small: one token each in any vocabulary.
AB_SPELLING = {"A": "A#", "a": "#A", "B": "B#", "b": "#B"}
AB_RULES = {("A", "a"): (), ("A", "b"): ("b", "A"), ("B", "a"): ("a", "B"), ("B", "b"): ()}


def draw_gym(task: str, rng: random.Random) -> Instance:
    """One instance of any reasoning-gym task with its default settings; question as given, no steps."""
    entry = draw_entry(task, rng)
    if entry["answer"] is None:
        raise ValueError(f"reasoning-gym's task {task!r} states no answer to learn from; choose another")
    question = str(entry["question"])
    return Instance(
        key=f"reasoning_gym:{task}|{question}",
        state=question,
        steps=(),
        answer=str(entry["answer"]),
        verifier=f"reasoning_gym:{task}",
        metadata={"entry": entry},
    )


def draw_ab(rng: random.Random, level: int) -> Instance:
    """A::B with `level` tokens. A step rewrites the first pair that faces each other: B a -> a B, A a -> nothing.

    Programs that vanish or have nothing to rewrite are drawn again: one has no answer, the other needs none.
    """
    if level < 2:
        raise ValueError(f"level={level}: an A::B program needs at least 2 tokens")
    compact = {long: short for short, long in AB_SPELLING.items()}
    while True:
        entry = draw_entry("ab", rng, length=level)
        program = tuple(compact[token] for token in entry["question"].split("program:\n\n")[1].split("\n")[0].split())
        states = rewritten(program)
        if len(states) > 1 and states[-1]:
            break
    answer = " ".join(states[-1])
    if " ".join(AB_SPELLING[token] for token in states[-1]) != entry["answer"]:
        raise AssertionError(f"{program} ends in {answer} here and in {entry['answer']} in reasoning-gym")
    state = " ".join(program)
    return Instance(
        key=f"ab|{state}",
        state=state,
        steps=tuple(" ".join(tokens) for tokens in states[1:]),
        answer=answer,
        verifier="reasoning_gym:ab",
        metadata={"entry": entry, "spelling": AB_SPELLING},
    )


def rewritten(program: tuple[str, ...]) -> list[tuple[str, ...]]:
    """All states from the program to its end. Each rewriting shortens it or moves a large letter right."""
    states = [program]
    while True:
        tokens = states[-1]
        facing = next((i for i in range(len(tokens) - 1) if tokens[i : i + 2] in AB_RULES), None)
        if facing is None:
            return states
        pair = (tokens[facing], tokens[facing + 1])
        states.append((*tokens[:facing], *AB_RULES[pair], *tokens[facing + 2 :]))


def draw_entry(task: str, rng: random.Random, **settings: Any) -> dict[str, Any]:
    """One entry of a reasoning-gym task, drawn from our generator through its seed."""
    try:
        gym = importlib.import_module("reasoning_gym")  # here, not above: it is an extra and takes a second or two
        known = importlib.import_module("reasoning_gym.factory").DATASETS
    except ImportError:
        raise ValueError(f"task {task!r} needs the package reasoning-gym: pip install 'abyssal[rl]'") from None
    if task not in known:
        near = difflib.get_close_matches(task, known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "its README lists them"
        raise ValueError(f"reasoning-gym has no task {task!r}; {hint}")
    try:
        entry: dict[str, Any] = gym.create_dataset(task, size=1, seed=rng.getrandbits(31), **settings)[0]
    except Exception as error:  # a task that needs settings of its own (composite) says so by any exception it likes
        raise ValueError(f"reasoning-gym's task {task!r} does not start as it is: {error!r}; choose another") from error
    return entry
