"""Problems whose answer must also obey a rule about its form: what the `align` stage trains.

Owns the wording of the rules. What a rule means, and whether an answer holds it, is reward/instruction.py's.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from abyssal.reward.instruction import RULES, WORD_COUNTS, fits
from abyssal.types import Language, Problem

WORDING: dict[str, dict[Language, str]] = {
    "json": {"en": "Answer as JSON with the key answer.", "zh": "用JSON回答，键为answer。"},
    "english": {"en": "Answer in English as: The answer is X.", "zh": "用英文回答：The answer is X."},
    "chinese": {"en": "Answer in Chinese as: 答案是X。", "zh": "用中文回答：答案是X。"},
    "twice": {"en": "Give the answer twice with a comma between.", "zh": "答案写两遍，用逗号隔开。"},
    "words": {"en": "Answer in exactly {n} words, the answer last.", "zh": "用{n}个字回答，答案在最后。"},
}


def instruct(problem: Problem, rng: random.Random, *, rule: str | None = None) -> Problem:
    """The same problem with a rule after its question; the rule is drawn unless named.

    The key stays the base problem's, so an instance that is held out is held out under any rule as well.
    """
    fitting = [name for name in RULES if fits(name, problem.answer)]
    rule = rng.choice(fitting) if rule is None else rule
    if rule not in fitting:
        raise ValueError(f"rule {rule!r} does not fit the answer {problem.answer!r}; choose among {', '.join(fitting)}")
    instruction: dict[str, Any] = {"rule": rule}
    if rule == "words":
        instruction |= {"n": rng.choice(WORD_COUNTS), "unit": "words" if problem.language == "en" else "characters"}
    return replace(
        problem,
        prompt=f"{problem.prompt}\n" + WORDING[rule][problem.language].format(n=instruction.get("n")),
        family="instructions",
        verifier="instruction",
        metadata={**problem.metadata, "instruction": instruction, "base_family": problem.family},
    )
