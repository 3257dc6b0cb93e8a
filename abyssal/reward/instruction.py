"""Rules about the form of an answer that a rule can check (rule-based rewards for instruction following).

Owns what each rule means: how to obey it (`follow`) and whether an answer does (`check`). Does not own how it is asked
for (data/families/instructions.py). Rules are read strictly: what nearly holds does not hold.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from abyssal.reward.math_answer import normalise
from abyssal.types import Message, Problem, Score

RULES = ("json", "english", "chinese", "twice", "words")

ENGLISH_LEADS = {2: "Answer", 3: "It is", 4: "The answer is", 5: "So the answer is"}
CHINESE_LEADS = {2: "得", 3: "答案", 4: "答案是", 5: "答案就是"}
WORD_COUNTS = tuple(ENGLISH_LEADS)


class Followed(NamedTuple):
    """Both parts of an instruction: its form, and the answer inside."""

    rule_holds: bool
    answer_right: bool


def fits(rule: str, answer: str) -> bool:
    """Whether the form can hold this answer without being read another way."""
    match rule:
        case "english":
            return "." not in answer
        case "chinese":
            return "。" not in answer
        case "twice":
            return not re.search("[,，]", answer)
        case "words":
            return len(answer) == 1  # "b a c d" is many words already
        case _:
            return True


def follow(problem: Problem) -> str:
    """A right answer in the form that the problem asks for."""
    rule, answer = instruction_of(problem), problem.answer
    match rule["rule"]:
        case "json":
            return json.dumps({"answer": answer}, ensure_ascii=False)
        case "english":
            return f"The answer is {answer}."
        case "chinese":
            return f"答案是{answer}。"
        case "twice":
            return f"{answer}, {answer}" if problem.language == "en" else f"{answer}，{answer}"
        case _:
            n = rule["n"]
            return f"{ENGLISH_LEADS[n]} {answer}" if rule["unit"] == "words" else CHINESE_LEADS[n] + answer


def check(problem: Problem, message: Message) -> Followed:
    """Whether the rule holds, and whether the answer is right; an answer that ignores the rule can still be right."""
    found = answer_in(message.content.strip(), instruction_of(problem))
    answer = message.content if found is None else found
    return Followed(rule_holds=found is not None, answer_right=normalise(answer) == normalise(problem.answer))


def instruction_followed(problem: Problem, message: Message) -> Score:
    """1 where the rule holds and the answer inside is right, else 0: half of either is of no use to who asked."""
    return Score(float(all(check(problem, message))))


def answer_in(content: str, instruction: dict[str, Any]) -> str | None:
    """The answer as the rule wraps it, or None where the rule does not hold."""
    match instruction["rule"]:
        case "json":
            return json_answer(content)
        case "english":
            return matched(r"The answer is ([^.]+)\.", content)
        case "chinese":
            return matched(r"答案是\s*([^。]+)。", content)
        case "twice":
            parts = [part.strip() for part in re.split("[,，]", content)]
            return parts[0] if len(parts) == 2 and parts[0] == parts[1] else None
        case _:
            pieces = content.rstrip(".。").split()
            if instruction["unit"] == "characters":
                pieces = [character for character in "".join(pieces) if character.isalnum()]
            *lead, last = pieces or [""]
            # The lead must be words: a number repeated n times is not a sentence of n words.
            return last if len(pieces) == instruction["n"] and all(word.isalpha() for word in lead) else None


def json_answer(content: str) -> str | None:
    try:
        value = json.loads(content)
    except ValueError:
        return None
    if not isinstance(value, dict) or set(value) != {"answer"}:
        return None
    answer = value["answer"]
    return str(answer) if isinstance(answer, (str, int)) and not isinstance(answer, bool) else None


def matched(pattern: str, content: str) -> str | None:
    found = re.fullmatch(pattern, content)
    return found[1] if found else None


def instruction_of(problem: Problem) -> dict[str, Any]:
    """The rule a problem carries, checked, since a user's own file may have written it."""
    rule = problem.metadata.get("instruction", {})
    name = rule.get("rule") if isinstance(rule, dict) else None
    if name not in RULES:
        raise ValueError(f"instruction {rule!r}: rule must be one of {', '.join(RULES)}")
    if name == "words" and (rule.get("n") not in WORD_COUNTS or rule.get("unit") not in ("words", "characters")):
        raise ValueError(f"instruction {rule!r}: n must be one of {WORD_COUNTS}, and unit words or characters")
    return rule
