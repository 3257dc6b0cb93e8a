"""A process of its own for what may hang, crash or eat all memory: answer_worker.py, started, timed, ended, restarted.

Owns the process and the limits. Does not own what is asked. A job that fails gives Score(None, why), never a number;
`why` begins with one of KINDS, the word that it is counted by.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from abyssal.types import Score

WORKER = Path(__file__).with_name("answer_worker.py")
START_LIMIT_S = 120.0  # importing sympy takes seconds on a busy machine, and that is no fault of the answer
KINDS = ("timeout", "died", "raised", "returned", "unsure")

Job = tuple[str, tuple[Any, ...]]  # whose it is, to be named when it fails, and what answer_worker.py knows to do


class WorkerProcess:
    """One process at a time, started when first needed. Not for threads. `guard_memory` bounds what it may allocate."""

    def __init__(self, *, guard_memory: bool) -> None:
        self.n_restarts = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._guard_memory = guard_memory
        self._prepared: list[Job] = []  # by the process that runs now
        self._received = bytearray()

    def prepare(self, job: Job) -> Score:
        """A job that each new process does once before others, at leisure: an import."""
        if job in self._prepared:
            return Score(1.0)
        ready = self._exchange([job], START_LIMIT_S)[0]
        if ready.value is not None:
            self._prepared.append(job)
        return ready

    def ask(self, jobs: Sequence[Job], limit_s: float, *, before: Sequence[Job] = ()) -> list[Score]:
        """A score for each job, whatever becomes of the others; `before` is prepared, again after each restart."""
        scores: list[Score] = []
        while len(scores) < len(jobs):
            for job in before:
                ready = self.prepare(job)
                if ready.value is None:
                    return scores + [ready] * (len(jobs) - len(scores))
            scores += self._exchange(jobs[len(scores) :], limit_s)
        return scores

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.process = None
        self._prepared = []
        self._received.clear()

    def _exchange(self, jobs: Sequence[Job], limit_s: float) -> list[Score]:
        """Scores up to and with the first job that ended the process. All are sent at once, answered one by one."""
        process = self.process or self._start()
        assert process.stdin is not None
        scores: list[Score] = []
        try:
            pickle.dump((limit_s, list(jobs)), process.stdin)
            process.stdin.flush()
            while len(scores) < len(jobs):
                reply = self._receive(limit_s)
                if reply is None:
                    why = f"took more than {limit_s:g} s"
                    return [*scores, self._end(undecided("timeout", jobs[len(scores)][0], why))]
                value, error = pickle.loads(reply)
                scores.append(Score(value) if error is None else Score(None, error))
            return scores
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            why = f"its process died ({cause_of_death(process)})"
            return [*scores, self._end(undecided("died", jobs[len(scores)][0], why))]
        except BaseException:  # an interrupt: a reply still on its way must not answer the next question
            self.close()
            raise

    def _end(self, score: Score) -> Score:
        self.close()
        self.n_restarts += 1
        return score

    def _receive(self, limit_s: float) -> bytes | None:
        """The next reply, its length in four bytes before it; None when it does not come in time."""
        assert self.process is not None and self.process.stdout is not None
        deadline = time.monotonic() + limit_s
        received, handle = self._received, self.process.stdout.fileno()
        while len(received) < 4 or len(received) < 4 + int.from_bytes(received[:4], "big"):
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([handle], [], [], left_s)[0]:
                return None
            part = os.read(handle, 1 << 16)
            if not part:
                raise EOFError
            received += part
        end = 4 + int.from_bytes(received[:4], "big")
        reply = bytes(received[4:end])
        del received[:end]
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        # Its own session, so that Ctrl-C reaches us alone; -P, so that the names of our files cannot hide packages.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), *(["guarded"] if self._guard_memory else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self.process


def cause_of_death(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return "it closed its pipe"
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def undecided(kind: Literal["timeout", "died"], who: str, what: str) -> Score:
    """No verdict, and why in one line."""
    return Score(None, f"{kind}: {who}: {' '.join(what.split())}"[:500])


def kind_of(reason: str) -> str:
    """The word that an undecided answer is counted by."""
    kind = reason.partition(":")[0]
    return kind if kind in KINDS else "unsure"
