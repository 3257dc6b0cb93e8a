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


class Losses(NamedTuple):
    """`total` is what is minimised; the parts are unweighted. `loads` holds one (E,) count per balanced layer."""

    total: Tensor
    next_token: Tensor
    mtp: Tensor | None
    balance: Tensor | None
    loads: list[Tensor]


def language_loss(model: Transformer, batch: Batch, *, mtp_weight: float, balance_weight: float) -> Losses:
    """Mean cross-entropy, plus mtp_weight / depth times that of each MTP module, plus the sequence-wise balance loss."""
    routings: list[Routing] = []
    hidden_BTD = model.hidden(
        batch.ids_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT, routings=routings
    )
    next_token = loss_ahead(model, hidden_BTD, batch, ahead=1)
    total, mtp, balance = next_token, None, None
    if mtp_weight > 0 and len(model.mtp):
        mtp = mtp_loss(model, hidden_BTD, batch, routings)
        total = total + mtp_weight * mtp
    if balance_weight > 0 and routings:
        k = model.config.num_experts_per_tok
        parts = [sequence_balance_loss(r.scores_NE, batch=len(batch.ids_BT), experts_per_tok=k) for r in routings]
        balance = torch.stack(parts).mean()
        total = total + balance_weight * balance
    return Losses(
        total,
        next_token.detach(),
        None if mtp is None else mtp.detach(),
        None if balance is None else balance.detach(),
        loads_of(model, routings, batch),
    )


def mtp_loss(model: Transformer, hidden_BTD: Tensor, batch: Batch, routings: list[Routing] | None) -> Tensor:
    """Mean over depths of the cross-entropy of the token k + 1 places on. (DeepSeek-V3 eq. 24-25)"""
    outputs = model.mtp_hidden(
        hidden_BTD, batch.ids_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT, routings=routings
    )
    parts = [loss_ahead(model, hidden, batch, ahead=k + 1) for k, hidden in enumerate(outputs, start=1)]
    return torch.stack(parts).mean()


def loss_ahead(model: Transformer, hidden_BTD: Tensor, batch: Batch, *, ahead: int) -> Tensor:
    """Cross-entropy of the token `ahead` places on, over the places that have one to learn."""
    targets_BT = next_token_targets(batch.ids_BT, batch.mask_BT, batch.segments_BT, ahead=ahead)
    targets_X = targets_BT[:, : hidden_BTD.shape[1]].flatten()
    places_N = (targets_X != -100).nonzero()[:, 0]
    if len(places_N) == 0:
        raise ValueError("a batch has no token to learn: its loss mask is empty; check the data's masks")
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, places_N)
    return cross_entropy(model.logits(hidden_ND), targets_X[places_N])


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
