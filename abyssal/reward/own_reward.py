"""A user's own reward, `module:function`, called in a worker process with a time limit.

Owns finding it and saying what is wrong with it. Whatever the function does (raise, hang, exit, print, ask for input,
return nonsense), the stage goes on with a Score(None, why) for that answer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from abyssal.reward.worker_process import Job, WorkerProcess
from abyssal.types import Message, Problem, Score


class OwnReward:
    """Calls of functions of the user's own, all in one process, which keeps what they keep. Not for threads.

    The process imports a module once; nothing it prints is shown.
    """

    def __init__(self, *, time_limit_s: float) -> None:
        if time_limit_s <= 0:
            raise ValueError(f"reward_limit_s={time_limit_s} leaves no time for a reward; give seconds above 0")
        self.time_limit_s = time_limit_s
        self.worker = WorkerProcess(guard_memory=False)  # a reward may bring a model of its own
        self._found: set[str] = set()

    def check(self, name: str) -> None:
        """Raise ValueError with the remedy if there is no such function."""
        module, colon, function = name.partition(":")
        if not (module and colon and function):
            raise ValueError(
                f"no verifier {name!r}; choose exact, answer, instruction, reasoning_gym:<task> or module:function"
            )
        for job in preparations(name):
            ready = self.worker.prepare(job)
            if ready.value is None:
                why = (ready.error or "").partition(f"{name}: ")[2]
                raise ValueError(
                    f"verifier {name!r}: {why}; put its folder on PYTHONPATH and install what it imports"
                )
        self._found.add(name)

    def scores(self, asked: Sequence[tuple[Problem, Message]]) -> list[Score]:
        """A score for each (problem, message), in their order."""
        scores: dict[int, Score] = {}
        for name in dict.fromkeys(problem.verifier for problem, _ in asked):
            if name not in self._found:
                self.check(name)
            mine = [i for i, (problem, _) in enumerate(asked) if problem.verifier == name]
            jobs: list[Job] = [(name, ("own", name, *asked[i])) for i in mine]
            answers = self.worker.ask(jobs, self.time_limit_s, before=preparations(name))
            scores |= dict(zip(mine, answers, strict=True))
        return [scores[i] for i in range(len(asked))]


def preparations(name: str) -> list[Job]:
    module, _, function = name.partition(":")
    return [(name, ("path", list(sys.path))), (name, ("find", module, function))]
