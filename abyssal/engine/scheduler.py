"""Who runs, who waits and who gives way: continuous batching with admission and preemption by recomputation.

`fair_queue.py` says whose turn it is. It is admitted when a row is free and its prompt's blocks are there, with one
block to spare for each running sequence so that growth does not at once throw somebody out. Nobody overtakes one who
waits for blocks, but prompts that have theirs already are computed on. Blocks of an answer are taken as it grows; when
none is left, somebody gives way: of the lowest priority a prompt kept for the waiting, else the youngest running
sequence, whose cache is recomputed later. Noise is keyed by seed and position, so it draws on unchanged. The oldest of
the highest priority never gives way: each step some answer grows, or nobody runs and some prompt does.
Siblings (same prompt) share the prompt's full blocks; each gets its own copy of the last, partly filled one. With a
prefix cache, full blocks outlive their sequence and a later one that begins with the same ids shares them; what the
cache has lost may come back from a slower tier. Both kinds of sharing stay within a namespace.
A step computes at most `step_tokens`: one id of each running sequence, then prompts, at most `prefill_chunk` ids of
them, then drafts. A long prompt takes several steps, and running answers go on.
Owns the queue, the rows and the block pool. Does not own tensors: `runner.py` computes what is decided here.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np

from abyssal.engine.blocks import BlockPool, Tier, block_keys, blocks_for
from abyssal.engine.fair_queue import FairQueue
from abyssal.engine.sequence import Chunk, Prefix, Rows, Sequence


class Admission(NamedTuple):
    """Work in this order: compute `prefills` into their blocks, copy blocks, draw each new sequence's next token."""

    prefills: list[tuple[Prefix, Chunk]]
    copy_from: list[int]
    copy_to: list[int]
    placed: list[tuple[Sequence, Prefix]]


class PrefixStats(NamedTuple):
    """`n_tokens` had to be in the cache before their sequences could draw; `n_found` of them were there already or, as
    `n_found_on_disk` of those, came from the slower tier."""

    n_tokens: int = 0
    n_found: int = 0
    n_found_on_disk: int = 0


