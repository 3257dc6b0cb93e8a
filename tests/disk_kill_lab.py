"""Serve with a disk cache, be killed while it is written, serve again; count what is found and what differs.

A script of its own, run by test_disk_cache.py: it imports everything once and forks a process for each part. One JSON
line an attempt: how it was killed, the share of the blocks of finished requests that are found again, answers that
differ from those computed anew, and what a second process says while the first one lives.

    python tests/disk_kill_lab.py FOLDER ATTEMPTS
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small_models import random_prompts, small_model

import abyssal.engine.block_files as block_files
from abyssal.engine import Engine
from abyssal.engine.disk_cache import DiskCache
from abyssal.types import Completion, SamplingParams

BLOCK = 4
N_BEFORE = 20  # requests whose blocks are on the disk before the killing begins
N_REQUESTS = 30
N_PROMPT = 33  # ids; eight blocks that a later request can find
WHERE = ("midst", "any time", "rename", "open")
PARAMS = SamplingParams(max_tokens=2, seed=1)


def engine_on(folder: Path | None) -> Engine:
    cache = None if folder is None else DiskCache(folder=folder)
    return Engine(small_model(), eos_ids=[], block_size=BLOCK, invariant=True, prefix_cache=True, disk_cache=cache)


def prompts() -> list[list[int]]:
    return random_prompts([N_PROMPT] * N_REQUESTS)


def serve(folder: Path, told: int, arm: Callable[[], None]) -> None:
    """Answer one prompt after another and tell of each."""
    engine = engine_on(folder)
    for n, prompt in enumerate(prompts()):
        if n == N_BEFORE:
            engine._tier.flush()
            arm()
        engine.generate([prompt], PARAMS)
        os.write(told, b".")
        if n >= N_BEFORE:
            engine._tier.flush()  # a reader's pause: the process dies in it, or in the next request


def killed_by_itself(where: str, n: int) -> Callable[[], None]:
    """At the n-th write from now on: before it begins, in its midst, or before its file gets its name."""
    counts = {"n": n}

    def die_when_it_is_time(*, first: Callable[[], object] = lambda: None) -> None:
        counts["n"] -= 1
        if counts["n"] <= 0:
            first()
            os.kill(os.getpid(), signal.SIGKILL)

    class Half:
        """A file that dies after half of the block."""

        def __init__(self, file: Any) -> None:
            self.file, self.n_writes = file, 0

        def __enter__(self) -> Half:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, content: Any) -> None:
            self.n_writes += 1
            if self.n_writes == 2:
                die_when_it_is_time(first=lambda: (self.file.write(content[: len(content) // 2]), self.file.flush()))
            self.file.write(content)

    def arm() -> None:
        if where == "midst":
            block_files.open = lambda file, mode: Half(open(file, mode))  # type: ignore[attr-defined]
            return
        real = getattr(os, where)

        def call(*arguments: object, **settings: object) -> object:
            die_when_it_is_time()
            return real(*arguments, **settings)

        setattr(block_files.os, where, call)

    return arm


def second(folder: Path) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return engine_on(folder).disk_stats.fault


def look(folder: Path, n_finished: int, wanted: list[Completion]) -> dict[str, Any]:
    """What a new process finds of the requests that were finished, and whether its answers are right."""
    engine = engine_on(folder)
    n_found = n_wrong = 0
    for prompt, want in zip(prompts()[:n_finished], wanted, strict=False):
        before = engine.prefix_stats.n_found_on_disk
        (got,) = engine.generate([prompt], PARAMS)
        n_found += engine.prefix_stats.n_found_on_disk - before
        experts = got.experts is not None and want.experts is not None and torch.equal(got.experts, want.experts)
        n_wrong += (got.ids, got.logps) != (want.ids, want.logps) or not experts
    stats = engine.disk_stats
    engine.close()
    left = [path.name for path in folder.rglob("*.new")]
    whole = n_finished * (N_PROMPT - 1) // BLOCK * BLOCK
    return {"finished": n_finished, "found": n_found / whole, "wrong": n_wrong, "spoilt": stats.n_spoilt, "left": left}


def in_child(work: Callable[[], Any]) -> Any:
    """Its result, from a process of its own: no lock, no thread and no engine stay behind."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, json.dumps(work()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said)


def attempt(folder: Path, wanted: list[Completion], i: int) -> dict[str, Any]:
    where = WHERE[i % len(WHERE)]
    rng = random.Random(i)
    n = rng.randrange(1, 8 * (N_REQUESTS - N_BEFORE))
    reader, writer = os.pipe()
    waiting, go = os.pipe()
    child = os.fork()
    if child == 0:
        serve(folder, writer, killed_by_itself(where, n) if where != "any time" else lambda: os.read(waiting, 1))
        signal.pause()  # killed at rest
    os.close(writer)
    finished = b""
    while len(finished) < N_BEFORE:
        finished += os.read(reader, 1)
    other = in_child(lambda: second(folder)) if where == "any time" else None
    if where == "any time":
        os.write(go, b".")
        time.sleep(rng.random() * 0.1)
        os.kill(child, signal.SIGKILL)
    while byte := os.read(reader, 1 << 16):
        finished += byte
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{where} {n}: it lived"
    return {"where": where, "n": n, "second": other} | in_child(lambda: look(folder, len(finished), wanted))


def main(home: Path, n_attempts: int) -> None:
    torch.set_num_threads(1)
    anew = engine_on(None)
    wanted = [anew.generate([prompt], PARAMS)[0] for prompt in prompts()]
    for i in range(n_attempts):
        print(json.dumps(attempt(home / str(i), wanted, i)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
