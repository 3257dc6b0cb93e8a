"""What a reward model says of responses, one head at a time, and which part of a response each head reads.

Helpfulness reads the question and the final answer, never the thinking; safety reads the whole response. (R1 section
3.1) Owns no training and no scale.
Letters: B rows, T tokens, N examples or pairs, K heads.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from abyssal.data.pack import Example, pack_isolated
from abyssal.data.preferences import Pair
from abyssal.model.reward_head import RewardModel
from abyssal.reward.open_request import HEADS, Head
from abyssal.tokens.chat import render
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Message


class Scores:
    """Scores of responses by a reward model, one head at a time: nothing another head reads can touch them."""

    def __init__(self, model: RewardModel, tokenizer: Tokenizer, *, row_len: int, rows_per_pass: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.row_len, self.rows_per_pass = row_len, rows_per_pass

    @torch.no_grad()
    def of(self, head: Head, responses: list[tuple[str, Message]]) -> Tensor:
        """(N,) FP32 on the CPU, in the order of the (prompt, answer) pairs. A score that is no number raises."""
        ids = [seen_by(head, prompt, message, self.tokenizer) for prompt, message in responses]
        if not ids:
            return torch.empty(0)
        scores_N = scored(
            self.model, ids, pad_id=self.tokenizer.pad_id, row_len=self.row_len, rows_per_pass=self.rows_per_pass
        )[:, HEADS.index(head)].cpu()
        if bad := int((~scores_N.isfinite()).sum()):
            raise FloatingPointError(
                f"the reward model gives {bad} of {len(scores_N)} answers a {head} that is no number; lower "
                f"reward_model.lr, delete its folder and run again"
            )
        return scores_N


def seen_by(head: Head, prompt: str, message: Message, tokenizer: Tokenizer) -> list[int]:
    """The ids that a head reads. Helpfulness is of the final answer: what was thought on the way is taken out."""
    answer = replace(message, thinking=None) if head == "helpfulness" else message
    return render([Message(role="user", content=prompt), answer], tokenizer).ids


def scored(model: RewardModel, ids: list[list[int]], *, pad_id: int, row_len: int, rows_per_pass: int) -> Tensor:
    """(N, K) of examples that share rows and cannot see each other. With gradients unless the caller forbids them."""
    longest = max(map(len, ids))
    packed = pack_isolated([Example(one, [0] * len(one)) for one in ids], row_len=max(row_len, longest), pad_id=pad_id)
    row_N, start_N = torch.tensor(packed.places).unbind(1)
    last_N = start_N + torch.tensor([len(one) for one in ids]) - 1
    device = model.score.weight.device
    pieces, order = [], []
    for rows in torch.arange(len(packed.ids_BT)).split(rows_per_pass):
        inside_N = ((row_N >= rows[0]) & (row_N <= rows[-1])).nonzero()[:, 0]
        flat_N = (row_N[inside_N] - rows[0]) * packed.ids_BT.shape[1] + last_N[inside_N]
        pieces.append(
            model(
                packed.ids_BT[rows].to(device),
                flat_N.to(device),
                positions_BT=packed.position_BT[rows].to(device),
                segments_BT=packed.segment_BT[rows].to(device),
            )
        )
        order.append(inside_N)
    return torch.cat(pieces)[torch.cat(order).argsort().to(device)]


def pair_ids(pairs: list[Pair], tokenizer: Tokenizer) -> tuple[list[list[int]], Tensor]:
    """Ids of every chosen answer, then of every rejected one, as the pair's head reads them; and the heads (N,)."""
    ids = [seen_by(pair.head, pair.prompt, pair.chosen, tokenizer) for pair in pairs]
    ids += [seen_by(pair.head, pair.prompt, pair.rejected, tokenizer) for pair in pairs]
    return ids, torch.tensor([HEADS.index(pair.head) for pair in pairs])
