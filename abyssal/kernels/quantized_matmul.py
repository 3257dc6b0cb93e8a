"""Rows times a matrix in few bits. Owns which matrices torch's int4 kernel takes, and in what order it wants them.

The kernel reads half a byte a weight where BF16 reads two, so that one row at a time costs no more than in BF16; it
multiplies in FP32. What it doesn't take is written out as numbers first, which is slower than never having had codes.
Letters: N rows, O columns out, I columns in, G groups of columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.kernels.quantize import Quantized, dequantize, dequantize_ref, unpack_int4

KERNEL_GROUPS = (32, 64, 128, 256)
KERNEL_ROWS = 16  # the matrix comes in multiples of these


class PackedInt4(NamedTuple):
    """A matrix as the kernel wants it: codes in an order of its own, (O, I/2) uint8; scale and zero, (G, O, 2) BF16."""

    codes: Tensor
    scales: Tensor
    group: int


def packs_for_kernel(weight: Quantized, *, dtype: torch.dtype) -> bool:
    """Whether `matmul_packed` is for this matrix and rows of this type. In FP32 it is slower than anything else."""
    rows, columns = weight.shape
    return (
        weight.format == "int4"
        and dtype == torch.bfloat16
        and weight.codes.device.type == "cpu"
        and weight.group in KERNEL_GROUPS
        and columns % weight.group == 0
        and rows % KERNEL_ROWS == 0
    )


def pack_for_kernel(weight: Quantized) -> PackedInt4:
    codes_OI = unpack_int4(weight.codes, weight.shape[1]).to(torch.int32) + 8
    scales_GO = weight.scales.to(torch.bfloat16).T
    scales_GO2 = torch.stack((scales_GO, torch.zeros_like(scales_GO)), dim=-1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI, 1)
    return PackedInt4(packed, scales_GO2.contiguous(), weight.group)


def matmul_packed(x_NI: Tensor, weight: PackedInt4) -> Tensor:
    """(N, I) BF16 -> (N, O): products of BF16 with unrounded weights, summed in FP32 and rounded once."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x_NI.contiguous(), weight.codes, weight.group, weight.scales)


def matmul_packed_ref(x_NI: Tensor, weight: Quantized) -> Tensor:
    """The same from the codes themselves."""
    return F.linear(x_NI.float(), dequantize_ref(weight)).to(x_NI.dtype)


def matmul_quantized(x_NI: Tensor, weight: Quantized) -> Tensor:
    """(N, I) -> (N, O) for any format and type: the numbers, rounded to x's type, then an ordinary product."""
    return F.linear(x_NI, dequantize(weight, x_NI.dtype))
