"""Is an answer equal to the reference, as text or as mathematics?

Owns the normal form of an answer and the cheap decisions that need no algebra; asks a worker process for the others
(math-verify, reasoning-gym's scorers). Does not own which verifier a problem wants: see verifiers.py.

Algebra runs in a process of its own because nothing else can stop it: sympy loops for ever on some input, math-verify's
own timer is a signal that only works in a main thread, and a tower of powers eats all memory. A worker that fails or
takes too long gives Score(None, why): it never becomes a silent 0.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any

from abyssal.reward.worker_process import Job, WorkerProcess
from abyssal.types import Score

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
    """Algebra in a worker process of its own. Not for threads."""

    def __init__(self, *, time_limit_s: float = 5.0):
        if time_limit_s <= 0:
            raise ValueError(f"time_limit_s={time_limit_s} leaves no time to verify; give seconds above 0")
        self.time_limit_s = time_limit_s
        self.worker = WorkerProcess(guard_memory=True)
        self._found: set[str] = set()

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
        self.worker.close()

    def __enter__(self) -> MathVerifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, package: str, arguments: tuple[Any, ...]) -> Score:
        if package not in self._found:
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"verifying needs the package {package}: pip install 'abyssal[rl]'")
            self._found.add(package)
        job: Job = (package, (package, *arguments))
        return self.worker.ask([job], self.time_limit_s, before=[(package, ("import", package))])[0]
