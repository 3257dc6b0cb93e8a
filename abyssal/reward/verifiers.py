"""Which function scores which problem: the accuracy reward of every family, of reasoning-gym and of a user's own.

Owns the dispatch on `problem.verifier`, and that an answer nobody could decide is not decided anew (verdicts.py). Does
not own the verdicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from abyssal.reward.instruction import instruction_followed
from abyssal.reward.math_answer import MathVerifier, same_text
from abyssal.reward.open_request import request_met
from abyssal.reward.own_reward import OwnReward
from abyssal.reward.verdicts import Verdicts, key_of
from abyssal.types import Message, Problem, Score

GYM = "reasoning_gym:"


class Verifiers:
    """The accuracy reward: `verifiers.accuracy(problem, message)`. Close it, or use it in a `with`, to end its workers.

    A verifier is "exact" (equal as text), "answer" (equal as text or as mathematics), "instruction" (a rule and the
    answer inside), "request" (an open one), "reasoning_gym:<task>", or "module:function" of the user's own, which runs
    in a process of its own for at most `own_limit_s` an answer.
    """

    def __init__(self, *, time_limit_s: float = 5.0, own_limit_s: float = 10.0):
        self._math = MathVerifier(time_limit_s=time_limit_s)
        self._own = OwnReward(time_limit_s=own_limit_s)
        self._verdicts = Verdicts()

    def accuracy(self, problem: Problem, message: Message) -> Score:
        """Whether what follows the thinking is right; Score(None, why) if that could not be decided."""
        return self.accuracies([(problem, message)])[0]

    def accuracies(self, asked: Sequence[tuple[Problem, Message]]) -> list[Score]:
        """`accuracy` of many; the same answer to the same problem is looked at once."""
        keys = [key_of(problem, message) for problem, message in asked]
        once = dict(zip(keys, asked, strict=True))
        scores: dict[tuple[str, str], Score] = {}
        for key, (problem, message) in once.items():
            if reason := self._verdicts.reason(problem, message):
                scores[key] = Score(None, reason)
            elif not is_own(problem.verifier):
                scores[key] = self._ours(problem, message)
        left = [key for key in once if key not in scores]
        scores |= dict(zip(left, self._own.scores([once[key] for key in left]), strict=True))
        for key, (problem, message) in once.items():
            error = scores[key].error
            if error is not None and not self._verdicts.reason(problem, message):
                self._verdicts.add(problem, message, error)
        return [scores[key] for key in keys]

    @contextmanager
    def recorded_in(self, path: Path) -> Iterator[None]:
        """What is undecided inside this block is written to a file, and what stands there is not decided again."""
        self._verdicts = Verdicts(path)
        try:
            yield
        finally:
            self._verdicts = Verdicts()

    def forget(self, asked: Sequence[tuple[Problem, Message]]) -> None:
        """Let these be decided anew when they are met again: by then somebody may have mended the verifier."""
        self._verdicts.forget(asked)

    def check(self, name: str) -> None:
        """Raise ValueError with the remedy if a verifier cannot work, so that a stage says so before its first step."""
        if is_own(name):
            self._own.check(name)

    @property
    def n_restarts(self) -> int:
        """How often a worker had to be ended and started again."""
        return self._math.worker.n_restarts + self._own.worker.n_restarts

    def close(self) -> None:
        self._math.close()
        self._own.worker.close()

    def __enter__(self) -> Verifiers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ours(self, problem: Problem, message: Message) -> Score:
        match problem.verifier:
            case "exact":
                return same_text(problem.answer, message.content)
            case "answer":
                return self._math.compare(problem.answer, message.content)
            case "instruction":
                return instruction_followed(problem, message)
            case "request":
                return request_met(problem, message)
            case _:
                return self._score_gym(problem, message)

    def _score_gym(self, problem: Problem, message: Message) -> Score:
        if "entry" not in problem.metadata:
            raise ValueError(f"verifier {problem.verifier!r} needs metadata['entry'] as reasoning-gym made it")
        answer = message.content.strip()
        if spelling := problem.metadata.get("spelling"):  # the prompt used shorter names for the task's tokens
            answer = " ".join(spelling.get(token, token) for token in answer.split())
        return self._math.score_gym(problem.verifier.removeprefix(GYM), answer, problem.metadata["entry"])


def is_own(name: str) -> bool:
    return name not in ("exact", "answer", "instruction", "request") and not name.startswith(GYM)
