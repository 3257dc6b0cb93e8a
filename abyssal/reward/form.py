"""How an answer is written: well-formedness and language, apart from whether it is right.

Owns the format reward of R1-Zero and the language-consistency reward of R1. Does not own the template: which ids are
the thinking tags is passed in (tokens/chat.py knows).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from abyssal.types import Language, Message, Problem, Score

TAGS = re.compile("</?think>")  # spelled here only to refuse them inside a text
LATIN = re.compile(r"\\?[A-Za-zÀ-ÖØ-öø-ÿ]+")
CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")


def well_formed(problem: Problem, message: Message, *, tags_ok: bool = True) -> Score:
    """1 where the answer is said plainly, or after exactly one block of thinking that was opened, filled and closed.

    Not thinking is as well-formed as thinking. If this reward paid for a thinking block it would teach every answer to
    open one whatever it is worth, and the growing share of thinking would be an effect of the format, not of finding
    out that thinking pays. So the share can grow through accuracy alone. `tags_ok` is `thinking_tags_ok` of the raw
    ids, which still show what parsing has tidied away.
    """
    texts = [message.content] if message.thinking is None else [message.thinking, message.content]
    clean = all(text.strip() and not TAGS.search(text) for text in texts)
    return Score(float(tags_ok and clean))


def thinking_tags_ok(ids: Sequence[int], *, think_id: int, end_think_id: int, thinking_open: bool = False) -> bool:
    """No thinking tag among an answer's ids, or one pair at its start. `thinking_open`: the prompt holds the first."""
    tags = [(place, token) for place, token in enumerate(ids) if token in (think_id, end_think_id)]
    if thinking_open:
        return [token for _, token in tags] == [end_think_id]
    return not tags or (tags[0] == (0, think_id) and [token for _, token in tags[1:]] == [end_think_id])


def language_consistency(problem: Problem, message: Message) -> Score:
    """The share of the words of the thinking that are in the language of the question. (R1, section 2.3.2)

    An answer without thinking, or whose thinking is figures alone, scores 1: nothing in it is in the wrong language,
    and scoring it 0 would pay for words as such. The price is that a model which mixes could escape by not thinking; it
    then loses the accuracy that thinking earns, which weighs more.
    """
    n_by_language = count_words(problem, message.thinking or "")
    n_all = sum(n_by_language.values())
    return Score(n_by_language[problem.language] / n_all if n_all else 1.0)


def is_mixed(problem: Problem, message: Message) -> bool:
    """Whether the thinking holds any word of a language other than the question's."""
    n_by_language = count_words(problem, message.thinking or "")
    return any(n > 0 for language, n in n_by_language.items() if language != problem.language)


def count_words(problem: Problem, text: str) -> dict[Language, int]:
    """Words of each language; figures, symbols, single Latin letters, LaTeX commands and notation do not count.

    Notation is what the problem's states are written in ("max" in "add max34"), and any foreign word that the question
    itself contains: to repeat those is to quote.
    """
    notation = {word for step in problem.steps for word in latin_words(step)}
    asked = latin_words(problem.prompt) if problem.language == "zh" else CJK.findall(problem.prompt)
    quoted = notation.union(asked)
    # Chinese writes no spaces: two characters are about a word. A run of one or two, such as 然后, is one word.
    n_zh = sum((len(run) + 1) // 2 for run in CJK.findall(text) if run not in quoted)
    return {"en": sum(word not in quoted for word in latin_words(text)), "zh": n_zh}


def latin_words(text: str) -> list[str]:
    return [word.lower() for word in LATIN.findall(text) if len(word) > 1 and not word.startswith("\\")]


def language_of(text: str) -> Language:
    """The language that most words of a text are in; English where it has none."""
    n_zh = sum((len(run) + 1) // 2 for run in CJK.findall(text))
    return "zh" if n_zh > len(latin_words(text)) else "en"
