"""Guesses of what comes next, so that one pass of the model can check several tokens of a row at once.

Two kinds behind one seam. MTP modules read the hidden states that the model left (DeepSeek-V3 section 2.2 and 5.4.3)
and guess with the noise that the target will draw with; prompt look-up finds the last place where a sequence's newest
ids stood before and copies what came after them. A draft is a hint: it costs time when it is wrong, and nothing else.
Letters: R rows, B rows of a step, T tokens of a row, W hidden states kept, K drafts, D width, V vocabulary, X tokens,
H places of an index.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from abyssal.engine.runner import Runner
from abyssal.engine.sampler import GOLDEN
from abyssal.engine.sequence import Rows

Draw = Callable[[np.ndarray, np.ndarray, Tensor], np.ndarray]  # rows, positions, logits -> ids as these rows draw them

MOST_MTP = 4  # modules are trained for one token ahead; acceptance falls with each time one is run on its own output
MOST_LOOK_UP = 7  # 1 + 7 tokens are what attention still takes as few queries
KEPT = 24  # hidden states a row keeps for MTP while nothing is drafted
CATCH_UP = 16  # at so many of them their entries are computed, all at once


class Drafts(NamedTuple):
    """Row b guesses counts_B[b] ids for the places after its last one; the rest of ids_BK may hold anything. K is the
    most that any row guesses."""

    ids_BK: np.ndarray
    counts_B: np.ndarray

    @property
    def most(self) -> int:
        return self.ids_BK.shape[1]

    def at(self, places: np.ndarray) -> Drafts:
        """Those of some rows."""
        return self if len(places) == len(self.counts_B) else Drafts.of(self.ids_BK[places], self.counts_B[places])

    @classmethod
    def of(cls, ids_BK: np.ndarray, counts_B: np.ndarray) -> Drafts:
        return cls(ids_BK[:, : int(counts_B.max(initial=0))], counts_B)

    @staticmethod
    @functools.cache
    def none(n_rows: int) -> Drafts:
        return Drafts(np.empty((n_rows, 0), np.int64), np.zeros(n_rows, np.int64))


class Drafter(Protocol):
    name: str
    most: int

    def begin(self, rows_B: np.ndarray, hidden: list[Tensor]) -> None:
        """Sequences were placed in these rows and drew one id; hidden states (D,) of the ids before it."""

    def draft(self, rows_B: np.ndarray, most_B: np.ndarray) -> Drafts:
        """At most most_B[b] drafts for row b, whose slots are there."""

    def went_on(self, rows_B: np.ndarray, counts_B: np.ndarray, kept_B: np.ndarray, hidden_XD: Tensor) -> None:
        """Of the counts_B[b] tokens that row b computed the first kept_B[b] were right."""


class LookUpDrafter:
    """Where the newest `n` ids of a row stood before, by an index of all its n-grams: a fixed cost a token, whatever
    the length of the sequence. The longer n-gram goes first; a place of the index that two n-grams share knows the
    later one, and what it says is checked against the ids themselves."""

    name, most = "prompt look-up", MOST_LOOK_UP
    GRAMS = (4, 2)
    MOST_PLACES = 1 << 14

    def __init__(self, rows: Rows) -> None:
        n_rows, max_length = rows.ids_RT.shape
        self._rows = rows
        self._bits = min(max_length, self.MOST_PLACES).bit_length()
        self._next_RH = {n: np.zeros((n_rows, 1 << self._bits), np.int32) for n in self.GRAMS}
        self._n_indexed_R = np.zeros(n_rows, np.int64)

    def begin(self, rows_B: np.ndarray, hidden: list[Tensor]) -> None:
        self._n_indexed_R[rows_B] = 0  # what the index knows of an earlier sequence fails the check or is true of this

    def went_on(self, rows_B: np.ndarray, counts_B: np.ndarray, kept_B: np.ndarray, hidden_XD: Tensor) -> None:
        pass  # `draft` reads the new ids from the rows

    def draft(self, rows_B: np.ndarray, most_B: np.ndarray) -> Drafts:
        n_most = int(most_B.max(initial=0))
        if n_most == 0:
            return Drafts.none(len(rows_B))
        self._index(rows_B)
        length_B = self._rows.length_R[rows_B]
        found_B = np.zeros(len(rows_B), np.int64)  # the place after the same ids; 0 is after nothing
        for n in self.GRAMS:
            open_B = np.flatnonzero((found_B == 0) & (length_B > n))
            found_B[open_B] = self._find(n, rows_B[open_B], length_B[open_B])
        period_B1 = np.maximum(length_B - found_B, 1)[:, None]  # what is copied may run into the copy
        places_BK = found_B[:, None] + np.arange(n_most) % period_B1
        return Drafts.of(self._rows.ids_RT[rows_B[:, None], places_BK], np.where(found_B > 0, most_B, 0))

    def _index(self, rows_B: np.ndarray) -> None:
        """Every n-gram that ends before the last id, which nothing follows yet."""
        start_B, end_B = self._n_indexed_R[rows_B], self._rows.length_R[rows_B] - 1
        n_new_B = end_B - start_B
        row_X = np.repeat(rows_B, n_new_B)
        last_X = np.arange(len(row_X)) - np.repeat(n_new_B.cumsum() - n_new_B, n_new_B) + np.repeat(start_B, n_new_B)
        for n in self.GRAMS:
            is_whole_X = last_X >= n - 1
            rows_X, ends_X = row_X[is_whole_X], last_X[is_whole_X]
            self._next_RH[n][rows_X, self._places(n, rows_X, ends_X)] = ends_X + 1  # of equal places the last one stays
        self._n_indexed_R[rows_B] = end_B

    def _find(self, n: int, rows_B: np.ndarray, length_B: np.ndarray) -> np.ndarray:
        """The place after the last n ids' earlier standing, (B,); 0 where there is none."""
        found_B = self._next_RH[n][rows_B, self._places(n, rows_B, length_B - 1)].astype(np.int64)
        found_B[(found_B < n) | (found_B >= length_B)] = 0
        back_n = np.arange(1, n + 1)
        ids_RT, row_B1 = self._rows.ids_RT, rows_B[:, None]
        then_Bn, now_Bn = ids_RT[row_B1, found_B[:, None] - back_n], ids_RT[row_B1, length_B[:, None] - back_n]
        return np.where((then_Bn == now_Bn).all(1), found_B, 0)

    def _places(self, n: int, rows_X: np.ndarray, ends_X: np.ndarray) -> np.ndarray:
        """Where the index keeps the n-gram that ends there: a multiplicative hash of its ids."""
        hash_X = np.zeros(len(rows_X), np.uint64)
        for back in range(n):
            hash_X = (hash_X ^ self._rows.ids_RT[rows_X, ends_X - back].astype(np.uint64)) * np.uint64(GOLDEN)
        return (hash_X >> np.uint64(64 - self._bits)).astype(np.int64)


