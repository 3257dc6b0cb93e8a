"""Who runs, who waits and who gives way: continuous batching with admission and preemption by recomputation.

First come, first served. A sequence is admitted when a row is free and its prompt's blocks are there, with one block to
spare for each running sequence so that growth does not at once throw somebody out. Blocks of an answer are taken as it
grows; when none is left, prompts kept for waiting siblings are given up first, then the youngest running sequence
goes back to the head of the queue and its cache is recomputed later. Noise is keyed by seed and position, so it draws
on unchanged. Siblings (same prompt) share the prompt's full blocks; each gets its own copy of the last, partly filled
one. Owns the queue, the rows and the block pool. Does not own tensors: `runner.py` computes what is decided here.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from abyssal.engine.blocks import BlockPool, blocks_for
from abyssal.engine.sequence import Prefix, Rows, Sequence


class Admission(NamedTuple):
    """Work in this order: compute `prefills` into their blocks, copy blocks, draw each new sequence's next token."""

    prefills: list[tuple[Prefix, np.ndarray]]
    copy_from: list[int]
    copy_to: list[int]
    placed: list[tuple[Sequence, Prefix]]


class Scheduler:
    def __init__(self, *, pool: BlockPool, rows: Rows, block_size: int, prefill_tokens: int) -> None:
        self.pool, self.rows = pool, rows
        self.block_size, self.prefill_tokens = block_size, prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self._prefixes: dict[bytes, Prefix] = {}
        self.version = 0  # changes whenever the set of running sequences does

    def add(self, sequence: Sequence) -> None:
        ids = np.array(sequence.prompt_ids, np.int64)
        key = ids.tobytes()
        prefix = self._prefixes.setdefault(key, Prefix(ids, key))
        prefix.n_waiting += 1
        sequence.prefix = prefix
        self.waiting.append(sequence)

    def admit(self) -> Admission:
        """Move waiting sequences into free rows as far as rows, blocks and the prefill budget reach."""
        admission = Admission([], [], [], [])
        longest = 0
        while self.waiting and self.rows.n_free:
            prefix = self.waiting[0].prefix
            assert prefix is not None, "a waiting sequence has something to compute"
            if prefix.blocks is None:
                # the batch is padded to its longest prompt: that is what the budget counts
                longest = max(longest, len(prefix.ids))
                if admission.prefills and (len(admission.prefills) + 1) * longest > self.prefill_tokens:
                    break
            if not self._make_room(prefix):
                break
            if prefix.blocks is None:
                prefix.blocks = self.pool.take(blocks_for(len(prefix.ids), self.block_size))
                admission.prefills.append((prefix, prefix.blocks))
            self._place(self.waiting.popleft(), prefix, admission)
        if admission.placed:
            self.version += 1
        return admission

    def _make_room(self, prefix: Prefix) -> bool:
        """Are one more sequence's blocks there? With nobody running they must be: kept prompts are given up."""
        spare = len(self.rows.active)
        need = 1 if prefix.blocks is not None else blocks_for(len(prefix.ids), self.block_size)
        if self.pool.n_free >= need + spare:
            return True
        if spare:
            return False
        if prefix.blocks is None:
            self.drop_prefixes()
            assert self.pool.n_free >= need, f"{need} blocks needed, {self.pool.n_free} free with nobody running"
        return True

    def _place(self, sequence: Sequence, prefix: Prefix, admission: Admission) -> None:
        blocks = prefix.blocks
        assert blocks is not None
        has_tail = len(prefix.ids) % self.block_size > 0
        prefix.n_waiting -= 1
        sequence.prefix = None
        if prefix.n_waiting == 0 or (has_tail and self.pool.n_free == 0):
            # the last sibling, or one for whom there is no block to copy to, takes the blocks themselves
            prefix.blocks = None
            self._forget_if_done(prefix)
        elif has_tail:
            own = self.pool.take(1)
            self.pool.share(blocks[:-1])
            admission.copy_from.append(int(blocks[-1]))
            admission.copy_to.append(int(own[0]))
            blocks = np.concatenate((blocks[:-1], own))
        else:
            self.pool.share(blocks)
        self.rows.place(sequence, blocks)
        admission.placed.append((sequence, prefix))

    def grow(self) -> np.ndarray:
        """See that every running sequence has a slot for its next token; returns the rows that still run."""
        rows = self.rows
        while True:
            active = rows.active
            short = active[rows.n_blocks_R[active] * self.block_size < rows.length_R[active]]
            if len(short) <= self.pool.n_free:
                break
            if not self.drop_prefixes():
                self.preempt(rows.sequence_in(int(active[-1])))
        if len(short):
            rows.blocks_RN[short, rows.n_blocks_R[short]] = self.pool.take(len(short))
            rows.n_blocks_R[short] += 1
        return active

    def preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue, its blocks free; what it has drawn is recomputed with its prompt."""
        self.pool.release(self.rows.clear(sequence))
        ids = np.concatenate((np.array(sequence.prompt_ids, np.int64), sequence.ids))
        sequence.prefix = Prefix(ids, n_waiting=1)
        self.waiting.appendleft(sequence)
        self.version += 1

    def preempt_all(self) -> None:
        """Nothing computed so far may be used again, as after a change of weights."""
        for row in self.rows.active[::-1].tolist():
            self.preempt(self.rows.sequence_in(row))
        self.drop_prefixes()

    def drop_prefixes(self) -> bool:
        """Give up the prompts kept for waiting siblings; True when that freed a block."""
        before = self.pool.n_free
        for prefix in self._prefixes.values():
            if prefix.blocks is not None:
                self.pool.release(prefix.blocks)
            prefix.blocks = prefix.logits_V = None
        return self.pool.n_free > before

    def remove(self, sequence: Sequence) -> None:
        """Finished or aborted: nothing of it stays."""
        if sequence.row is not None:
            self.pool.release(self.rows.clear(sequence))
            self.version += 1
            return
        self.waiting.remove(sequence)
        prefix = sequence.prefix
        assert prefix is not None, "a waiting sequence has something to compute"
        prefix.n_waiting -= 1
        if prefix.n_waiting == 0 and prefix.blocks is not None:
            self.pool.release(prefix.blocks)
            prefix.blocks = None
        self._forget_if_done(prefix)

    def _forget_if_done(self, prefix: Prefix) -> None:
        if prefix.n_waiting == 0 and prefix.key is not None:
            del self._prefixes[prefix.key]
