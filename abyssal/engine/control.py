"""What steers one request's draws: ids that must come, ids that may not, and what came.

A control lives on the host beside its sequence. It knows ids and no logits, is told every drawn id once, and so
survives preemption as it is. Requests without one cost nothing here.
Letters: B rows of a step, C rows of a step that have a control, M rows with a mask, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

import numpy as np


class Control(Protocol):
    """Asked before each draw, told after it."""

    def forced(self) -> list[int]:
        """The ids that come next whatever the logits say, in order; [] for a free draw."""

    def mask(self, allowed_V: np.ndarray) -> bool:
        """Clear what may not be drawn next in a row of True; False when there is nothing to clear."""

    def drawn(self, token: int) -> None:
        """This id was appended, forced or free."""


class ThinkingFirst(Protocol):
    """A control that knows where the thinking is. Neither open nor closed: the next id may open it, or not."""

    @property
    def is_open(self) -> bool: ...
    @property
    def is_closed(self) -> bool: ...
    @property
    def think_id(self) -> int: ...
    def forced(self) -> list[int]: ...
    def mask(self, allowed_V: np.ndarray) -> bool: ...
    def drawn(self, token: int) -> None: ...


class Controls:
    """Two in one: `answer` hears and says nothing before the thinking is over, and that is not where `end_ids` come."""

    def __init__(self, thinking: ThinkingFirst, answer: Control, *, end_ids: Iterable[int] = ()) -> None:
        self._thinking, self._answer, self._end_ids = thinking, answer, sorted(end_ids)

    def forced(self) -> list[int]:
        # before anything is drawn the model may still decide to think: nothing of the answer is forced on it then
        return self._thinking.forced() or (self._answer.forced() if self._thinking.is_closed else [])

    def mask(self, allowed_V: np.ndarray) -> bool:
        if self._thinking.is_open:
            allowed_V[self._end_ids] = False
            return self._thinking.mask(allowed_V) or bool(self._end_ids)
        cleared = self._answer.mask(allowed_V)
        if cleared and not self._thinking.is_closed:
            allowed_V[self._thinking.think_id] = True
        return self._thinking.mask(allowed_V) or cleared

    def drawn(self, token: int) -> None:
        was_open = self._thinking.is_open
        self._thinking.drawn(token)
        if not was_open and self._thinking.is_closed:
            self._answer.drawn(token)


class Steering(NamedTuple):
    """What the controls of a step's rows ask of its draws.

    `allowed_MV` holds for the rows `masked_M` of the batch, `forced_C` for `forced_rows_C`; None where no row asks.
    `errors` are of rows whose control raised, or left nothing to draw.
    """

    masked_M: np.ndarray | None
    allowed_MV: np.ndarray | None
    forced_rows_C: np.ndarray | None
    forced_C: np.ndarray | None
    errors: dict[int, str]


def steer(controls: Seq[tuple[int, Control]], *, n_vocab: int) -> Steering:
    """Ask the controls, given with their places in the batch, about one draw each."""
    masks: dict[int, np.ndarray] = {}
    forced: dict[int, int] = {}
    errors: dict[int, str] = {}
    spare_V: np.ndarray | None = None
    for i, control in controls:
        try:
            if ids := control.forced():
                forced[i] = _within(ids[0], n_vocab)
                continue
            allowed_V, spare_V = np.ones(n_vocab, dtype=bool) if spare_V is None else spare_V, None
            if not control.mask(allowed_V):
                spare_V = allowed_V  # nothing was cleared: the next one has it
            else:
                if not allowed_V.any():
                    raise ValueError("the controls of this request leave no id to draw; ask for less")
                masks[i] = allowed_V
        except Exception as error:  # whatever it is, it is this request's alone
            errors[i] = f"{type(error).__name__}: {error}"
    return Steering(
        masked_M=np.fromiter(masks, np.int64, len(masks)) if masks else None,
        allowed_MV=np.stack([*masks.values()]) if masks else None,
        forced_rows_C=np.fromiter(forced, np.int64, len(forced)) if forced else None,
        forced_C=np.fromiter(forced.values(), np.int64, len(forced)) if forced else None,
        errors=errors,
    )


def _within(token: int, n_vocab: int) -> int:
    if not 0 <= token < n_vocab:
        raise ValueError(f"a control forces the id {token}, outside the vocabulary of {n_vocab}")
    return token