class MtpDrafter:
    """Module k on what module k - 1 left and on draft k - 1; further drafts run the last module on its own output.

    Modules have cache entries of their own, one a position, in the same blocks. The entry of a position needs the
    model's hidden state there and the ids after it, so it is computed one step late, together with the draft; hidden
    states wait for it here. While nobody drafts they gather and are worked off by the dozen, so that drafting can come
    back at any time.
    """

    name, most = "MTP", MOST_MTP

    def __init__(self, runner: Runner, rows: Rows, draw: Draw) -> None:
        self._runner, self._rows, self._draw = runner, rows, draw
        self._n_modules = runner.config.num_nextn_predict_layers
        n_rows, model = len(rows.length_R), runner.model
        shape = (n_rows, KEPT + self._n_modules, runner.config.hidden_size)
        self._hidden_RWD = torch.zeros(shape, dtype=model.dtype, device=runner.device)
        self._n_kept_R = np.zeros(n_rows, np.int64)

    def begin(self, rows_B: np.ndarray, hidden: list[Tensor]) -> None:
        self._hidden_RWD[torch.from_numpy(rows_B), 0] = torch.stack(hidden).to(self._hidden_RWD.dtype)
        self._n_kept_R[rows_B] = 1

    def went_on(self, rows_B: np.ndarray, counts_B: np.ndarray, kept_B: np.ndarray, hidden_XD: Tensor) -> None:
        hidden_XD = hidden_XD.to(self._hidden_RWD.dtype)  # native ones are BF16 numbers in FP32
        if len(hidden_XD) == len(rows_B):  # nothing was drafted
            self._hidden_RWD[torch.from_numpy(rows_B), torch.from_numpy(self._n_kept_R[rows_B])] = hidden_XD
            self._n_kept_R[rows_B] += 1
            return
        column_BT = np.arange(counts_B.max())
        computed_BT, kept_BT = column_BT < counts_B[:, None], column_BT < kept_B[:, None]
        row_X = np.repeat(rows_B, kept_B)
        place_X = (self._n_kept_R[rows_B][:, None] + column_BT)[kept_BT]
        kept_XD = hidden_XD[torch.from_numpy(kept_BT[computed_BT])]
        self._hidden_RWD[torch.from_numpy(row_X), torch.from_numpy(place_X)] = kept_XD
        self._n_kept_R[rows_B] += kept_B

    def draft(self, rows_B: np.ndarray, most_B: np.ndarray) -> Drafts:
        n_most = int(most_B.max(initial=0))
        if n_most == 0:
            if self._n_kept_R[rows_B].max(initial=0) >= CATCH_UP:
                self._work_off(rows_B, np.zeros((len(rows_B), self._n_modules), np.int64), n_drafts=0)
            return Drafts.none(len(rows_B))
        ids_BK = np.zeros((len(rows_B), max(n_most, self._n_modules)), np.int64)
        hidden_BD = self._work_off(rows_B, ids_BK, n_drafts=n_most)
        self._run_on(rows_B, most_B, ids_BK[:, :n_most], hidden_BD)
        return Drafts.of(ids_BK, most_B)

    def _work_off(self, rows_B: np.ndarray, ids_BK: np.ndarray, *, n_drafts: int) -> Tensor:
        """Entries for all hidden states kept; the first drafts are filled in, one a module, n_drafts at most.
        Returns the last module's hidden state behind the last of them, (B, D)."""
        rows, counts_B = self._rows, self._n_kept_R[rows_B]
        row_B1, length_B1 = rows_B[:, None], rows.length_R[rows_B][:, None]
        column_BT = np.arange(counts_B.max())
        is_kept_BT = column_BT < counts_B[:, None]
        positions_BT = np.where(is_kept_BT, length_B1 - 1 - counts_B[:, None] + column_BT, 0)
        hidden_XD = self._hidden_RWD[torch.from_numpy(rows_B)][:, : len(column_BT)][torch.from_numpy(is_kept_BT)]
        last_X = torch.from_numpy(counts_B.cumsum() - 1)
        blocks_BN = self._blocks(rows_B)
        for module in range(self._n_modules):
            places_BT = positions_BT + 1 + module
            ids_BT = rows.ids_RT[row_B1, np.minimum(places_BT, length_B1 - 1)]
            if module:
                drafted_BT = np.take_along_axis(ids_BK, np.clip(places_BT - length_B1, 0, ids_BK.shape[1] - 1), axis=1)
                ids_BT = np.where(places_BT < length_B1, ids_BT, drafted_BT)
            hidden_XD = self._runner.look_ahead(module, hidden_XD, ids_BT, positions_BT, blocks_BN, counts_B)
            if module < n_drafts:
                logits_BV = self._runner.logits(hidden_XD[last_X])
                ids_BK[:, module] = self._draw(rows_B, length_B1[:, 0] + module, logits_BV)
        self._forget(rows_B, counts_B)
        return hidden_XD[last_X]

    def _run_on(self, rows_B: np.ndarray, most_B: np.ndarray, ids_BK: np.ndarray, hidden_BD: Tensor) -> None:
        """Fill in what the modules did not draft: the last one on its own output, one position further each time."""
        length_B, going_B = self._rows.length_R[rows_B], np.arange(len(rows_B))
        for k in range(self._n_modules, ids_BK.shape[1]):
            goes_on = most_B[going_B] > k
            going_B, hidden_BD = going_B[goes_on], hidden_BD[torch.from_numpy(goes_on)]
            hidden_BD = self._runner.look_ahead(
                self._n_modules - 1,
                hidden_BD,
                ids_BK[going_B, k - 1][:, None],
                (length_B[going_B] - 1 + k - self._n_modules)[:, None],
                self._blocks(rows_B[going_B]),
                np.ones(len(going_B), np.int64),
            )
            ids_BK[going_B, k] = self._draw(rows_B[going_B], length_B[going_B] + k, self._runner.logits(hidden_BD))

    def _forget(self, rows_B: np.ndarray, counts_B: np.ndarray) -> None:
        """Later modules' newest entries rest on drafts: as many hidden states stay to compute them again."""
        stay_B = np.minimum(counts_B, self._n_modules - 1)
        for back in range(self._n_modules - 1, 0, -1):
            rows_X, to_X = rows_B[stay_B >= back], (stay_B - back)[stay_B >= back]
            from_X = (counts_B - back)[stay_B >= back]
            moved_XD = self._hidden_RWD[torch.from_numpy(rows_X), torch.from_numpy(from_X)]
            self._hidden_RWD[torch.from_numpy(rows_X), torch.from_numpy(to_X)] = moved_XD
        self._n_kept_R[rows_B] = stay_B

    def _blocks(self, rows_B: np.ndarray) -> np.ndarray:
        return self._rows.blocks_RN[rows_B, : int(self._rows.n_blocks_R[rows_B].max())]


def drafter_of(runner: Runner, rows: Rows, draw: Draw) -> Drafter:
    """MTP where the model has modules for it."""
    return MtpDrafter(runner, rows, draw) if runner.config.num_nextn_predict_layers else LookUpDrafter(rows)
