"""Grouped matmul: rows sorted by expert, one weight matrix per expert. Owns no weights.

Letters: N rows, D in, F out, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_matmul(x_ND: Tensor, weight_EFD: Tensor, ends_E: Tensor, *, even: bool = False) -> Tensor:
    """(N, D) -> (N, F): rows ends[e-1]:ends[e] times weight[e]^T. Empty groups are fine.
    `even` says that all groups have the same length.

    torch's kernel wants rows of a multiple of 16 bytes and, on CUDA, BF16; anything else takes the plain form.
    """
    if even:
        n_experts, width, _ = weight_EFD.shape
        return torch.bmm(x_ND.unflatten(0, (n_experts, -1)), weight_EFD.transpose(1, 2)).view(-1, width)
    aligned = all(width * x_ND.element_size() % 16 == 0 for width in weight_EFD.shape[1:])
    if not aligned or (x_ND.is_cuda and x_ND.dtype != torch.bfloat16):
        return grouped_matmul_ref(x_ND, weight_EFD, ends_E)
    return F.grouped_mm(x_ND, weight_EFD.transpose(1, 2), offs=ends_E)


def grouped_matmul_ref(x_ND: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """The same as one matmul per expert."""
    starts = [0, *ends_E.tolist()]
    parts = [x_ND[start:end] @ weight.T for start, end, weight in zip(starts, starts[1:], weight_EFD, strict=False)]
    return torch.cat(parts)
