"""Linear, embedding and norm with FP32 master weights and visible casts. Owns the rule "weights follow x's dtype".

Letters: D width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """Weights are kept in FP32 and cast where they are used, so gradients are summed in FP32."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def sigmoid(x: Tensor, *, invariant: bool) -> Tensor:
    """In FP32. torch's own is faster, but on a CPU the last elements of a tensor take another path than the others:
    their last bit depends on how many there are. Its exp has no such end. (Not for training: no gradient at -100.)"""
    return 1 / (1 + (-x.float()).exp()) if invariant else x.float().sigmoid()


def silu(x: Tensor, *, invariant: bool) -> Tensor:
    """x * sigmoid(x), in x's dtype; as above."""
    return (x.float() / (1 + (-x.float()).exp())).to(x.dtype) if invariant else F.silu(x)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in FP32 whatever x is."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)
