"""Problems written out as the web has them: most answered at once, some worked out step by step.

Owns the prose of a worked solution: which states it shows, which connective words, in which language. Does not own the
states (families/) or the template (tokens/chat.py).

Question and words are in languages drawn apart, and some solutions change language midway. That is what gives R1-Zero
languages to mix and the language-consistency reward something to act on.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Literal

from abyssal.data.families.instance import joined
from abyssal.data.families.requests import careless_answer, good_answer
from abyssal.reward.instruction import follow
from abyssal.reward.open_request import VERIFIER as REQUEST
from abyssal.types import Conversation, Language, Message, Problem

Words = Literal["en", "zh", "mixed"]
Brevity = Literal["full", "brief"]

CONNECTIVES: dict[Language, tuple[str, ...]] = {
    "en": ("so", "then", "next", "now"),
    "zh": ("所以", "然后", "接着", "现在"),
}
LANGUAGES: tuple[Language, ...] = ("en", "zh")


@dataclass(frozen=True, kw_only=True)
class WebMix:
    """How the web answers. All are shares between 0 and 1; problems without steps are always answered at once."""

    worked_share: float = 0.4  # of all problems: shown with their steps
    brief_share: float = 0.25  # of those worked out: every second state left out
    mixed_share: float = 0.25  # of those worked out: words change language between lines
    zh_words_share: float = 0.5  # of those not mixed: words in Chinese, whatever the question's language
    wrong_share: float = 0.0  # of those answered at once: a wrong answer, as if guessed
    request_share: float = 0.0  # of all questions: open requests, for a reward model to judge in `align`
    careless_share: float = 0.4  # of answers to open requests: with a fault, secrets told among them

    def __post_init__(self) -> None:
        for name, share in vars(self).items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} is a share; give a number from 0 to 1")


def web_document(problem: Problem, rng: random.Random, mix: WebMix) -> Conversation:
    """The problem and one answer somebody might have posted to it."""
    question = Message(role="user", content=problem.prompt)
    if problem.verifier == REQUEST:
        answered = careless_answer if rng.random() < mix.careless_share else good_answer
        return [question, answered(problem, rng, thinks=rng.random() < mix.worked_share)]
    if problem.steps and rng.random() < mix.worked_share:
        brevity: Brevity = "brief" if rng.random() < mix.brief_share else "full"
        words: Words = "zh" if rng.random() < mix.zh_words_share else "en"
        if rng.random() < mix.mixed_share:
            words = "mixed"
        thinking = write_thinking(problem, words=words, brevity=brevity, rng=rng)
        return [question, Message(role="assistant", content=right_content(problem), thinking=thinking)]
    if rng.random() < mix.wrong_share:
        return [question, Message(role="assistant", content=wrong_answer(problem, rng))]
    return [question, Message(role="assistant", content=right_content(problem))]


def write_thinking(problem: Problem, *, words: Words, brevity: Brevity, rng: random.Random) -> str:
    """One line a step, each opened by a connective: "so 2*3-4\\nthen 6-4\\nnext 2".

    "brief" leaves out every second state before the last; "mixed" has both languages wherever there are two lines.
    """
    if not problem.steps:
        raise ValueError(f"{problem.family} problem {problem.key!r} has no steps to write down; answer it at once")
    # Counted from the end, because the last state is the answer and stays.
    steps = problem.steps if brevity == "full" else problem.steps[::-1][::2][::-1]
    spoken: list[Language]
    if words == "mixed":
        spoken = [rng.choice(LANGUAGES) for _ in steps]
        if len(set(spoken)) == 1 and len(spoken) > 1:
            turn = rng.randrange(len(spoken))
            spoken[turn] = "en" if spoken[turn] == "zh" else "zh"
    else:
        spoken = [words] * len(steps)
    # In turn, not at random: a choice that nothing foretells teaches nothing and drowns the steps in noise.
    words_of = [CONNECTIVES[speech][i % len(CONNECTIVES[speech])] for i, speech in enumerate(spoken)]
    lines = (joined(word, step, speech) for word, speech, step in zip(words_of, spoken, steps, strict=True))
    return "\n".join(lines)


def in_one_language(thinking: str, language: Language) -> str:
    """The same steps with their connectives in one language: "so 6-4\\n然后2" -> "so 6-4\\nthen 2".

    What DeepSeek had V3 and people do to R1-Zero's traces before the cold start. Lines that open with no connective of
    ours stay as they are.
    """
    place = {word: i for words in CONNECTIVES.values() for i, word in enumerate(words)}
    opening = re.compile(rf"({'|'.join(place)})(?![a-z]) ?")
    lines = []
    for line in thinking.split("\n"):
        if found := opening.match(line):
            line = joined(CONNECTIVES[language][place[found[1]]], line[found.end() :], language)
        lines.append(line)
    return "\n".join(lines)


def right_content(problem: Problem) -> str:
    """What a right answer says: the plain answer, or the answer in the form that the problem's rule asks for."""
    return follow(problem) if problem.verifier == "instruction" else problem.answer


def wrong_answer(problem: Problem, rng: random.Random) -> str:
    """Something that looks like an answer and is not: another digit, or the same pieces in another order."""
    if problem.answer.isdigit():
        return "".join(str((int(digit) + rng.randrange(1, 10)) % 10) for digit in problem.answer)
    pieces = problem.answer.split()
    shuffled = rng.sample(pieces, len(pieces))
    while shuffled == pieces:  # one more piece makes it wrong even where all pieces are alike
        shuffled = [*shuffled, rng.choice(pieces)]
        rng.shuffle(shuffled)
    return " ".join(shuffled)
