"""The process behind WorkerProcess: reads jobs from stdin, writes (value, error) to stdout, until stdin closes.

Owns the calls into math-verify, reasoning-gym and a user's own rewards. It is run as a file of its own and imports
nothing of the package by itself, so that it starts quickly. Whoever started it enforces the time limit; the alarm here
only sees to it that no orphan goes on computing. Both directions are pickled: entries hold tuples, which JSON would
turn into lists.
"""

from __future__ import annotations

import importlib
import numbers
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


def run(job: tuple[Any, ...]) -> Any:
    match job:
        case ("import", package):
            importlib.import_module(package)
            return 1.0
        case ("math_verify", reference, answer):
            return compare(reference, answer)
        case ("reasoning_gym", task, answer, entry):
            return score_gym(task, answer, entry)
        case ("path", path):  # of whoever asks: where a user's modules are found, and the package's types
            sys.path[:] = path
            return 1.0
        case ("find", module, function):
            if not callable(getattr(importlib.import_module(module), function, None)):
                raise LookupError(f"module {module} has no function {function}")
            return 1.0
        case ("own", name, problem, message):
            module, _, function = name.partition(":")
            return getattr(importlib.import_module(module), function)(problem, message)
        case _:
            raise ValueError(f"no such job: {job!r}")


def reply_to(who: str, job: tuple[Any, ...]) -> tuple[float | None, str | None]:
    """(value, None) or (None, why): plain values alone, since what a user's function returns may not even pickle."""
    try:
        value = run(job)
        error = getattr(value, "error", None)  # a Score
        value = getattr(value, "value", value)
        if value is None and error:
            return None, one_line(f"unsure: {who}: {error}")
        if not isinstance(value, numbers.Real) or not 0 <= float(value) <= 1:  # NaN fails the comparison
            return None, one_line(f"returned: {who}: returned {value!r}, not a number from 0 to 1")
        return float(value), None
    except BaseException as error:  # SystemExit too: whoever calls sys.exit() has not decided
        return None, one_line(f"raised: {who}: {type(error).__name__}: {error}")


def one_line(text: str) -> str:
    return " ".join(text.split())[:500]


def main() -> None:
    jobs, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # a function that asks for input must not eat our jobs
    os.dup2(2, 1)  # nor may one that prints write between our replies
    if sys.platform == "linux" and "guarded" in sys.argv:
        resource = importlib.import_module("resource")
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    while True:
        try:
            limit_s, batch = pickle.load(jobs)
        except EOFError:
            return
        for who, job in batch:
            signal.setitimer(signal.ITIMER_REAL, limit_s + 1)  # its default action ends the process even inside C code
            reply = pickle.dumps(reply_to(who, job))
            signal.setitimer(signal.ITIMER_REAL, 0)
            replies.write(len(reply).to_bytes(4, "big") + reply)
            replies.flush()


if __name__ == "__main__":
    main()
