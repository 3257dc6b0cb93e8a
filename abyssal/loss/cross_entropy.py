"""Cross-entropy of the next token and of the tokens after it (multi-token prediction). Pure functions, FP32.

Letters: B batch, T tokens, V vocabulary, N rows that count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def next_token_targets(ids_BT: Tensor, mask_BT: Tensor, segments_BT: Tensor | None, *, ahead: int = 1) -> Tensor:
    """The token `ahead` places on, (B, T); -100 where there is none to learn.

    There is none at the end of a row, where the token belongs to another example, and where `mask_BT`, which says of
    each token whether it may be a target, forbids it.
    """
    targets = torch.full_like(ids_BT, -100)
    length = ids_BT.shape[1] - ahead
    allowed = mask_BT[:, ahead:].bool()
    if segments_BT is not None:
        allowed = allowed & (segments_BT[:, ahead:] == segments_BT[:, :length])
    targets[:, :length] = torch.where(allowed, ids_BT[:, ahead:], -100)
    return targets


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Mean negative log-likelihood over targets that are not -100; raises when there is none to learn."""
    if not (targets_N != -100).any():
        raise ValueError("a batch has no token to learn: its loss mask is empty; check the data's masks")
    return F.cross_entropy(logits_NV.float(), targets_N, ignore_index=-100)


def token_logprobs(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
    """log p of each id under its own row, (N,) FP32."""
    return -F.cross_entropy(logits_NV.float(), ids_N, reduction="none")


def entropy(logits_NV: Tensor) -> Tensor:
    """Shannon entropy of each row in nats, (N,)."""
    logp = logits_NV.float().log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)
