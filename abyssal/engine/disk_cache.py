"""The prefix cache's second tier: full blocks on a disk, found again after a restart.

Reading happens while a request is admitted, a bounded number of blocks a step; each is checked before it is used. What
was computed is copied when it is offered and written by a thread of its own; where that can't keep up, blocks are let
go, to be offered again when they are next used. Nothing here can stop a request: what fails is said once and counted,
and the engine goes on without.

The thread first hashes the weights, for that hash names the folder. Until it is known nothing is found and nothing is
kept, and so again after `reopen`. An offer made before that is let go rather than queued: the weights that are hashed
might be later ones than those its blocks were computed with.
Owns the thread and its queue. Does not own files (`block_files.py`) nor the cache's tensors (`runner.py`).
Letters: N blocks, X bytes of a block.
"""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from abyssal.engine.block_bytes import block_width, read_blocks, write_blocks
from abyssal.engine.block_files import BlockFiles, times_of_use
from abyssal.engine.cache_fingerprint import facts, fingerprint, weights_of
from abyssal.engine.runner import Runner

MAX_BYTES = 4 << 30
PENDING_BYTES = 256 << 20  # copies that may wait to be written
STEP_BYTES = 32 << 20  # read and checked in a step
HASHED_FIRST_BYTES = 2 << 30  # weights up to this size are hashed before the engine starts: a second or two
CLOSE_S = 10.0  # for what is pending at the end


@dataclass(frozen=True, kw_only=True)
class DiskCache:
    """Where blocks are kept and how much room they may take. `tokenizer` is anything that names the tokenizer."""

    folder: Path
    max_bytes: int = MAX_BYTES
    tokenizer: str = ""

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes={self.max_bytes} leaves no room on the disk; give more, or no disk cache")


class DiskStats(NamedTuple):
    """In blocks, but for `n_bytes`: what is on the disk now, and what since the engine was made was written, read, let
    go because the disk could not keep up, given up for room, and found spoilt or gone. `fault`: why it does less."""

    n_blocks: int
    n_bytes: int
    n_written: int
    n_read: int
    n_dropped: int
    n_evicted: int
    n_spoilt: int
    fault: str | None


class Opened(NamedTuple):
    """The folder of the `generation`-th weights."""

    generation: int
    fingerprint: str


class Writer:
    """What happens in the thread. Others queue work and read fields, each of which changes in one go."""

    def __init__(self, cache: DiskCache) -> None:
        self.cache = cache
        self.queue: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self.files: BlockFiles | None = None
        self.opened: Opened | None = None
        self.generation = 0  # of the weights that the engine computes with
        self.pending: set[bytes] = set()
        self.n_written = self.n_spoilt = 0
        self.is_writing = self.is_reading = True
        self.fault: str | None = None

    def run(self) -> None:
        while (work := self.queue.get()) is not None:
            try:
                work()
            except Exception as error:  # whatever it is: a cache that fails stops nothing but itself
                self.fail(error)
        if self.files is not None:
            self.files.close()

    def open(self, generation: int, other_facts: dict[str, Any], weights: list[tuple[str, Tensor]]) -> None:
        if self.files is None and self.is_reading:
            try:
                self.files = BlockFiles(self.cache.folder, max_bytes=self.cache.max_bytes)
            except OSError as error:
                self.fail(error, reading=True)
                return
            if not self.files.is_owner:
                self.is_writing, self.fault = False, "another process owns it; it is read, not written"
        name = fingerprint(other_facts, weights, is_wanted=lambda: self.generation == generation)
        if name is not None:
            self.opened = Opened(generation, name)

    def write(self, opened: Opened, key: bytes, bytes_X: np.ndarray, used_ns: int) -> None:
        try:
            if self.files is not None and self.is_writing:
                self.n_written += self.files.write(opened.fingerprint, key, bytes_X, used_ns=used_ns)
        finally:
            self.pending.discard(key)

    def touch(self, opened: Opened, keys: list[bytes], now_ns: int) -> None:
        if self.files is not None and self.is_writing:
            self.files.touch(opened.fingerprint, keys, now_ns=now_ns)

    def discard(self, opened: Opened, key: bytes) -> None:
        self.n_spoilt += 1
        if self.files is not None and self.is_writing:
            self.files.discard(opened.fingerprint, key)

    def fail(self, error: Exception, *, reading: bool = False) -> None:
        """Nothing more is written. A full disk can still be read; one that fails at that is left alone."""
        self.is_writing = False
        self.is_reading = self.is_reading and not reading
        self.fault = f"{error}; going on without it" if reading else f"{error}; nothing more is written to it"


