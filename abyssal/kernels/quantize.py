"""Weights in few bits: what they are stored as, and how the numbers come back. (DeepSeek-V3 section 3.3.2)

A quantised matrix is a tensor of small codes and a scale for each block or group of them; number = code x scale.
Letters: O rows out, I columns in, G groups of columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

QuantFormat = Literal["fp8", "int8", "int4"]
BLOCK = 128  # rows and columns of an FP8 block, columns of an integer group


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A matrix (O, I) in few bits.

    fp8: `codes` (O, I) float8_e4m3fn, `scales` (ceil(O/128), ceil(I/128)) FP32: one for each block of 128 x 128.
    int8: `codes` (O, I) int8, `scales` (O, ceil(I/group)) FP32.
    int4: `codes` (O, ceil(I/2)) uint8, two in a byte, the even column low, each code + 8; `scales` as for int8.
    """

    format: QuantFormat
    codes: Tensor
    scales: Tensor
    shape: tuple[int, int]
    group: int = BLOCK


def dequantize_ref(weight: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """(O, I) numbers, computed in FP32 and rounded once."""
    rows, columns = weight.shape
    if weight.format == "fp8":
        scales_OI = weight.scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        return (weight.codes.float() * scales_OI).to(dtype)
    codes_OI = weight.codes
    if weight.format == "int4":
        codes_OI = torch.stack((codes_OI & 15, codes_OI >> 4), dim=-1).flatten(1)[:, :columns].to(torch.int8) - 8
    scales_OI = weight.scales.repeat_interleave(weight.group, 1)[:, :columns]
    return (codes_OI.float() * scales_OI).to(dtype)
