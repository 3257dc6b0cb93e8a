"""A process of its own for templates of strangers: template_worker.py, started, timed, ended, restarted.

Owns the process and the limits. Does not own what a template is given nor what becomes of its text.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any, NamedTuple

WORKER = Path(__file__).with_name("template_worker.py")
START_LIMIT_S = 60.0  # importing Jinja on a busy machine
WALL_PER_CPU = 20.0  # the limit is on time in the processor; beside it stands one on the clock, for what only sleeps
MAX_REPLY_BYTES = 1 << 28
KEPT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "SYSTEMROOT")  # of the environment; the rest is none of its business


class Outcome(NamedTuple):
    """`text`, or why there is none, in one line. `ended`: it, or one before it, took the process with it."""

    text: str | None
    error: str | None
    ended: bool = False


class TemplateProcess:
    """Renders one template, in a process started when first needed. `cpu_s` is for each rendering."""

    def __init__(self, template: str, *, cpu_s: float = 1.0) -> None:
        self.template, self.cpu_s = template, cpu_s
        self.worker = WORKER
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(self, jobs: list[dict[str, Any]], *, letters: str, max_chars: int) -> list[Outcome]:
        """What the template makes of each job. One that ends the process ends those behind it too."""
        request = {
            "template": self.template, "jobs": jobs, "letters": letters, "max_chars": max_chars, "cpu_s": self.cpu_s,
        }  # fmt: skip
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            outcomes: list[Outcome] = []
            try:
                body = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass")
                process.stdin.write(len(body).to_bytes(4, "big") + body)
                process.stdin.flush()
                while len(outcomes) < len(jobs):
                    outcomes.append(self._receive(process))
            except (OSError, EOFError, TimeoutError):
                self.close()
                why = f"it took more than {self.cpu_s:g} s or too much memory"
                outcomes += [Outcome(None, why, ended=True)] * (len(jobs) - len(outcomes))
            except BaseException:  # an interrupt: a reply still on its way must not answer the next question
                self.close()
                raise
        return outcomes

    def close(self) -> None:
        if self._process is not None:
            _end(self._process, self._owner)
        self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self.close()
        self._owner = os.getpid()
        # its own session, so that Ctrl-C reaches us alone; -P, so that the names of our files cannot hide packages
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(self.worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in KEPT if name in os.environ},
            start_new_session=True,
        )
        weakref.finalize(self, _end, self._process, self._owner)
        return self._process

    def _receive(self, process: subprocess.Popen[bytes]) -> Outcome:
        assert process.stdout is not None
        deadline = time.monotonic() + START_LIMIT_S + WALL_PER_CPU * self.cpu_s
        size = int.from_bytes(_read(process.stdout.fileno(), 4, deadline), "big")
        if size > MAX_REPLY_BYTES:
            raise EOFError
        reply = _read(process.stdout.fileno(), size, deadline).decode("utf-8", "surrogatepass")
        return Outcome(*json.loads(reply))


def _read(handle: int, size: int, deadline: float) -> bytes:
    received = bytearray()
    while len(received) < size:
        if not select.select([handle], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        part = os.read(handle, size - len(received))
        if not part:
            raise EOFError
        received += part
    return bytes(received)


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner == os.getpid():  # a fork's is its parent's to end
        process.kill()
        process.communicate()