class DiskTier:
    """A tier of the scheduler's (`blocks.py`) for what `runner` computes. Its methods are the engine's thread's."""

    def __init__(self, cache: DiskCache, runner: Runner) -> None:
        self._runner, self._writer = runner, Writer(cache)
        self._width = block_width(runner.stores, runner.block_size)
        self.most_blocks = max(1, STEP_BYTES // self._width)
        self._most_pending = max(1, PENDING_BYTES // self._width)
        self._n_read = self._n_dropped = 0
        self._doubted: set[bytes] = set()  # found spoilt, and not offered again since
        self._said: str | None = None
        thread = threading.Thread(target=self._writer.run, name="disk cache", daemon=True)
        thread.start()
        # at the end of the interpreter too: a daemon thread can still be waited for then, and no other kind stops
        self._close = weakref.finalize(self, _close, self._writer, thread)
        self.reopen()
        if sum(tensor.nbytes for _, tensor in weights_of(runner.model)) <= HASHED_FIRST_BYTES:
            self.flush()
        self._say()

    @property
    def stats(self) -> DiskStats:
        writer, files = self._writer, self._writer.files
        return DiskStats(
            n_blocks=len(files.records) if files else 0,
            n_bytes=files.n_bytes if files else 0,
            n_written=writer.n_written,
            n_read=self._n_read,
            n_dropped=self._n_dropped,
            n_evicted=files.n_evicted if files else 0,
            n_spoilt=writer.n_spoilt,
            fault=writer.fault,
        )

    def reopen(self) -> None:
        """The runner has other weights."""
        writer, runner = self._writer, self._runner
        writer.generation += 1
        other_facts = facts(
            runner.config,
            runner.stores,
            block_size=runner.block_size,
            numerics=runner.numerics,
            tokenizer=writer.cache.tokenizer,
        )
        generation, weights = writer.generation, weights_of(runner.model)
        writer.queue.put(lambda: writer.open(generation, other_facts, weights))

    def find(self, keys: list[bytes]) -> int:
        """How many of these blocks are there, from the first on without a gap."""
        self._say()
        opened, files = self._open()
        if opened is None or files is None:
            return 0
        return next((n for n, key in enumerate(keys) if not self._has(files, opened, key)), len(keys))

    def bring(self, keys: list[bytes], blocks: np.ndarray) -> int:
        """Fill these blocks with what was computed under these keys; how many, from the first on, now hold it."""
        opened, files = self._open()
        if opened is None or files is None:
            return 0
        writer, runner, n = self._writer, self._runner, 0
        bytes_NX = np.empty((len(keys), self._width), np.uint8)
        try:
            while n < len(keys) and files.read(opened.fingerprint, keys[n], bytes_NX[n]):
                n += 1
            # with one that is gone others may be: a folder that was emptied is found out at once
            bad = [*keys[n : n + 1], *(key for key in keys[n + 1 :] if not files.exists(opened.fingerprint, key))]
            self._doubted.update(bad)
            for key in bad:
                writer.queue.put(partial(writer.discard, opened, key))
        except OSError as error:
            writer.fail(error, reading=True)
            self._say()
        blocks_N = torch.from_numpy(blocks[:n]).to(runner.device)
        write_blocks(runner.stores, blocks_N, runner.block_size, torch.from_numpy(bytes_NX[:n]))
        self._n_read += n
        return n

    def offer(self, keys: list[bytes], blocks: np.ndarray) -> None:
        """A sequence begins with these full blocks, which may change once this returns."""
        self._say()
        opened, files = self._open()
        writer = self._writer
        if opened is None or files is None or not writer.is_writing:
            return
        new = [n for n, key in enumerate(keys) if key not in writer.pending and not self._has(files, opened, key)]
        now_ns = time.time_ns()
        if len(new) < len(keys):
            writer.queue.put(lambda: writer.touch(opened, keys, now_ns))
        fitting = new[: max(0, self._most_pending - len(writer.pending))]
        self._n_dropped += len(new) - len(fitting)
        if fitting:
            blocks_N = torch.from_numpy(blocks[fitting]).to(self._runner.device)
            bytes_NX = read_blocks(self._runner.stores, blocks_N, self._runner.block_size).numpy()
            used_ns = times_of_use(now_ns, len(keys))
            for n, bytes_X in zip(fitting, bytes_NX, strict=True):
                writer.pending.add(keys[n])
                self._doubted.discard(keys[n])
                writer.queue.put(partial(writer.write, opened, keys[n], bytes_X, used_ns[n]))

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until what was offered is on the disk; False when that takes too long."""
        done = threading.Event()
        self._writer.queue.put(done.set)
        return done.wait(timeout_s)

    def close(self) -> None:
        """Write what is pending and let go of the folder. From now on nothing is found and nothing kept."""
        self._close()

    def _open(self) -> tuple[Opened | None, BlockFiles | None]:
        writer = self._writer
        opened = writer.opened
        if opened is None or opened.generation != writer.generation or not writer.is_reading:
            return None, None
        return opened, writer.files

    def _has(self, files: BlockFiles, opened: Opened, key: bytes) -> bool:
        return key not in self._doubted and files.has(opened.fingerprint, key)

    def _say(self) -> None:
        fault = self._writer.fault
        if fault is not None and fault != self._said:
            self._said = fault
            warnings.warn(f"the disk cache in {self._writer.cache.folder}: {fault}", stacklevel=2)


def _close(writer: Writer, thread: threading.Thread) -> None:
    writer.generation += 1  # no weights are worth hashing any more
    writer.queue.put(None)
    thread.join(CLOSE_S)
