"""What a request adds to the model's logits before anything is drawn: penalties and biases, for a batch at once.

In this order: the repetition penalty of everything read or written so far (CTRL, Keskar et al. 2019, 4.1, as
`transformers` has it: a positive logit is divided by it, a negative one multiplied), OpenAI's penalties of what was
written (frequency x how often, presence x whether), then the bias. What is masked, cut and drawn comes after that;
log-probs stay the model's own.
Letters: R rows, B rows of a step, P rows of a step with penalties, T positions of a sequence, X biased (row, id)
pairs, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from abyssal.types import SamplingParams


class Bias(NamedTuple):
    """Added to the logit of an id in a row of the batch. No pair comes twice."""

    rows_X: Tensor
    ids_X: Tensor
    values_X: Tensor


class Penalties:
    """For each place of a sequence, how often the id there was drawn so far: `counts_RT`, beside the ids themselves.

    Rows that ask for no penalty never touch their counts, and the system gives no memory to what is not touched.
    """

    def __init__(self, *, n_rows: int, max_length: int) -> None:
        self.is_on_R = np.zeros(n_rows, bool)
        self.repetition_R = np.ones(n_rows, np.float32)
        self.presence_R, self.frequency_R = np.zeros(n_rows, np.float32), np.zeros(n_rows, np.float32)
        self.counts_RT = np.zeros((n_rows, max_length), np.int32)
        self.biases: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by row: ids, and what is added

    def place(self, row: int, params: SamplingParams, ids: np.ndarray, *, n_prompt: int) -> None:
        """A row begins, or goes on, with these ids, all but the prompt drawn."""
        self.is_on_R[row] = params.penalises
        if params.penalises:
            self.repetition_R[row] = params.repetition_penalty
            self.presence_R[row], self.frequency_R[row] = params.presence_penalty, params.frequency_penalty
            self.counts_RT[row, : len(ids)] = _counts(ids, n_prompt)
        self.biases.pop(row, None)
        if bias := params.logit_bias:
            self.biases[row] = np.array([*bias], np.int64), np.array([*bias.values()], np.float32)

    def drew(self, rows_P: np.ndarray, ids_RT: np.ndarray, positions_P: np.ndarray) -> None:
        """These rows have an id more each, at these positions."""
        n_columns = int(positions_P.max()) + 1
        ids_PT, counts_PT = ids_RT[rows_P, :n_columns], self.counts_RT[rows_P, :n_columns]
        drawn_P = ids_RT[rows_P, positions_P]
        is_it_PT = (ids_PT == drawn_P[:, None]) & (np.arange(n_columns) < positions_P[:, None])
        counts_P = np.where(is_it_PT, counts_PT, 0).max(1) + 1  # all its earlier places say the same
        is_it_PT[np.arange(len(rows_P)), positions_P] = True
        self.counts_RT[rows_P, :n_columns] = np.where(is_it_PT, counts_P[:, None], counts_PT)

    def apply(self, logits_PV: Tensor, rows_P: np.ndarray, ids_RT: np.ndarray, length_P: np.ndarray) -> Tensor:
        """The logits of these rows, changed in place, and returned."""
        n_columns = int(length_P.max())
        is_there_PT = np.arange(n_columns) < length_P[:, None]
        # behind its end a row repeats its first id: the same value is written twice
        ids_PT = np.where(is_there_PT, ids_RT[rows_P, :n_columns], ids_RT[rows_P, :1])
        counts_PT = np.where(is_there_PT, self.counts_RT[rows_P, :n_columns], self.counts_RT[rows_P, :1])
        columns = (self.repetition_R[rows_P], self.presence_R[rows_P], self.frequency_R[rows_P])
        repetition_P1, presence_P1, frequency_P1 = (
            torch.from_numpy(column_P)[:, None].to(logits_PV.device) for column_P in columns
        )
        ids, counts = torch.from_numpy(ids_PT).to(logits_PV.device), torch.from_numpy(counts_PT).to(logits_PV.device)
        seen_PT = logits_PV.gather(1, ids)
        seen_PT = torch.where(seen_PT > 0, seen_PT / repetition_P1, seen_PT * repetition_P1)
        seen_PT = seen_PT - frequency_P1 * counts - presence_P1 * (counts > 0)
        return logits_PV.scatter_(1, ids, seen_PT)

    def bias(self, rows_B: np.ndarray, device: torch.device) -> Bias | None:
        """Of these rows; None where none has any."""
        biased = [(place, *self.biases[row]) for place, row in enumerate(rows_B.tolist()) if row in self.biases]
        if not biased:
            return None
        places, ids, values = zip(*biased, strict=True)
        rows_X, ids_X = np.repeat(places, [len(own) for own in ids]), np.concatenate(ids)
        values_X = np.concatenate(values)
        return Bias(*(torch.from_numpy(column_X).to(device) for column_X in (rows_X, ids_X, values_X)))


def _counts(ids: np.ndarray, n_prompt: int) -> np.ndarray:
    """Of the id at each place: how often it stands behind the prompt."""
    _, kinds = np.unique(ids, return_inverse=True)
    counts: np.ndarray = np.bincount(kinds[n_prompt:], minlength=int(kinds.max()) + 1)[kinds]
    return counts
