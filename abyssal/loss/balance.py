"""Expert balance: the sequence-wise loss, loads, and the max-violation metric. (DeepSeek-V3 eq. 17-20)

Letters: B sequences, T tokens, N tokens that count, E experts, K chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_balance_loss(scores_NE: Tensor, *, batch: int, experts_per_tok: int) -> Tensor:
    """sum_i f_i P_i, averaged over sequences (weight it with alpha, 1e-4 in V3).

    f_i counts how often expert i is among the top K of the unbiased affinities, P_i is its mean affinity after
    normalising over all experts; a perfectly even router scores 1.
    """
    scores_BTE = scores_NE.unflatten(0, (batch, -1))
    n_experts, length = scores_BTE.shape[-1], scores_BTE.shape[1]
    chosen_BTK = scores_BTE.detach().topk(experts_per_tok, dim=-1).indices
    hits_BTE = torch.zeros_like(scores_BTE, requires_grad=False).scatter_(-1, chosen_BTK, 1.0)
    f_BE = hits_BTE.sum(1) * n_experts / (experts_per_tok * length)
    p_BE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).mean(1)
    return (f_BE * p_BE).sum(-1).mean()


def expert_load(experts_NK: Tensor, *, n_experts: int, counted_N: Tensor | None = None) -> Tensor:
    """Tokens routed to each expert, (E,) int64; padding is left out through `counted_N`."""
    chosen = experts_NK if counted_N is None else experts_NK[counted_N]
    return torch.bincount(chosen.flatten(), minlength=n_experts)


def max_violation(load_E: Tensor) -> float:
    """MaxVio = (max load - mean load) / mean load; 0 is perfect balance. (Loss-Free Balancing, section 4)"""
    load_E = load_E.double()
    return float((load_E.max() - load_E.mean()) / load_E.mean().clamp(min=1e-9))
