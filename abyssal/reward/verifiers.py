"""Which function scores which problem: the accuracy reward of every family, of reasoning-gym and of a user's own.

Owns the dispatch on `problem.verifier` and, through MathVerifier, the worker process. Does not own the verdicts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from abyssal.reward.instruction import instruction_followed
from abyssal.reward.math_answer import MathVerifier, checked, same_text
from abyssal.reward.open_request import request_met
from abyssal.types import Message, Problem, Score

GYM = "reasoning_gym:"


class Verifiers:
    """The accuracy reward: `verifiers.accuracy(problem, message)`. Close it, or use it in a `with`, to end its worker.

    A verifier is "exact" (equal as text), "answer" (equal as text or as mathematics), "instruction" (a rule and the
    answer inside), "request" (an open one), "reasoning_gym:<task>", or "module:function" of the user's own, which runs
    in this process and without a time limit.
    """

    def __init__(self, *, time_limit_s: float = 5.0):
        self._math = MathVerifier(time_limit_s=time_limit_s)
        self._loaded: dict[str, Callable[[Problem, Message], object]] = {}

    def accuracy(self, problem: Problem, message: Message) -> Score:
        """Whether what follows the thinking is right; Score(None, why) if that could not be decided."""
        name = problem.verifier
        match name:
            case "exact":
                return same_text(problem.answer, message.content)
            case "answer":
                return self._math.compare(problem.answer, message.content)
            case "instruction":
                return instruction_followed(problem, message)
            case "request":
                return request_met(problem, message)
            case _ if name.startswith(GYM):
                return self._score_gym(problem, message)
            case _:
                return self._score_own(problem, message)

    def check(self, name: str) -> None:
        """Raise ValueError with the remedy if a verifier cannot work, so that a stage says so before its first step."""
        if name not in ("exact", "answer", "instruction", "request") and not name.startswith(GYM):
            self._load(name)

    @property
    def n_restarts(self) -> int:
        """How often the worker had to be ended and started again."""
        return self._math.n_restarts

    def close(self) -> None:
        self._math.close()

    def __enter__(self) -> Verifiers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _score_gym(self, problem: Problem, message: Message) -> Score:
        if "entry" not in problem.metadata:
            raise ValueError(f"verifier {problem.verifier!r} needs metadata['entry'] as reasoning-gym made it")
        answer = message.content.strip()
        if spelling := problem.metadata.get("spelling"):  # the prompt used shorter names for the task's tokens
            answer = " ".join(spelling.get(token, token) for token in answer.split())
        return self._math.score_gym(problem.verifier.removeprefix(GYM), answer, problem.metadata["entry"])

    def _score_own(self, problem: Problem, message: Message) -> Score:
        function = self._load(problem.verifier)
        try:
            return checked(function(problem, message))
        except Exception as error:  # whatever a user's function raises is counted and shown, and ends no run
            return Score(None, f"{problem.verifier}: {type(error).__name__}: {error}")

    def _load(self, name: str) -> Callable[[Problem, Message], object]:
        if name in self._loaded:
            return self._loaded[name]
        module_name, colon, function_name = name.partition(":")
        if not (module_name and colon and function_name):
            raise ValueError(
                f"no verifier {name!r}; choose exact, answer, instruction, request, {GYM}<task> or module:function"
            )
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ValueError(f"verifier {name!r}: {error}; put its folder on PYTHONPATH") from error
        function = getattr(module, function_name, None)
        if not callable(function):
            raise ValueError(f"verifier {name!r}: module {module_name} has no function {function_name}")
        self._loaded[name] = function
        return self._loaded[name]