class Scheduler:
    def __init__(
        self,
        *,
        pool: BlockPool,
        rows: Rows,
        block_size: int,
        prefill_tokens: int,
        prefill_chunk: int | None = None,
        step_tokens: int | None = None,
        prefix_cache: bool = False,
        tier: Tier | None = None,
    ) -> None:
        self.pool, self.rows, self.tier = pool, rows, tier
        self.block_size, self.prefill_tokens, self.prefix_cache = block_size, prefill_tokens, prefix_cache
        self.prefill_chunk = sys.maxsize if prefill_chunk is None else prefill_chunk
        self.step_tokens = sys.maxsize if step_tokens is None else step_tokens
        self.n_left = self.step_tokens  # tokens that the step at hand may still compute
        self.waiting = FairQueue()
        self._prefixes: dict[bytes, Prefix] = {}
        self._holding: dict[Prefix, None] = {}  # those that have blocks
        self.version = 0  # changes whenever the set of running sequences does
        self.stats = PrefixStats()

    def add(self, sequence: Sequence) -> None:
        ids = np.array(sequence.prompt_ids, np.int64)
        key = sequence.root + ids.tobytes()
        prefix = self._prefixes.get(key)
        if prefix is None:
            prefix = self._prefixes[key] = self._prefix(ids, sequence.root, key)
        prefix.waiting.append(sequence)
        sequence.prefix = prefix
        if not self.waiting.is_busy(sequence.root):
            self._charge_running()  # it begins where the least served is now
        self.waiting.join(sequence)

    def _prefix(self, ids: np.ndarray, root: bytes, key: bytes | None = None) -> Prefix:
        """The last id is always computed, because its logits are wanted: no block that holds it is looked for."""
        return Prefix(ids, key, block_keys=block_keys(ids[:-1], self.block_size, root) if self.prefix_cache else [])

    def admit(self) -> Admission:
        """Move waiting sequences into free rows as far as rows, blocks and the step's tokens reach."""
        admission = Admission([], [], [], [])
        longest, chunk_left = 0, self.prefill_chunk
        left_below = 0 if self.tier is None else self.tier.most_blocks
        self.n_left = self.step_tokens - len(self.rows.active)
        self.waiting.tick()
        if len(self.waiting) and self.rows.n_free:
            self._charge_running()
        while self.rows.n_free and self.n_left and (sequence := self.waiting.head()) is not None:
            prefix = _prefix_of(sequence)
            found = self.pool.find(prefix.block_keys) if prefix.blocks is None else np.empty(0, np.int64)
            if not self._make_room(prefix, found):
                if (begun := self._begun()) is None:
                    break
                sequence, prefix = begun, _prefix_of(begun)
            n_below = self._n_below(prefix, found, most=left_below + 1)
            n_brought = min(n_below, left_below)
            start = prefix.n_computed if prefix.blocks is not None else len(found) * self.block_size
            start += n_brought * self.block_size
            # once a prompt is computed its sequence takes part in the same step's decode
            n_chunk = min(len(prefix.ids) - start, chunk_left, self.n_left - 1)
            if start < len(prefix.ids):
                # the batch is padded to its longest prompt: that is what the budget counts
                longest = max(longest, n_chunk)
                over = admission.prefills and (len(admission.prefills) + 1) * longest > self.prefill_tokens
                if over or n_chunk < 1:
                    break
            blocks = self._claim(sequence, prefix, found) if prefix.blocks is None else prefix.blocks
            if n_below:
                left_below -= n_brought
                if self._bring(sequence, prefix, n_brought) and n_below > n_brought:
                    break  # the tier has more, for the next step
            start = prefix.n_computed  # less than was thought where the tier could not keep its word
            if start < len(prefix.ids):
                end = start + n_chunk
                admission.prefills.append((prefix, Chunk(prefix.ids[start:end], start, blocks, prefix.ids[end:])))
                prefix.n_computed, chunk_left, self.n_left = end, chunk_left - n_chunk, self.n_left - n_chunk
                self.waiting.charge(sequence, end)
            if prefix.n_computed < len(prefix.ids):
                break
            self._place(sequence, prefix, admission)
        if admission.placed:
            self.version += 1
        return admission

    def _charge_running(self) -> None:
        """What has been drawn since somebody last looked counts for whose turn it is."""
        for row in self.rows.active.tolist():
            self.waiting.charge(self.rows.sequence_in(row), int(self.rows.length_R[row]))

    def _make_room(self, prefix: Prefix, found: np.ndarray) -> bool:
        """May this one go on? With nobody running or begun it must: kept prompts are given up."""
        if prefix.is_partial:
            return True
        n_partial = sum(other.is_partial for other in self._holding)
        if prefix.blocks is None and n_partial >= self.rows.n_free:
            return False
        spare = len(self.rows.active)
        if self.pool.n_free >= self._need(prefix, found) + spare:
            return True
        if spare or n_partial:
            return False
        if prefix.blocks is None:
            self._drop_all()
            need = self._need(prefix, found)
            assert self.pool.n_free >= need, f"{need} blocks needed, {self.pool.n_free} free with nobody running"
        return True

    def _need(self, prefix: Prefix, found: np.ndarray) -> int:
        """Free blocks that its turn takes: those to fill, and those found that nobody else holds."""
        if prefix.blocks is not None:
            return 1
        return blocks_for(len(prefix.ids), self.block_size) - len(found) + self.pool.n_idle(found)

    def _begun(self) -> Sequence | None:
        """Of the prompts that are computed in part, the one whose turn it is: each has its blocks."""
        begun = [sequence for prefix in self._holding if prefix.is_partial for sequence in prefix.waiting]
        return min(begun, key=self.waiting.rank, default=None)

    def _n_below(self, prefix: Prefix, found: np.ndarray, *, most: int) -> int:
        """How many of the next blocks the tier has; looks at `most`."""
        n_there = len(found) * self.block_size if prefix.blocks is None else prefix.n_computed
        if self.tier is None or n_there % self.block_size:
            return 0
        n_there //= self.block_size
        return self.tier.find(prefix.block_keys[n_there : n_there + most])

    def _claim(self, sequence: Sequence, prefix: Prefix, found: np.ndarray) -> np.ndarray:
        """Give a prefix its blocks: those found in the cache, and new ones for the rest."""
        self.pool.share(found)  # first: an idle block that is taken anew would lose what it holds
        new = self.pool.take(blocks_for(len(prefix.ids), self.block_size) - len(found))
        prefix.blocks = np.concatenate((found, new))
        self._holding[prefix] = None
        self._count(n_tokens=len(prefix.ids))
        self._found(sequence, prefix, len(found))
        return prefix.blocks

    def _bring(self, sequence: Sequence, prefix: Prefix, n: int) -> bool:
        """Let the tier fill the next n blocks; False when it did not fill them all."""
        assert self.tier is not None and prefix.blocks is not None
        start = prefix.n_computed // self.block_size
        keys, blocks = prefix.block_keys[start : start + n], prefix.blocks[start : start + n]
        n_filled = self.tier.bring(keys, blocks)
        self.pool.remember(blocks[:n_filled], keys[:n_filled])
        self._found(sequence, prefix, n_filled)
        self._count(n_found_on_disk=n_filled * self.block_size)
        return n_filled == n

    def _found(self, sequence: Sequence, prefix: Prefix, n_blocks: int) -> None:
        prefix.n_computed += n_blocks * self.block_size
        sequence.n_charged = max(sequence.n_charged, prefix.n_computed)  # what is found is free
        self._count(n_found=n_blocks * self.block_size)

    def _count(self, *, n_tokens: int = 0, n_found: int = 0, n_found_on_disk: int = 0) -> None:
        more = n_tokens, n_found, n_found_on_disk
        self.stats = PrefixStats(*(n + m for n, m in zip(self.stats, more, strict=True)))

    def computed(self, admission: Admission) -> None:
        """The prefills are done: what they filled may be found by later requests."""
        for prefix, chunk in admission.prefills:
            n_full = min((chunk.start + len(chunk.ids)) // self.block_size, len(prefix.block_keys))
            self._remember(chunk.blocks[:n_full], prefix.block_keys[:n_full])

    def _remember(self, blocks: np.ndarray, keys: list[bytes]) -> None:
        """A sequence begins with these full blocks."""
        self.pool.remember(blocks, keys)
        if self.tier is not None and keys:
            self.tier.offer(keys, blocks)  # all of them: it may have lost some, and wants to know what is used

    def _place(self, sequence: Sequence, prefix: Prefix, admission: Admission) -> None:
        blocks = prefix.blocks
        assert blocks is not None
        has_tail = len(prefix.ids) % self.block_size > 0
        self.waiting.admitted(sequence)
        prefix.waiting.remove(sequence)
        sequence.prefix = None
        sequence.n_charged = max(sequence.n_charged, len(prefix.ids))  # siblings ride for free
        if not prefix.waiting or (has_tail and self.pool.n_free == 0):
            # the last sibling, or one for whom there is no block to copy to, takes the blocks themselves
            self._let_go(prefix)
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
        self.n_left -= 1
        admission.placed.append((sequence, prefix))

    def grow(self) -> np.ndarray:
        """See that every running sequence has a slot for its next token; returns the rows that still run."""
        rows = self.rows
        while True:
            active = rows.active
            short = active[rows.n_blocks_R[active] * self.block_size < rows.length_R[active]]
            if len(short) <= self.pool.n_free:
                break
            if not self._take_back(active):
                self._give_way()
        if len(short):
            rows.blocks_RN[short, rows.n_blocks_R[short]] = self.pool.take(len(short))
            rows.n_blocks_R[short] += 1
        return active

    def fit_drafts(self, rows_B: np.ndarray, wanted_B: np.ndarray) -> np.ndarray:
        """How many drafts each row may carry of those wanted, after `grow`; their slots are there then.

        They get what is left of the step's tokens, and blocks that are free: nobody gives way for a guess.
        """
        rows = self.rows
        length_B, held_B = rows.length_R[rows_B], rows.n_blocks_R[rows_B]
        # with n drafts up to n + 1 ids are drawn
        fits_B = np.minimum(wanted_B, rows.limit_R[rows_B] - length_B - 1).clip(min=0)
        while fits_B.sum() > self.n_left:
            fits_B = np.minimum(fits_B, fits_B.max() - 1)
        needed_B = (-(-(length_B + fits_B) // self.block_size) - held_B).clip(min=0)
        if needed_B.sum() > self.pool.n_free:
            fits_B = np.minimum(fits_B, held_B * self.block_size - length_B)
            needed_B[:] = 0
        for i in needed_B.nonzero()[0].tolist():
            row, start, n = rows_B[i], held_B[i], needed_B[i]
            rows.blocks_RN[row, start : start + n] = self.pool.take(n)
            rows.n_blocks_R[row] += n
        self.n_left -= int(fits_B.sum())
        return fits_B

    def _take_back(self, active: np.ndarray) -> bool:
        """Blocks given for drafts that were wrong are free again; True when there were any."""
        rows = self.rows
        needed_B = -(-rows.length_R[active] // self.block_size)
        has_more_B = rows.n_blocks_R[active] > needed_B
        for row, needed in zip(active[has_more_B].tolist(), needed_B[has_more_B].tolist(), strict=True):
            self.pool.release(rows.blocks_of(row)[needed:])
            rows.blocks_RN[row, needed:] = 0
            rows.n_blocks_R[row] = needed
        return bool(has_more_B.any())

    def _give_way(self) -> None:
        """One of the lowest priority loses its blocks: a prompt that only waits, else the youngest that runs."""
        victim = min(map(self.rows.sequence_in, self.rows.active.tolist()), key=_weight)
        kept = min(self._holding, key=lambda prefix: max(map(_weight, prefix.waiting)), default=None)
        if kept is None or max(map(_weight, kept.waiting))[:2] > _weight(victim)[:2]:
            self.preempt(victim)
            return
        if kept.is_partial:
            self.waiting.turn_back(min(kept.waiting, key=self.waiting.rank))
        self._drop(kept)

    def preempt(self, sequence: Sequence, *, stale: bool = False) -> None:
        """Back to the head of its priority, its blocks free; what it has drawn is recomputed with its prompt."""
        self._leave(sequence, stale=stale)
        ids = np.concatenate((np.array(sequence.prompt_ids, np.int64), sequence.ids))
        sequence.prefix = self._prefix(ids, sequence.root)
        sequence.prefix.waiting.append(sequence)
        self.waiting.push(sequence, turned_back=True)

    def preempt_all(self) -> None:
        """Nothing computed so far may be used again, as after a change of weights."""
        for row in self.rows.active[::-1].tolist():
            self.preempt(self.rows.sequence_in(row), stale=True)
        self._drop_all()
        self.pool.forget()

    def _leave(self, sequence: Sequence, *, stale: bool = False) -> None:
        """Take a sequence out of its row. With a prefix cache its full blocks, unless stale, can still be found."""
        row = sequence.row
        assert row is not None, f"request {sequence.request_id} is not running"
        self.waiting.charge(sequence, int(self.rows.length_R[row]))
        if self.prefix_cache and not stale:
            n_full = (int(self.rows.length_R[row]) - 1) // self.block_size  # the last id drawn is not computed
            keys = block_keys(self.rows.ids_RT[row, : n_full * self.block_size], self.block_size, sequence.root)
            self._remember(self.rows.blocks_RN[row, :n_full], keys)
        self.pool.release(self.rows.clear(sequence))
        self.version += 1

    def remove(self, sequence: Sequence, *, stale: bool = False) -> None:
        """Finished or aborted: nothing of it stays but, unless stale, what others may find."""
        if sequence.row is not None:
            self._leave(sequence, stale=stale)
        else:
            self.waiting.remove(sequence)
            prefix = _prefix_of(sequence)
            prefix.waiting.remove(sequence)
            if not prefix.waiting and prefix.blocks is not None:
                self._drop(prefix)
            self._forget_if_done(prefix)
        self.waiting.leave(sequence)

    def _drop_all(self) -> None:
        """Give up what is kept for waiting sequences, finished or not."""
        for prefix in list(self._holding):
            self._drop(prefix)

    def _drop(self, prefix: Prefix) -> None:
        assert prefix.blocks is not None
        self.pool.release(prefix.blocks)
        prefix.logits_V = None
        self._let_go(prefix)

    def _let_go(self, prefix: Prefix) -> None:
        """Its blocks are another's, or nobody's."""
        prefix.blocks, prefix.n_computed = None, 0
        del self._holding[prefix]

    def _forget_if_done(self, prefix: Prefix) -> None:
        if not prefix.waiting and prefix.key is not None:
            del self._prefixes[prefix.key]


def _prefix_of(sequence: Sequence) -> Prefix:
    assert sequence.prefix is not None, "a waiting sequence has something to compute"
    return sequence.prefix


def _weight(sequence: Sequence) -> tuple[bool, int, int]:
    """Who weighs least gives way first."""
    return sequence.is_aged, sequence.priority, -sequence.request_id
