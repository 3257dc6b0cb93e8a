"""Drafts of one engine: how many this step, what they guess, what became of them.

Owns the numbers. What counts of the ids drawn is decided in `verify.py`, how many drafts pay in `draft_tuner.py`.
Letters: B rows of a step, K drafts, X tokens of all rows, D width.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from abyssal.engine.draft import Drafter, Drafts
from abyssal.engine.draft_tuner import DraftStats, Step, Tuner
from abyssal.engine.isolation import said
from abyssal.engine.sequence import Prefix, Rows

NOBODY = np.zeros(0, np.int64)
Speculate = Literal["auto", "off"] | int


class Proposal(NamedTuple):
    """Drafts of a step that began at a time, for rows that had room_B[b] of the k that were wanted. What controls force
    was put in as drafts where is_forced_B. A part of a step teaches nothing about seconds: `is_whole` is False."""

    drafts: Drafts
    room_B: np.ndarray
    is_forced_B: np.ndarray
    k: int = 0
    began: float = 0.0
    is_whole: bool = True

    @staticmethod
    @functools.cache
    def none(n_rows: int) -> Proposal:
        return Proposal(Drafts.none(n_rows), np.zeros(n_rows, np.int64), np.zeros(n_rows, bool))

    def at(self, places: np.ndarray) -> Proposal:
        """Those of some rows."""
        if len(places) == len(self.room_B):
            return self
        forced_B = self.is_forced_B[places]
        return Proposal(self.drafts.at(places), self.room_B[places], forced_B, self.k, self.began, is_whole=False)


class Speculation:
    """`fixed`: so many drafts always; None: as many as pay, perhaps none. A drafter that raises is asked no more:
    answers do not need it."""

    def __init__(self, drafter: Drafter, rows: Rows, *, fixed: int | None) -> None:
        if fixed is not None and not 1 <= fixed <= drafter.most:
            raise ValueError(f"speculate={fixed}: give 1..{drafter.most} drafts of {drafter.name}, 'auto' or 'off'")
        self.drafter, self.tuner = drafter, Tuner(drafter.most, fixed)
        self._rows = rows
        self._error: str | None = None
        self._drafted_K, self._right_K = np.zeros(drafter.most, np.int64), np.zeros(drafter.most, np.int64)
        self._k = self._n_row_steps = self._n_ids = 0
        self._seconds = self._seconds_without = 0.0

    def begin(self, prefixes: list[Prefix], rows_B: np.ndarray) -> None:
        """Sequences have just been placed in these rows, behind these prefixes."""
        hidden = [prefix.hidden_D for prefix in prefixes if prefix.hidden_D is not None]
        assert len(hidden) == len(prefixes), "a prefix that was computed lacks its hidden state"
        self.drafter.begin(rows_B, hidden)

    def propose(self, rows_B: np.ndarray, fit: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Proposal:
        """`fit` says how many of the drafts wanted each row has room for, and makes that room."""
        began, forced = time.perf_counter(), self._forced(rows_B)
        self._k = self.tuner.k(len(rows_B)) if self._error is None else 0
        if self._k == 0 and not forced:
            proposal = Proposal.none(len(rows_B))
            self._draft(rows_B, proposal.room_B)
            return proposal._replace(began=began)
        wanted_B, is_forced_B = np.full(len(rows_B), self._k), np.zeros(len(rows_B), bool)
        for place, ids in forced.items():
            wanted_B[place], is_forced_B[place] = len(ids), True
        room_B = fit(rows_B, wanted_B)
        drafts = self._draft(rows_B, np.where(is_forced_B, 0, room_B))
        return Proposal(_with(drafts, forced, room_B), room_B, is_forced_B, self._k, began)

    def _forced(self, rows_B: np.ndarray) -> dict[int, list[int]]:
        """Ids that controls force next, by place: drafts that are right."""
        forced: dict[int, list[int]] = {}
        for place in self._rows.controlled_R[rows_B].nonzero()[0].tolist():
            control = self._rows.sequence_in(int(rows_B[place])).control
            try:
                ids = control.forced()[: self.drafter.most] if control is not None else []
            except Exception:  # the draw asks again, and ends this request alone
                continue
            if ids:
                forced[place] = ids
        return forced

    def _draft(self, rows_B: np.ndarray, most_B: np.ndarray) -> Drafts:
        if self._error is None:
            try:
                return self.drafter.draft(rows_B, most_B)
            except Exception as error:
                self._error = said(error)
        return Drafts.none(len(rows_B))

    def learn(self, rows_B: np.ndarray, proposal: Proposal, start_B: np.ndarray, hidden_XD: Tensor) -> None:
        """These rows had start_B ids before the step, and now what they drew is compared with what was drafted."""
        drafts, rows = proposal.drafts, self._rows
        kept_B = rows.length_R[rows_B] - start_B
        if self._error is None:
            self.drafter.went_on(rows_B, drafts.counts_B + 1, kept_B, hidden_XD)
        if proposal.k == 0 and drafts.most == 0 and proposal.is_whole:
            seconds = time.perf_counter() - proposal.began
            self._count(len(rows_B), len(rows_B), seconds, without=seconds)
            self.tuner.learn(Step(0, len(rows_B), seconds, NOBODY, NOBODY))
            return
        ahead_K = np.arange(drafts.most)
        drawn_BK = rows.ids_RT[rows_B[:, None], np.minimum(start_B[:, None] + ahead_K, rows.ids_RT.shape[1] - 1)]
        has_ended_B = np.array([rows.sequences[row] is None for row in rows_B.tolist()])
        is_known_BK = ~has_ended_B[:, None] | (ahead_K < kept_B[:, None])  # what comes after an end is not wrong
        is_known_BK &= ~proposal.is_forced_B[:, None]
        is_drafted_BK = is_known_BK & (ahead_K < drafts.counts_B[:, None])
        is_right_BK = is_drafted_BK & (ahead_K < kept_B[:, None]) & (drawn_BK == drafts.ids_BK)
        self._drafted_K[: drafts.most] += is_drafted_BK.sum(0)
        self._right_K[: drafts.most] += is_right_BK.sum(0)
        seconds = time.perf_counter() - proposal.began
        if proposal.is_whole:
            self._count(len(rows_B), int(kept_B.sum()), seconds, without=self.tuner.seconds(len(rows_B), 0))
        if proposal.is_whole and not proposal.is_forced_B.any():
            able_BK = np.arange(proposal.k) < proposal.room_B[:, None]
            able_BK[:, : drafts.most] &= is_known_BK[:, : proposal.k]
            right_K = np.pad(is_right_BK.sum(0), (0, proposal.k - drafts.most))
            self.tuner.learn(Step(proposal.k, len(rows_B), seconds, able_BK.sum(0), right_K))

    def _count(self, n_rows: int, n_ids: int, seconds: float, *, without: float) -> None:
        """`without`: what a step of so many rows takes without drafts."""
        self._n_row_steps += n_rows
        self._n_ids += n_ids
        if not np.isnan(without):
            self._seconds += seconds
            self._seconds_without += without * n_ids / n_rows

    @property
    def stats(self) -> DraftStats:
        drafted = self._drafted_K > 0
        return DraftStats(
            drafter=self.drafter.name,
            k=self._k,
            acceptance=tuple((self._right_K[drafted] / self._drafted_K[drafted]).tolist()),
            tokens_per_step=self._n_ids / max(self._n_row_steps, 1),
            speed_up=self._seconds_without / self._seconds if self._seconds else None,
            n_drafted=int(self._drafted_K.sum()),
            n_accepted=int(self._right_K.sum()),
            error=self._error,
        )


def _with(drafts: Drafts, forced: dict[int, list[int]], room_B: np.ndarray) -> Drafts:
    """Drafts, and in the rows that have none of their own the forced ids."""
    if not forced:
        return drafts
    counts_B = drafts.counts_B.copy()
    ids_BK = np.pad(drafts.ids_BK, ((0, 0), (0, max(map(len, forced.values())))))
    for place, ids in forced.items():
        counts_B[place] = room_B[place]
        ids_BK[place, : len(ids)] = ids
    return Drafts.of(ids_BK, counts_B)
