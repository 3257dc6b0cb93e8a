"""Who runs, who waits and who gives way: continuous batching with admission and preemption by recomputation.

First come, first served. A sequence is admitted when a row is free and its prompt's blocks are there, with one block to
spare for each running sequence so that growth does not at once throw somebody out. Blocks of an answer are taken as it
grows; when none is left, prompts kept for waiting siblings are given up first, then the youngest running sequence
goes back to the head of the queue and its cache is recomputed later. Noise is keyed by seed and position, so it draws
on unchanged. Siblings (same prompt) share the prompt's full blocks; each gets its own copy of the last, partly filled
one. With a prefix cache, full blocks outlive their sequence and a later one that begins with the same ids shares them;
what the cache has lost may come back from a slower tier. Both kinds of sharing stay within a namespace.
With `prefill_chunk`, a step computes at most so many prompt ids: a long prompt takes several, running answers go on.
Owns the queue, the rows and the block pool. Does not own tensors: `runner.py` computes what is decided here.
"""

from __future__ import annotations

import sys
from collections import deque
from typing import NamedTuple

import numpy as np

from abyssal.engine.blocks import BlockPool, Tier, block_keys, blocks_for
from abyssal.engine.sequence import Chunk, Prefix, Rows, Sequence


class Admission(NamedTuple):
    """Work in this order: compute `prefills` into their blocks, copy blocks, draw each new sequence's next token."""

    prefills: list[tuple[Prefix, Chunk]]
    copy_from: list[int]
    copy_to: list[int]
    placed: list[tuple[Sequence, Prefix]]


class PrefixStats(NamedTuple):
    """`n_tokens` had to be in the cache before their sequences could draw; `n_found` of them were there already."""

    n_tokens: int = 0
    n_found: int = 0


