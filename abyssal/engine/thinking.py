"""Thinking under control: how much, how it lands, when it has to stop. A control of one request (control.py).

Thinking is what stands between <think> and </think> at the head of an answer. The prompt may have opened it, or closed
it; else the first id drawn decides. Counted are the ids drawn between the two marks. Thinking that must end does so in
one way whatever the reason, its budget, somebody's wish or a loop: the ids of a short phrase, then </think>.

A budget is exact: the phrase counts, so it begins when just enough of the budget is left for it. The marks are single
ids; vocabularies that spell them with several are not served.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from abyssal.engine.loops import Loops
from abyssal.engine.vocabulary import Vocabulary
from abyssal.types import ClosedBy, ThinkingLimits, ThinkingReport

Phase = Literal["may open", "open", "closed"]
AnswerNow = Literal["closing", "answering", "ended"]  # what became of the wish: it closes, or had no thinking to close


class Closing(NamedTuple):
    """`ids` come next, in order, from the moment when `start` ids had been thought."""

    by: ClosedBy
    start: int
    ids: list[int]


class ThinkingControl:
    """Told every id of one answer. `limits` without a budget and without anything else only watches."""

    def __init__(self, limits: ThinkingLimits, vocabulary: Vocabulary, prompt_ids: Sequence[int]) -> None:
        self.think_id, self._end_think_id = think_marks(vocabulary)
        if not vocabulary.control_ids.isdisjoint(limits.landing):
            raise ValueError("the landing of the thinking contains a control token; give the ids of plain text")
        self._begins = phase_behind(prompt_ids, vocabulary)
        if limits.at_least and self._begins == "closed":
            raise ValueError(
                f"at_least={limits.at_least} tokens of thinking, and the prompt has closed it; ask with thinking='on'"
            )
        self._limits, self._end_ids = limits, vocabulary.end_ids
        self._loops = Loops() if limits.stop_loops else None
        self._n_drawn = 0
        # how many ids had been drawn when it opened, and when it closed, its mark included
        self._opened_at = 0 if self._begins == "open" else None
        self._closed_at = 0 if self._begins == "closed" else None
        self._ended = False  # by an end id in the middle of thinking
        self._wanted = False
        self._closing: Closing | None = None
        self._settle()

    @property
    def is_open(self) -> bool:
        return self._opened_at is not None and self._closed_at is None

    @property
    def is_closed(self) -> bool:
        return self._closed_at is not None

    @property
    def report(self) -> ThinkingReport:
        if self._opened_at is None or self._closed_at is None:
            return ThinkingReport(self._n_thought, None)
        return ThinkingReport(self._n_thought, "model" if self._closing is None else self._closing.by)

    def answer_now(self) -> AnswerNow:
        """Close the thinking with the next ids. Where it has not begun it may still open, and then closes at once."""
        self._wanted = True
        self._settle()
        return "answering" if self.is_closed else "closing"

    def forced(self) -> list[int]:
        if self._opened_at is None and self._closed_at is None:
            return [self.think_id] if self._limits.at_least and not self._wanted else []
        if self._closing is None or not self.is_open:
            return []
        return self._closing.ids[self._n_thought - self._closing.start :]

    def mask(self, allowed_V: np.ndarray) -> bool:
        if not self.is_open or self._n_thought >= self._limits.at_least:
            return False
        allowed_V[[self._end_think_id, *self._end_ids]] = False
        return True

    def drawn(self, token: int) -> None:
        self._n_drawn += 1
        if self.is_open:
            if token == self._end_think_id:
                self._closed_at = self._n_drawn
            elif token in self._end_ids:
                self._ended = True
            elif self._loops is not None:
                self._loops.push(token)
        elif self._n_drawn == 1 and token == self.think_id:  # behind a closing mark in the prompt as well
            self._opened_at, self._closed_at = 1, None
        elif not self.is_closed:
            self._closed_at = self._n_drawn
        self._settle()

    @property
    def _n_thought(self) -> int:
        if self._opened_at is None:
            return 0
        until = self._n_drawn if self._closed_at is None else self._closed_at - 1
        return until - self._opened_at - self._ended

    def _settle(self) -> None:
        """Decide whether the thinking has to close from here on. Once decided it stays so."""
        if not self.is_open or self._closing is not None:
            return
        n, budget, landing = self._n_thought, self._limits.budget, self._limits.landing
        if budget is not None and len(landing) > budget:
            landing = ()
        if self._wanted:
            by: ClosedBy = "answer_now"
        elif budget is not None and n + len(landing) >= budget:
            by = "budget"
        elif self._loops is not None and n >= self._limits.at_least and self._loops.period is not None:
            by = "loop"
        else:
            return
        self._closing = Closing(by, n, [*landing, self._end_think_id])


def needed(vocabulary: Vocabulary | None) -> Vocabulary:
    if vocabulary is None:
        raise ValueError("this engine knows no marks of thinking; make it with vocabulary=Vocabulary.of(tokenizer)")
    return vocabulary


def think_marks(vocabulary: Vocabulary) -> tuple[int, int]:
    """The ids of <think> and </think>."""
    if vocabulary.think_id is None or vocabulary.end_think_id is None:
        raise ValueError(
            "this model's vocabulary has no <think> and </think>, so its thinking cannot be limited; leave budget, "
            "effort and minimum out"
        )
    return vocabulary.think_id, vocabulary.end_think_id


def phase_behind(prompt_ids: Sequence[int], vocabulary: Vocabulary) -> Phase:
    """Where an answer to this prompt begins: its last mark opens thinking, closes it, or ends a turn."""
    phases: dict[int | None, Phase] = dict.fromkeys(vocabulary.end_ids, "may open")
    phases |= {vocabulary.think_id: "open", vocabulary.end_think_id: "closed"}
    return next((phases[token] for token in reversed(prompt_ids) if token in phases), "may open")


def thought(prompt_ids: Sequence[int], ids: list[int], vocabulary: Vocabulary) -> ThinkingReport | None:
    """The same report of an answer that nobody controlled; None where thinking has no marks."""
    if vocabulary.think_id is None or vocabulary.end_think_id is None:
        return None
    opened = phase_behind(prompt_ids, vocabulary) == "open"
    if not opened and ids[:1] != [vocabulary.think_id]:
        return ThinkingReport(0, None)
    start = 0 if opened else 1
    if vocabulary.end_think_id in ids:
        return ThinkingReport(ids.index(vocabulary.end_think_id) - start, "model")
    return ThinkingReport(len(ids) - start - (ids[-1:] != [] and ids[-1] in vocabulary.end_ids), None)
