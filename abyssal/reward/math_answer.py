"""Is an answer equal to the reference, as text or as mathematics?

Owns the normal form of an answer, the cheap decisions that need no algebra, and the worker process that makes the
others (math-verify, reasoning-gym's scorers). Does not own which verifier a problem wants: see verifiers.py.

Algebra runs in a process of its own because nothing else can stop it: sympy loops for ever on some input, math-verify's
own timer is a signal that only works in a main thread, and a tower of powers eats all memory. A worker that fails or
takes too long gives Score(None, why): it never becomes a silent 0.
"""

from __future__ import annotations

import importlib.util
import numbers
import pickle
import re
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from abyssal.types import Score

WORKER = Path(__file__).with_name("answer_worker.py")
START_LIMIT_S = 120.0  # importing sympy takes seconds on a busy machine, and that is no fault of the answer

ANSWER_TAGS = re.compile(r"</?answer>")
WHOLLY_LATEX = re.compile(r"\$+([^$]+)\$+")
# A short number, a word too long to be a product of letters, or single characters by spaces.
PLAIN = re.compile(r"\d{1,12}|[^\W\d_]{4,12}|\w( \w)*")
# Typed in a Chinese text, 12 and (x) come in full width. Only that: NFKC would also turn x² into x2.
SAME_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " ", 0x2212: "-"}


def normalise(text: str) -> str:
    """An answer without what does not matter: tags, box, dollar signs, full stop, full width, repeated spaces."""
    text = ANSWER_TAGS.sub(" ", text.translate(SAME_WIDTH)).strip()
    boxed = last_boxed(text)
    text = (text if boxed is None else boxed).strip()
    text = text.rstrip(".。")
    if found := WHOLLY_LATEX.fullmatch(text):
        text = found[1]
    return " ".join(text.split())


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...}, braces counted; None where there is none or it never closes."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def same_text(reference: str, answer: str) -> Score:
    """Equal as text: the only thing that counts where the answer is a name or a state and not mathematics."""
    return Score(float(normalise(reference) == normalise(answer)))


def decided_as_text(reference: str, answer: str) -> bool | None:
    """Right or wrong where the text alone can tell, else None."""
    reference, answer = normalise(reference), normalise(answer)
    if reference == answer:
        return True
    if not answer:
        return False
    if PLAIN.fullmatch(reference) and PLAIN.fullmatch(answer):
        both_numbers = reference.isdecimal() and answer.isdecimal()
        return both_numbers and int(reference) == int(answer)  # 07 is 7; every other difference between such is real
    return None


class MathVerifier:
    """Owns the worker process: starts it when first needed, ends it when it hangs, starts another. Not for threads."""

    def __init__(self, *, time_limit_s: float = 5.0):
        if time_limit_s <= 0:
            raise ValueError(f"time_limit_s={time_limit_s} leaves no time to verify; give seconds above 0")
        self.time_limit_s = time_limit_s
        self.n_restarts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._imported: set[str] = set()

    def compare(self, reference: str, answer: str) -> Score:
        """Equal as mathematics? Text first: most answers of a small model are settled without any algebra."""
        decided = decided_as_text(reference, answer)
        if decided is not None:
            return Score(float(decided))
        return self._ask("math_verify", (normalise(reference), normalise(answer)))

    def score_gym(self, task: str, answer: str, entry: dict[str, Any]) -> Score:
        """What reasoning-gym's own scorer of this task says."""
        return self._ask("reasoning_gym", (task, answer, entry))

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None
        self._imported = set()

    def __enter__(self) -> MathVerifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, package: str, arguments: tuple[Any, ...]) -> Score:
        if package not in self._imported:
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"verifying needs the package {package}: pip install 'abyssal[rl]'")
            ready = self._call(("import", package), START_LIMIT_S)
            if ready.value is None:
                return ready
            self._imported.add(package)
        return self._call((package, *arguments), self.time_limit_s)

    def _call(self, job: tuple[Any, ...], limit_s: float) -> Score:
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump((limit_s, job), process.stdin)
            process.stdin.flush()
            if select.select([process.stdout], [], [], limit_s)[0]:
                value, error = pickle.load(process.stdout)
                return checked(value) if error is None else Score(None, error)
            why = f"{job[0]} took more than {limit_s:g} s"
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            why = f"the worker of {job[0]} died"
        except BaseException:  # an interrupt: a reply still on its way must not answer the next question
            self.close()
            raise
        self.close()
        self.n_restarts += 1
        return Score(None, why)

    def _start(self) -> subprocess.Popen[bytes]:
        # Its own session, so that Ctrl-C reaches us alone; -P, so that the names of our files cannot hide packages.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self._process


def checked(value: object) -> Score:
    """A verifier's number as a Score; anything that is not a number from 0 to 1 is the verifier's failure."""
    if isinstance(value, Score):
        return checked(value.value) if value.value is not None else value
    # numbers.Real, so that NumPy's count as well; the comparison also turns NaN away
    if not isinstance(value, numbers.Real) or not 0 <= float(value) <= 1:
        return Score(None, f"the verifier returned {value!r}, not a number from 0 to 1")
    return Score(float(value))
