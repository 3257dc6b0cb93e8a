"""Held-out rows under a model: loss, expert balance per layer, and how often the MTP module's guess would be kept.

Letters: B rows, T tokens, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from abyssal.loss.balance import expert_load, max_violation
from abyssal.loss.cross_entropy import cross_entropy, next_token_targets
from abyssal.model.moe import Routing
from abyssal.model.transformer import Transformer


@torch.inference_mode()
def held_out_metrics(
    model: Transformer,
    ids_BT: Tensor,
    mask_BT: Tensor,
    segments_BT: Tensor | None,
    *,
    positions_BT: Tensor | None = None,
) -> dict[str, Any]:
    """held_out_loss, held_out_max_violation (one number per MoE layer), mtp_acceptance; without the parts it lacks."""
    routings: list[Routing] = []
    hidden_BTD = model.hidden(ids_BT, positions_BT=positions_BT, segments_BT=segments_BT, routings=routings)
    logits_BTV = model.logits(hidden_BTD)
    targets_BT = next_token_targets(ids_BT, mask_BT, segments_BT)
    metrics: dict[str, Any] = {"held_out_loss": float(cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten()))}
    if routings:
        counted = None if segments_BT is None else (segments_BT > 0).flatten()
        loads = [
            expert_load(r.experts_NK, n_experts=model.config.n_routed_experts, counted_N=counted) for r in routings
        ]
        metrics["held_out_max_violation"] = [round(max_violation(load), 4) for load in loads]
    if len(model.mtp):
        guess_BT = model.logits(
            model.mtp_hidden(hidden_BTD, ids_BT, positions_BT=positions_BT, segments_BT=segments_BT)[0]
        ).argmax(-1)
        metrics["mtp_acceptance"] = acceptance(guess_BT, logits_BTV.argmax(-1), ids_BT, mask_BT, segments_BT)
    return metrics


def acceptance(
    guess_BT: Tensor, greedy_BT: Tensor, ids_BT: Tensor, mask_BT: Tensor, segments_BT: Tensor | None
) -> float:
    """Share of places where the MTP guess for the second token is what the main model would then say itself.

    `guess_BT` (B, T-1) at position i is a guess of token i+2; `greedy_BT` (B, T) at i+1 is the model's own word for it.
    Counted where tokens i+1 and i+2 are both the answer's, within one example.
    """
    counted_BT = next_token_targets(ids_BT, mask_BT, segments_BT, ahead=2)[:, :-2] != -100
    same_BT = guess_BT[:, :-1] == greedy_BT[:, 1:-1]
    return float(same_BT[counted_BT].float().mean()) if counted_BT.any() else float("nan")