class Scheduler:
    def __init__(
        self,
        *,
        pool: BlockPool,
        rows: Rows,
        block_size: int,
        prefill_tokens: int,
        prefill_chunk: int | None = None,
        prefix_cache: bool = False,
        tier: Tier | None = None,
    ) -> None:
        self.pool, self.rows, self.tier = pool, rows, tier
        self.block_size, self.prefill_tokens, self.prefix_cache = block_size, prefill_tokens, prefix_cache
        self.prefill_chunk = sys.maxsize if prefill_chunk is None else prefill_chunk
        self.waiting: deque[Sequence] = deque()
        self._prefixes: dict[bytes, Prefix] = {}
        self.version = 0  # changes whenever the set of running sequences does
        self.stats = PrefixStats()

    def add(self, sequence: Sequence) -> None:
        ids = np.array(sequence.prompt_ids, np.int64)
        key = sequence.root + ids.tobytes()
        prefix = self._prefixes.get(key)
        if prefix is None:
            prefix = self._prefixes[key] = self._prefix(ids, sequence.root, key)
        prefix.n_waiting += 1
        sequence.prefix = prefix
        self.waiting.append(sequence)

    def _prefix(self, ids: np.ndarray, root: bytes, key: bytes | None = None) -> Prefix:
        """The last id is always computed, because its logits are wanted: no block that holds it is looked for."""
        return Prefix(ids, key, block_keys=block_keys(ids[:-1], self.block_size, root) if self.prefix_cache else [])

    def admit(self) -> Admission:
        """Move waiting sequences into free rows as far as rows, blocks and the prefill budgets reach."""
        admission = Admission([], [], [], [])
        longest, left = 0, self.prefill_chunk
        while self.waiting and self.rows.n_free:
            prefix = self.waiting[0].prefix
            assert prefix is not None, "a waiting sequence has something to compute"
            found = self.pool.find(prefix.block_keys) if prefix.blocks is None else np.empty(0, np.int64)
            n_below = self._n_below(prefix, found)
            start = prefix.n_computed if prefix.blocks is not None else (len(found) + n_below) * self.block_size
            n_chunk = min(len(prefix.ids) - start, left)
            if start < len(prefix.ids):
                # the batch is padded to its longest prompt: that is what the budget counts
                longest = max(longest, n_chunk)
                over = admission.prefills and (len(admission.prefills) + 1) * longest > self.prefill_tokens
                if over or n_chunk == 0:
                    break
            if not self._make_room(prefix, found):
                break
            blocks = self._claim(prefix, found, n_below) if prefix.blocks is None else prefix.blocks
            start = prefix.n_computed  # less than was thought where the tier could not keep its word
            if start < len(prefix.ids):
                end = start + n_chunk
                admission.prefills.append((prefix, Chunk(prefix.ids[start:end], start, blocks, prefix.ids[end:])))
                prefix.n_computed, left = end, left - n_chunk
            if prefix.n_computed < len(prefix.ids):
                break
            self._place(self.waiting.popleft(), prefix, admission)
        if admission.placed:
            self.version += 1
        return admission

    def _make_room(self, prefix: Prefix, found: np.ndarray) -> bool:
        """Are one more sequence's blocks there? With nobody running they must be: kept prompts are given up."""
        spare = len(self.rows.active)
        if self.pool.n_free >= self._need(prefix, found) + spare:
            return True
        if spare:
            return False
        if prefix.blocks is None:
            self.drop_prefixes()
            need = self._need(prefix, found)
            assert self.pool.n_free >= need, f"{need} blocks needed, {self.pool.n_free} free with nobody running"
        return True

    def _need(self, prefix: Prefix, found: np.ndarray) -> int:
        """Free blocks that its turn takes: those to fill, and those found that nobody else holds."""
        if prefix.blocks is not None:
            return 1
        return blocks_for(len(prefix.ids), self.block_size) - len(found) + self.pool.n_idle(found)

    def _n_below(self, prefix: Prefix, found: np.ndarray) -> int:
        """How many blocks after those found the tier has."""
        if self.tier is None or prefix.blocks is not None:
            return 0
        return self.tier.find(prefix.block_keys[len(found) :])

    def _claim(self, prefix: Prefix, found: np.ndarray, n_below: int) -> np.ndarray:
        """Give a prefix its blocks: those found in the cache, and new ones for the rest, some filled by the tier."""
        self.pool.share(found)  # first: an idle block that is taken anew would lose what it holds
        new = self.pool.take(blocks_for(len(prefix.ids), self.block_size) - len(found))
        prefix.blocks = np.concatenate((found, new))
        n_filled = len(found)
        if self.tier is not None and n_below:
            keys = prefix.block_keys[len(found) : len(found) + n_below]
            n_brought = self.tier.bring(keys, new[:n_below])
            self.pool.remember(new[:n_brought], keys[:n_brought])
            n_filled += n_brought
        prefix.n_computed = n_filled * self.block_size
        self.stats = PrefixStats(self.stats.n_tokens + len(prefix.ids), self.stats.n_found + prefix.n_computed)
        return prefix.blocks

    def computed(self, admission: Admission) -> None:
        """The prefills are done: what they filled may be found by later requests."""
        for prefix, chunk in admission.prefills:
            n_full = min((chunk.start + len(chunk.ids)) // self.block_size, len(prefix.block_keys))
            self._remember(chunk.blocks[:n_full], prefix.block_keys[:n_full])

    def _remember(self, blocks: np.ndarray, keys: list[bytes]) -> None:
        new = self.pool.remember(blocks, keys)
        if self.tier is not None and new:
            self.tier.offer([keys[place] for place in new], blocks[new])

    def _place(self, sequence: Sequence, prefix: Prefix, admission: Admission) -> None:
        blocks = prefix.blocks
        assert blocks is not None
        has_tail = len(prefix.ids) % self.block_size > 0
        prefix.n_waiting -= 1
        sequence.prefix = None
        if prefix.n_waiting == 0 or (has_tail and self.pool.n_free == 0):
            # the last sibling, or one for whom there is no block to copy to, takes the blocks themselves
            prefix.blocks, prefix.n_computed = None, 0
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

    def preempt(self, sequence: Sequence, *, stale: bool = False) -> None:
        """Back to the head of the queue, its blocks free; what it has drawn is recomputed with its prompt."""
        self._leave(sequence, stale=stale)
        ids = np.concatenate((np.array(sequence.prompt_ids, np.int64), sequence.ids))
        sequence.prefix = self._prefix(ids, sequence.root)
        sequence.prefix.n_waiting = 1
        self.waiting.appendleft(sequence)

    def preempt_all(self) -> None:
        """Nothing computed so far may be used again, as after a change of weights."""
        for row in self.rows.active[::-1].tolist():
            self.preempt(self.rows.sequence_in(row), stale=True)
        self.drop_prefixes()
        self.pool.forget()

    def _leave(self, sequence: Sequence, *, stale: bool = False) -> None:
        """Take a sequence out of its row. With a prefix cache its full blocks, unless stale, can still be found."""
        row = sequence.row
        assert row is not None, f"request {sequence.request_id} is not running"
        if self.prefix_cache and not stale:
            n_full = (int(self.rows.length_R[row]) - 1) // self.block_size  # the last id drawn is not computed
            keys = block_keys(self.rows.ids_RT[row, : n_full * self.block_size], self.block_size, sequence.root)
            self._remember(self.rows.blocks_RN[row, :n_full], keys)
        self.pool.release(self.rows.clear(sequence))
        self.version += 1

    def drop_prefixes(self) -> bool:
        """Give up what is kept for waiting sequences, finished or not; True when that freed a block."""
        before = self.pool.n_free
        for sequence in self.waiting:
            prefix = sequence.prefix
            assert prefix is not None, "a waiting sequence has something to compute"
            if prefix.blocks is not None:
                self.pool.release(prefix.blocks)
            prefix.blocks = prefix.logits_V = None
            prefix.n_computed = 0
        return self.pool.n_free > before

    def remove(self, sequence: Sequence) -> None:
        """Finished or aborted: nothing of it stays."""
        if sequence.row is not None:
            self._leave(sequence)
            return
        self.waiting.remove(sequence)
        prefix = sequence.prefix
        assert prefix is not None, "a waiting sequence has something to compute"
        prefix.n_waiting -= 1
        if prefix.n_waiting == 0 and prefix.blocks is not None:
            self.pool.release(prefix.blocks)
            prefix.blocks, prefix.n_computed = None, 0
        self._forget_if_done(prefix)

    def _forget_if_done(self, prefix: Prefix) -> None:
        if prefix.n_waiting == 0 and prefix.key is not None:
            del self._prefixes[prefix.key]
