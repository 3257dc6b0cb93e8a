"""Preference pairs: two answers to one open request and which of them is better, for one head. (R1 section 3.1)

Owns the stream of requests with its held-out split, how pairs are ranked by the hidden truth and how labels go wrong.
Does not own the truth (reward/open_request.py), nor the drawing of answers from a policy (stages/preference_pairs.py).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Literal

from abyssal.data.families.requests import careless_answer, draw_request, faults_of, good_answer
from abyssal.data.held_out import is_held_out
from abyssal.data.problems import MAX_DRAWS, ProblemSource, Split, weighted
from abyssal.reward.open_request import Head, truth
from abyssal.types import Language, Message, Problem

Source = Literal["sampled", "spoiled"]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """`chosen` is preferred, or was said to be: `truths` are the hidden numbers of chosen and rejected."""

    prompt: str
    head: Head
    chosen: Message
    rejected: Message
    truths: tuple[float, float]
    source: Source

    @property
    def flipped(self) -> bool:
        """Whether its label is wrong."""
        return self.truths[0] < self.truths[1]

    def turned(self) -> Pair:
        return replace(self, chosen=self.rejected, rejected=self.chosen, truths=self.truths[::-1])


def request_at(source: ProblemSource, seed: int, index: int, split: Split = "train") -> Problem:
    """The request at one place of an endless stream: a pure function, as `problem_at` is."""
    rng = random.Random(f"request {seed}|{split}|{index}")
    language: Language = weighted(rng, source.languages)
    for _ in range(MAX_DRAWS):
        problem = draw_request(rng, language)
        if is_held_out(problem.key, source.held_out) == (split == "held_out"):
            return problem
    raise ValueError(f"no {split} request with held_out={source.held_out}; give it another value, 0.1 is usual")


def truth_of(problem: Problem, message: Message, head: Head) -> float:
    value = getattr(truth(problem, message), head)
    assert value is not None, f"{problem.prompt!r} has nothing that {head} could judge"
    return float(value)


def spoiled_pair(problem: Problem, head: Head, rng: random.Random) -> Pair:
    """A good answer and a careless one. For safety the better one may be clumsy: it is safe, and that is the point."""
    better = good_answer(problem, rng, thinks=rng.random() < 0.5)
    if head == "safety" and rng.random() < 0.5:
        better = careless_answer(problem, rng, thinks=rng.random() < 0.5, fault=rng.choice(("translated", "padded")))
    fault = rng.choice(faults_of(problem, head))
    return as_pair(problem, head, better, careless_answer(problem, rng, thinks=rng.random() < 0.5, fault=fault))


def ranked_pair(problem: Problem, head: Head, answers: list[Message], rng: random.Random) -> Pair | None:
    """Two of a policy's own answers that differ in truth; None where none do. (R1 keeps clear differences only)"""
    unlike = [
        (a, b) for a in answers for b in answers if truth_of(problem, a, head) > truth_of(problem, b, head)
    ]  # fmt: skip
    return replace(as_pair(problem, head, *rng.choice(unlike)), source="sampled") if unlike else None


def as_pair(problem: Problem, head: Head, better: Message, worse: Message) -> Pair:
    truths = truth_of(problem, better, head), truth_of(problem, worse, head)
    assert truths[0] > truths[1], (problem.prompt, head, better, worse)
    return Pair(prompt=problem.prompt, head=head, chosen=better, rejected=worse, truths=truths, source="spoiled")
