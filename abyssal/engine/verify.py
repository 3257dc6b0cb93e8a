"""Which of the ids drawn behind drafts count: as many as would have been drawn one after the other.

The draw of a token depends on its seed, its position and its logits alone. So all tokens of a row are drawn as if its
drafts were right, in one go, and what was drawn counts as far as the drafts were: the same ids and log-probs as without
drafts. Rows whose draws look at what was drawn before them (controls, penalties, stop strings) go token by token.
Letters: B rows of a step, T tokens of a row, K drafts, X tokens of all rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from abyssal.engine.draft import Drafts
from abyssal.engine.sampler import Drawn, Sampling, repeated, sample


class Verified(NamedTuple):
    """Row b goes on by counts_B[b] ids; 0: it is to be drawn token by token. `drawn` are all that count, (X,), row
    after row, place_X and column_X where they belong, `how` what they were drawn with."""

    counts_B: np.ndarray
    place_X: np.ndarray
    column_X: np.ndarray
    drawn: Drawn
    how: Sampling


def verify(
    logits_XV: Tensor, drafts: Drafts, *, start_B: np.ndarray, freely_B: np.ndarray, how: Sampling, is_end_V: np.ndarray
) -> Verified:
    """Draw at positions start_B[b], start_B[b] + 1, .. of the rows that draw freely. A row whose logits are not finite
    is left to be drawn token by token, where that is dealt with."""
    is_token_BT = np.arange(1 + drafts.most) <= drafts.counts_B[:, None]
    place_X, column_X = np.divmod(np.flatnonzero(is_token_BT), 1 + drafts.most)
    free_X = np.flatnonzero(freely_B[place_X])
    place_X, column_X = place_X[free_X], column_X[free_X]
    positions_X = torch.from_numpy(start_B[place_X] + column_X).to(logits_XV.device)
    how = repeated(how, torch.from_numpy(place_X))
    drawn = sample(logits_XV[torch.from_numpy(free_X)], positions_X, how)
    drawn_BT, is_finite_BT = np.zeros(is_token_BT.shape, np.int64), np.ones(is_token_BT.shape, bool)
    drawn_BT[place_X, column_X] = drawn.ids_B.cpu().numpy()
    is_finite_BT[place_X, column_X] = np.isfinite(drawn.logps_B.cpu().numpy())
    counts_B = kept_counts(drawn_BT, drafts, is_end_V[drawn_BT])
    kept_BT = np.arange(1 + drafts.most) < counts_B[:, None]
    counts_B = np.where(freely_B & (is_finite_BT | ~kept_BT).all(1), counts_B, 0)
    kept_X = np.flatnonzero(column_X < counts_B[place_X])
    kept = torch.from_numpy(kept_X)
    probs_XV = None if drawn.probs_BV is None else drawn.probs_BV[kept]
    few = Drawn(drawn.ids_B[kept], drawn.logps_B[kept], drawn.all_logps_BV[kept], probs_XV)
    return Verified(counts_B, place_X[kept_X], column_X[kept_X], few, how)


def kept_counts(drawn_BT: np.ndarray, drafts: Drafts, is_end_BT: np.ndarray) -> np.ndarray:
    """How many of the ids drawn count, (B,): one more than drafts were right, none after an end."""
    goes_on_BK = (drawn_BT[:, :-1] == drafts.ids_BK) & ~is_end_BT[:, :-1]
    goes_on_BK &= np.arange(drafts.most) < drafts.counts_B[:, None]
    return 1 + np.logical_and.accumulate(goes_on_BK, axis=1).sum(1)
