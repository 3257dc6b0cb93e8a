"""The process behind MathVerifier: reads jobs from stdin, writes (value, error) to stdout, until stdin closes.

Owns the calls into math-verify and reasoning-gym. It is run as a file of its own and imports nothing of the package, so
that it starts without torch. Whoever started it enforces the time limit; the alarm here only sees to it that no orphan
goes on computing. Both directions are pickled: entries hold tuples, which JSON would turn into lists.
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
import signal
import sys
from typing import Any

MEMORY_BYTES = 4 << 30  # a tower of powers must end in a MemoryError, not in a machine that swaps
NUMBER = re.compile(r"[+-]?[\d,. ]+%?")
UNFINISHED = re.compile(r"[\w)}%]\s*([-+*×·−]|\\times|\\cdot)")  # an operator with something on its left: not a sign
SCIENTIFIC = re.compile(r"-?\d+(\.\d+)?(\s*(\*|×|·|\\times|\\cdot)\s*10\s*(\^|\*\*)|[eE]).*")
WORD = re.compile(r"(?<!\\)\b[^\W\d_]{2,}")
DELIMITED = re.compile(r"\$|\\\[|\\\(|\\boxed")


def compare(reference: str, answer: str) -> float:
    """1 or 0 by math-verify. An answer it cannot read is wrong; a reference it cannot read decides nothing."""
    math_verify = importlib.import_module("math_verify")
    gold = read(math_verify, reference)
    if all(isinstance(form, str) for form in gold):  # nothing was parsed, at most a piece of text was cut out
        if any(c.isdigit() or c in "\\^=+*/{}" for c in reference):
            raise ValueError(f"math-verify cannot read the reference answer {reference!r}")
        return 0.0  # a name, a word: the text has been compared already
    found = read(math_verify, answer)
    if not found:
        return 0.0
    if NUMBER.fullmatch(reference) and UNFINISHED.search(found[-1]) and not SCIENTIFIC.fullmatch(found[-1]):
        return 0.0  # "7+5" for 12 repeats the question: arithmetic left undone is no answer
    return float(math_verify.verify(gold, found, timeout_seconds=None, raise_on_error=True))


def read(math_verify: Any, text: str) -> list[Any]:
    """The expressions in a text, the last element as written. Bare LaTeX is only read whole between dollar signs."""
    as_it_is, as_latex = text, f"${text}$"
    is_prose = DELIMITED.search(text) or WORD.search(text)
    found: list[Any] = []
    for form in (as_it_is, as_latex) if is_prose else (as_latex, as_it_is):
        found = found or math_verify.parse(form, parsing_timeout=None, raise_on_error=True)
    return found


def score_gym(task: str, answer: str, entry: dict[str, Any]) -> float:
    gym = importlib.import_module("reasoning_gym")
    return float(gym.get_score_answer_fn(task)(answer=answer, entry=entry))


def run(job: tuple[Any, ...]) -> float:
    match job:
        case ("import", package):
            importlib.import_module(package)
            return 1.0
        case ("math_verify", reference, answer):
            return compare(reference, answer)
        case ("reasoning_gym", task, answer, entry):
            return score_gym(task, answer, entry)
        case _:
            raise ValueError(f"no such job: {job!r}")


def main() -> None:
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a package that prints must not write between our replies
    if sys.platform == "linux":
        resource = importlib.import_module("resource")
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    while True:
        try:
            limit_s, job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, limit_s + 1)  # its default action ends the process even inside C code
        try:
            reply: tuple[float | None, str | None] = (run(job), None)
        except Exception as error:
            reply = (None, f"{job[0]}: {type(error).__name__}: {error}"[:500])
        signal.setitimer(signal.ITIMER_REAL, 0)
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    main()
