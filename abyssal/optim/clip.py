"""Gradient norm and clipping."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def clip_gradients(params: Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients so that their joint norm is at most `max_norm`; returns the norm before.

    A norm that is NaN or infinite raises.
    """
    grads = [p.grad for p in params if p.grad is not None]
    norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))
    if norm != norm or norm == float("inf"):
        raise FloatingPointError(
            f"gradient norm is {norm}: the step would destroy the weights; lower the learning rate"
        )
    if norm > max_norm:
        torch._foreach_mul_(grads, max_norm / (norm + 1e-6))
    return norm
