"""What a row of tokens teaches: next token, the token after it, and even use of experts. Owns no optimizer and no data.

Shared by pretraining and SFT. The head runs only where there is something to learn, which on problems is a third of all
places. Letters: B rows, T tokens, N targets, D width, V vocabulary, E experts, K chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from abyssal.loss.balance import expert_load, sequence_balance_loss
from abyssal.loss.cross_entropy import cross_entropy, next_token_targets
from abyssal.model.moe import Routing
from abyssal.model.transformer import Transformer


class Batch(NamedTuple):
    """`mask_BT` is True where a token may be a target; `segments_BT` None lets neighbours in a row see each other."""

    ids_BT: Tensor
    mask_BT: Tensor
    segments_BT: Tensor | None = None
    positions_BT: Tensor | None = None

    def rows(self, rows: slice | Tensor) -> Batch:
        """Some of its rows."""
        segments_BT, positions_BT = self.segments_BT, self.positions_BT
        return Batch(
            self.ids_BT[rows],
            self.mask_BT[rows],
            None if segments_BT is None else segments_BT[rows],
            None if positions_BT is None else positions_BT[rows],
        )

    def to(self, device: torch.device) -> Batch:
        segments_BT, positions_BT = self.segments_BT, self.positions_BT
        return Batch(
            self.ids_BT.to(device),
            self.mask_BT.to(device),
            None if segments_BT is None else segments_BT.to(device),
            None if positions_BT is None else positions_BT.to(device),
        )


class Losses(NamedTuple):
    """`total` is what is minimised; the parts are unweighted. `loads` holds one (E,) count per balanced layer."""

    total: Tensor
    next_token: Tensor
    mtp: Tensor | None
    balance: Tensor | None
    loads: list[Tensor]


def language_loss(
    model: Transformer, batch: Batch, *, mtp_weight: float, balance_weight: float, whole: Batch | None = None
) -> Losses:
    """Mean cross-entropy, plus mtp_weight / depth times that of each MTP module, plus the weighted balance loss.

    When `batch` is a part of the rows of `whole`, the means are over the whole, so that losses of the parts add up.
    """
    whole = batch if whole is None else whole
    routings: list[Routing] = []
    hidden_BTD = model.hidden(
        batch.ids_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT, routings=routings
    )
    next_token = loss_ahead(model, hidden_BTD, batch, whole, ahead=1)
    total, mtp, balance = next_token, None, None
    if mtp_weight > 0 and len(model.mtp):
        mtp = mtp_loss(model, hidden_BTD, batch, routings, whole=whole)
        total = total + mtp_weight * mtp
    if balance_weight > 0 and routings:
        k = model.config.num_experts_per_tok
        parts = [sequence_balance_loss(r.scores_NE, batch=len(batch.ids_BT), experts_per_tok=k) for r in routings]
        balance = torch.stack(parts).mean() * (len(batch.ids_BT) / len(whole.ids_BT))
        total = total + balance_weight * balance
    return Losses(
        total,
        next_token.detach(),
        None if mtp is None else mtp.detach(),
        None if balance is None else balance.detach(),
        loads_of(model, routings, batch),
    )


def add_losses(parts: list[Losses]) -> Losses:
    """The losses and loads of a whole from those of its parts."""
    _, next_tokens, mtps, balances, loads = zip(*parts, strict=True)
    return Losses(
        torch.stack([part.total.detach() for part in parts]).sum(),
        torch.stack(next_tokens).sum(),
        None if mtps[0] is None else torch.stack(mtps).sum(),
        None if balances[0] is None else torch.stack(balances).sum(),
        [torch.stack(of_layer).sum(0) for of_layer in zip(*loads, strict=True)],
    )


def mtp_loss(
    model: Transformer,
    hidden_BTD: Tensor,
    batch: Batch,
    routings: list[Routing] | None,
    *,
    whole: Batch | None = None,
) -> Tensor:
    """Mean over depths of the cross-entropy of the token k + 1 places on. (DeepSeek-V3 eq. 24-25)"""
    outputs = model.mtp_hidden(
        hidden_BTD, batch.ids_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT, routings=routings
    )
    whole = batch if whole is None else whole
    parts = [loss_ahead(model, hidden, batch, whole, ahead=k + 1) for k, hidden in enumerate(outputs, start=1)]
    return torch.stack(parts).mean()


def loss_ahead(model: Transformer, hidden_BTD: Tensor, batch: Batch, whole: Batch, *, ahead: int) -> Tensor:
    """This batch's share of the whole's mean cross-entropy of the token `ahead` places on."""
    targets_BT = next_token_targets(batch.ids_BT, batch.mask_BT, batch.segments_BT, ahead=ahead)
    targets_X = targets_BT[:, : hidden_BTD.shape[1]].flatten()
    places_N = (targets_X != -100).nonzero()[:, 0]
    n_whole = len(places_N)
    if whole is not batch:
        n_whole = int((next_token_targets(whole.ids_BT, whole.mask_BT, whole.segments_BT, ahead=ahead) != -100).sum())
        if n_whole and len(places_N) == 0:
            return hidden_BTD.sum() * 0.0  # nothing to learn in this part, something in the others
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, places_N)
    return cross_entropy(model.logits(hidden_ND), targets_X[places_N]) * (len(places_N) / max(1, n_whole))


def loads_of(model: Transformer, routings: list[Routing], batch: Batch) -> list[Tensor]:
    """How many tokens each expert of each layer received; padding (segment 0) does not count."""
    loads = []
    for routing in routings:
        counted = None
        if batch.segments_BT is not None:
            width = routing.experts_NK.shape[0] // len(batch.ids_BT)  # MTP layers see fewer columns
            counted = (batch.segments_BT[:, :width] > 0).flatten()
        loads.append(expert_load(routing.experts_NK, n_experts=model.config.n_routed_experts, counted_N=counted))
    return loads
