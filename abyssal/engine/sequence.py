"""A request on its way, and the running ones side by side as arrays. Owns ids and log-probs until they are handed out.

A `Sequence` waits, runs in one row of `Rows`, perhaps waits again (preempted), and leaves. A `Prefix` is what the
cache must hold before a waiting sequence can draw: its prompt, or after a preemption its prompt and what it had
drawn.
Letters: R rows, T ids of a sequence, N blocks of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from abyssal.engine.control import Control
from abyssal.engine.penalties import Penalties
from abyssal.engine.sampler import COLDEST, noise_key
from abyssal.engine.stop_strings import StopSearch
from abyssal.engine.thinking import ThinkingControl
from abyssal.types import DrawnFrom, SamplingParams


@dataclass(eq=False)
class Prefix:
    """Ids computed once for all waiting sequences that begin with them (G answers to one prompt).

    `blocks` is None while nothing of it is in the cache; then `n_computed` ids are, and when those are all, `logits_V`
    of the last position is there too. `key` finds it again for a later request; None when it belongs to one preempted
    sequence. `block_keys` are those of its full blocks that may be found in the cache of earlier requests.
    """

    ids: np.ndarray
    key: bytes | None = None
    waiting: list[Sequence] = field(default_factory=list)
    blocks: np.ndarray | None = None
    n_computed: int = 0
    logits_V: Tensor | None = None
    hidden_D: Tensor | None = None
    block_keys: list[bytes] = field(default_factory=list)

    @property
    def is_partial(self) -> bool:
        """Has blocks, and something to compute into them."""
        return self.blocks is not None and self.n_computed < len(self.ids)


class Chunk(NamedTuple):
    """Part of a prefix: `ids` stand at positions start, start + 1 .. of the sequence that holds `blocks`. `following`
    are the ids after them as far as they are known: MTP modules read one or more of them."""

    ids: np.ndarray
    start: int
    blocks: np.ndarray
    following: np.ndarray = np.empty(0, np.int64)


@dataclass(eq=False)
class Sequence:
    """`limit` is the number of ids, prompt included, at which it is cut. `prefix` is None while it runs.

    `root` is its namespace's key: what it computes is found by sequences with the same one only. Sequences of a higher
    `priority` go first, and `is_aged` ones before all. `n_charged` ids have been counted as served to its namespace.
    """

    request_id: int
    prompt_ids: list[int]
    params: SamplingParams
    limit: int
    control: Control | None = None
    n_told: int = 0  # drawn ids that the control has heard of
    thinking: ThinkingControl | None = None  # the control, or the first part of it
    root: bytes = b""
    priority: int = 0
    is_aged: bool = False
    n_charged: int = 0
    prefix: Prefix | None = None
    row: int | None = None
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # drawn before the last preemption
    logps: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    sampled_logps: list[float] = field(default_factory=list)  # under what was drawn from, where an engine records it
    kept: list[Tensor] = field(default_factory=list)  # ids that had a probability, one tensor a drawn id
    likeliest: list[dict[int, float]] = field(default_factory=list)  # with their log-probs, one entry a drawn id
    search: StopSearch | None = None

    def drawn_from(self) -> DrawnFrom | None:
        """What a sequence that has left its row was drawn from, as recorded; None for the model's own distribution."""
        params = self.params
        if params.is_plain:
            return None
        if params.temperature == 0:
            return DrawnFrom(temperature=0.0, logps=[0.0] * len(self.ids))
        return DrawnFrom(
            temperature=max(params.temperature, COLDEST),
            logps=self.sampled_logps,
            kept_ids=torch.cat(self.kept) if self.kept else None,
            kept_counts=torch.tensor([len(ids) for ids in self.kept]) if self.kept else None,
        )


