"""The policy that answers were drawn from, as the trainer computes it: temperature, kept ids, chosen experts.

A ratio pi_theta / pi_old means something only if both are probabilities of the same kind. Where the engine drew from
softmax(logits / temperature) over some kept ids, so must the trainer: the same temperature, the same ids kept, at every
token. (DeepSeek-V3.2, "keep sampling mask") Where it used some experts, the trainer can use the same ("keep routing").
Owns what is recorded of that, packed in rows; owns no loss.
Letters: B rows, T tokens, N answer tokens of some rows, V vocabulary, X kept ids of all tokens, one after another,
M MoE layers, K chosen experts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from abyssal.types import Completion, DrawnFrom


class Kept(NamedTuple):
    """The ids that truncation left at each answer token: `ids_X[start : start + count]`."""

    ids_X: Tensor
    start_BT: Tensor
    count_BT: Tensor

    def mask(self, target_BT: Tensor, n_vocab: int) -> Tensor:
        """(N, V), True where an id was left, for the target tokens."""
        start_N, count_N = self.start_BT[target_BT], self.count_BT[target_BT]
        token_Y = torch.arange(len(count_N), device=count_N.device).repeat_interleave(count_N)
        before_N = count_N.cumsum(0) - count_N
        within_Y = torch.arange(len(token_Y), device=count_N.device) - before_N[token_Y]
        mask_NV = torch.zeros(len(count_N), n_vocab, dtype=torch.bool, device=count_N.device)
        mask_NV[token_Y, self.ids_X[start_N[token_Y] + within_Y]] = True
        return mask_NV


def sampled_logits(logits_NV: Tensor, *, temperature: float, kept_NV: Tensor | None) -> Tensor:
    """Logits of the policy that was drawn from; the model's own, untouched, at temperature 1 with nothing cut."""
    if temperature != 1:
        logits_NV = logits_NV / temperature
    return logits_NV if kept_NV is None else logits_NV.masked_fill(~kept_NV, -torch.inf)


def temperature_of(completions: list[Completion]) -> float:
    """The temperature of all of them; 1 where the model's own distribution was drawn from."""
    found = {1.0 if c.drawn_from is None else c.drawn_from.temperature for c in completions}
    if len(found) > 1:
        raise ValueError(f"answers drawn at temperatures {sorted(found)} cannot share an update; draw all at one")
    if 0.0 in found:
        raise ValueError("temperature=0: greedy answers have probability 1 and nothing to learn; draw at above 0")
    return found.pop() if found else 1.0


def pack_experts(completions: list[Completion], places: list[tuple[int, int]], shape: tuple[int, int]) -> Tensor | None:
    """(B, T, M, K) int16: the experts of each computed token, answer i from `places[i]` on; -1 where none were chosen,
    as at an answer's last token, which was drawn and never computed. None when no answer carries any."""
    recorded = [c.experts for c in completions if c.experts is not None]
    if not recorded:
        return None
    if len(recorded) < len(completions):
        raise ValueError(f"{len(completions) - len(recorded)} of {len(completions)} answers carry no experts")
    experts_BTMK = torch.full((*shape, *recorded[0].shape[1:]), -1, dtype=torch.int16)
    for c, experts_TMK, (row, start) in zip(completions, recorded, places, strict=True):
        n_computed = len(c.prompt_ids) + len(c.ids) - 1
        if len(experts_TMK) != n_computed:
            raise ValueError(f"an answer of {n_computed} computed tokens carries experts of {len(experts_TMK)}")
        experts_BTMK[row, start : start + n_computed] = experts_TMK.to(torch.int16)
    return experts_BTMK


def pack_kept(completions: list[Completion], spans: list[tuple[int, slice]], shape: tuple[int, int]) -> Kept | None:
    """What was kept at each answer token, answer i in row and columns `spans[i]`; None when nothing was cut."""
    records = [record for c in completions if (record := _kept(c.drawn_from)) is not None]
    if not records:
        return None
    if len(records) < len(completions):
        raise ValueError(
            f"{len(completions) - len(records)} of {len(completions)} answers were drawn from all ids, the others from "
            f"a part; draw all of an update with the same top_p and top_k"
        )
    start, count = (np.zeros(shape, dtype=np.int64) for _ in range(2))
    n_ids = 0
    for (ids, counts), (row, columns) in zip(records, spans, strict=True):
        start[row, columns], count[row, columns] = n_ids + np.cumsum(counts) - counts, counts
        n_ids += len(ids)
    ids_X = np.concatenate([ids for ids, _ in records])
    return Kept(torch.from_numpy(ids_X), torch.from_numpy(start), torch.from_numpy(count))


def _kept(drawn_from: DrawnFrom | None) -> tuple[np.ndarray, np.ndarray] | None:
    if drawn_from is None or drawn_from.kept_ids is None or drawn_from.kept_counts is None:
        return None
    return drawn_from.kept_ids.numpy().astype(np.int64), drawn_from.kept_counts.numpy()