class Rows:
    """The running batch. A step reads and writes these arrays for all rows at once and touches no `Sequence`.

    `length_R` counts ids, of which the last is drawn but not yet computed. `active` holds the rows in use, oldest
    first.
    """

    def __init__(self, *, n_rows: int, max_length: int, max_blocks: int) -> None:
        self.ids_RT = np.zeros((n_rows, max_length), np.int64)
        self.logps_RT = np.zeros((n_rows, max_length), np.float32)
        self.blocks_RN = np.zeros((n_rows, max_blocks), np.int64)
        self.n_blocks_R = np.zeros(n_rows, np.int64)
        self.length_R = np.zeros(n_rows, np.int64)
        self.limit_R = np.zeros(n_rows, np.int64)
        self.key_R = np.zeros(n_rows, np.int64)
        self.temperature_R = np.ones(n_rows, np.float32)
        self.top_p_R = np.ones(n_rows, np.float64)
        self.top_k_R = np.zeros(n_rows, np.int64)
        self.min_p_R = np.zeros(n_rows, np.float32)
        self.controlled_R = np.zeros(n_rows, bool)
        self.draws_freely_R = np.zeros(n_rows, bool)  # as far as its params go
        self.penalties = Penalties(n_rows=n_rows, max_length=max_length)
        self.sequences: list[Sequence | None] = [None] * n_rows
        self.active = np.empty(0, np.int64)
        self._free = list(range(n_rows - 1, -1, -1))

    @property
    def n_free(self) -> int:
        return len(self._free)

    def place(self, sequence: Sequence, blocks: np.ndarray) -> None:
        """Give a sequence a row and the blocks of everything it has so far."""
        row = sequence.row = self._free.pop()
        n_prompt, n_drawn = len(sequence.prompt_ids), len(sequence.ids)
        length, params = n_prompt + n_drawn, sequence.params
        self.ids_RT[row, :n_prompt] = sequence.prompt_ids
        self.ids_RT[row, n_prompt:length] = sequence.ids
        self.logps_RT[row, n_prompt:length] = sequence.logps
        self.blocks_RN[row, : len(blocks)] = blocks
        self.n_blocks_R[row], self.length_R[row], self.limit_R[row] = len(blocks), length, sequence.limit
        self.key_R[row] = noise_key(params.seed)
        self.temperature_R[row], self.top_p_R[row] = params.temperature, params.top_p
        self.top_k_R[row], self.min_p_R[row] = params.top_k, params.min_p
        self.controlled_R[row] = sequence.control is not None
        self.draws_freely_R[row] = params.draws_freely
        self.penalties.place(row, params, self.ids_RT[row, :length], n_prompt=n_prompt)
        self.sequences[row] = sequence
        self.active = np.append(self.active, row)

    def clear(self, sequence: Sequence) -> np.ndarray:
        """Take a sequence out of its row, with what it has drawn; returns the blocks it held."""
        row, drawn = self._drawn(sequence)
        sequence.ids, sequence.logps = self.ids_RT[row, drawn].copy(), self.logps_RT[row, drawn].copy()
        blocks = self.blocks_of(row)
        self.blocks_RN[row] = 0
        self.sequences[row] = sequence.row = None
        self.active = self.active[self.active != row]
        self._free.append(row)
        return blocks

    def append_runs(
        self, rows_B: np.ndarray, counts_B: np.ndarray, ids_X: np.ndarray, logps_X: np.ndarray
    ) -> np.ndarray:
        """counts_B[b] ids and log-probs for row b, row after row; says which of them have reached their limit."""
        row_X, first_X = np.repeat(rows_B, counts_B), np.repeat(counts_B.cumsum() - counts_B, counts_B)
        positions_X = self.length_R[row_X] + np.arange(len(row_X)) - first_X
        self.ids_RT[row_X, positions_X], self.logps_RT[row_X, positions_X] = ids_X, logps_X
        self.length_R[rows_B] += counts_B
        return self.length_R[rows_B] >= self.limit_R[rows_B]

    def drawn(self, sequence: Sequence, *, since: int = 0) -> np.ndarray:
        """The ids a sequence has drawn so far, or those behind the first `since`."""
        if sequence.row is None:  # waiting, perhaps with what it had drawn before it was preempted
            return sequence.ids[since:]
        row, drawn = self._drawn(sequence)
        return self.ids_RT[row, drawn.start + since : drawn.stop].copy()

    def _drawn(self, sequence: Sequence) -> tuple[int, slice]:
        row = sequence.row
        assert row is not None, f"request {sequence.request_id} is not running"
        return row, slice(len(sequence.prompt_ids), int(self.length_R[row]))

    def blocks_of(self, row: int) -> np.ndarray:
        return self.blocks_RN[row, : self.n_blocks_R[row]].copy()

    def sequence_in(self, row: int) -> Sequence:
        sequence = self.sequences[row]
        assert sequence is not None, f"row {row} is empty"
        return sequence
