"""Weights in few bits: how they are rounded, what they are stored as, how the numbers come back. (DeepSeek-V3 3.3)

A quantised matrix is a tensor of small codes and a scale for each block or group of them; number = code x scale. Scales
come from the largest magnitude of their block, the codes are the nearest ones. Owns no choice of what is quantised.
Letters: O rows out, I columns in, R rows of blocks, G groups or blocks of columns, K columns of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

QuantFormat = Literal["fp8", "int8", "int4"]
ScaleFormat = Literal["fp32", "ue8m0"]
BLOCK = 128  # rows and columns of an FP8 block, columns of an integer group
GROUPS = (128, 64, 32, 16)
# The code of the largest magnitude. For integers half a step beyond the highest: the largest is cut off by half a step,
# and all others are rounded more finely, which loses less.
LARGEST = {"fp8": 448.0, "int8": 127.5, "int4": 7.5}
# Scales that are tried, in units of the usual one, where it is known which columns matter.
TRIED = tuple(1.05 - step / 40 for step in range(13))
LEAST_AMAX = 1e-4  # as in DeepSeek's kernels: a block of zeros has a scale too


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A matrix (O, I) in few bits.

    fp8: `codes` (O, I) float8_e4m3fn, `scales` (ceil(O/128), ceil(I/128)) FP32: one for each block of 128 x 128.
    int8: `codes` (O, I) int8, `scales` (O, ceil(I/group)) FP32 or BF16.
    int4: `codes` (O, ceil(I/2)) uint8, two in a byte, the even column low, each code + 8; `scales` as for int8.
    """

    format: QuantFormat
    codes: Tensor
    scales: Tensor
    shape: tuple[int, int]
    group: int = BLOCK

    def to(self, device: torch.device) -> Quantized:
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device))


def group_of(format: QuantFormat, *columns: int) -> int:
    """Columns of a group, one size for matrices of so many columns, for readers of integer formats want one in a model:
    128, or the largest of 64, 32 and 16 that leaves no ragged group where any of them would. FP8 has blocks."""
    if format == "fp8":
        return BLOCK
    return min((next((g for g in GROUPS if n % g == 0), BLOCK) for n in columns), default=BLOCK)


def scale_shape(format: QuantFormat, shape: tuple[int, int], group: int) -> tuple[int, int]:
    rows, columns = shape
    return (-(-rows // BLOCK) if format == "fp8" else rows, -(-columns // group))


def quantize(
    weight_OI: Tensor,
    format: QuantFormat,
    *,
    group: int | None = None,
    importance_I: Tensor | None = None,
    scale_format: ScaleFormat = "fp32",
) -> Quantized:
    """The nearest codes. A ragged last block or group is filled up with zeros for its scale, which changes nothing.

    Integer scales are BF16 numbers, so that readers who keep them in BF16 see the same weights. With `importance_I` a
    group's scale is the one of those TRIED with the least sum of squared errors, each times its column's importance:
    what matters little may be cut off. `scale_format` is FP8's: "ue8m0" rounds its scales up to a power of two.
    """
    rows, columns = weight_OI.shape
    group = group or group_of(format, columns)
    padded_OI = F.pad(weight_OI.float(), (0, -columns % group, 0, -rows % BLOCK if format == "fp8" else 0))
    if format == "fp8":
        blocks_RBGK = padded_OI.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        scales_RG = scale_of(blocks_RBGK.abs().amax((1, 3)), format, scale_format)
        codes_RBGK = (blocks_RBGK / scales_RG[:, None, :, None]).to(torch.float8_e4m3fn)
        codes_OI = codes_RBGK.flatten(2).flatten(0, 1)[:rows, :columns].contiguous()
        return Quantized(format=format, codes=codes_OI, scales=scales_RG, shape=(rows, columns))
    groups_OGK = padded_OI.unflatten(1, (-1, group))
    scales_OG = scale_of(groups_OGK.abs().amax(-1), format)
    if importance_I is not None:
        importance_GK = F.pad(importance_I.float(), (0, -columns % group)).unflatten(0, (-1, group))
        scales_OG = _best_scales(groups_OGK, scales_OG, importance_GK, format)
    codes_OI = _integer_codes(groups_OGK, scales_OG, format).to(torch.int8).flatten(1)[:, :columns].contiguous()
    if format == "int4":
        codes_OI = pack_int4(codes_OI)
    return Quantized(format=format, codes=codes_OI, scales=scales_OG, shape=(rows, columns), group=group)


def _integer_codes(groups_OGK: Tensor, scales_OG: Tensor, format: QuantFormat) -> Tensor:
    return (groups_OGK / scales_OG[..., None].float()).round_().clamp_(*code_range(format))


def _best_scales(groups_OGK: Tensor, usual_OG: Tensor, importance_GK: Tensor, format: QuantFormat) -> Tensor:
    least_OG = torch.full(usual_OG.shape, float("inf"), dtype=torch.float64, device=usual_OG.device)
    best_OG = usual_OG
    for factor in TRIED:
        scales_OG = (usual_OG.float() * factor).to(usual_OG.dtype)
        error_OGK = _integer_codes(groups_OGK, scales_OG, format).mul_(scales_OG[..., None].float()).sub_(groups_OGK)
        error_OG = (error_OGK.square_() * importance_GK).sum(-1, dtype=torch.float64)
        best_OG = torch.where(error_OG < least_OG, scales_OG, best_OG)
        least_OG = torch.minimum(error_OG, least_OG)
    return best_OG


def code_range(format: QuantFormat) -> tuple[float, float]:
    """Lowest and highest integer."""
    return -LARGEST[format] - 0.5, LARGEST[format] - 0.5


def scale_of(amax: Tensor, format: QuantFormat, scale_format: ScaleFormat = "fp32") -> Tensor:
    """The scale at which the largest magnitude has the largest code."""
    scale = amax.clamp(min=LEAST_AMAX) / LARGEST[format]
    if format != "fp8":
        return scale.bfloat16()
    if scale_format == "fp32":
        return scale
    mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1): a power of two has exactly 0.5
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())


def are_powers_of_two(scales: Tensor) -> bool:
    return bool((torch.frexp(scales.float()).mantissa == 0.5).all())


def quantize_ref(
    weight_OI: Tensor,
    format: QuantFormat,
    *,
    group: int | None = None,
    importance_I: Tensor | None = None,
    scale_format: ScaleFormat = "fp32",
) -> Quantized:
    """The same, block by block."""
    rows, columns = weight_OI.shape
    group = group or group_of(format, columns)
    high, wide = (BLOCK, BLOCK) if format == "fp8" else (1, group)
    codes_OI = torch.empty(rows, columns, dtype=torch.float8_e4m3fn if format == "fp8" else torch.int8)
    scale_type = torch.float32 if format == "fp8" else torch.bfloat16
    scales = torch.empty(-(-rows // high), -(-columns // wide), dtype=scale_type)
    for r, g in ((r, g) for r in range(scales.shape[0]) for g in range(scales.shape[1])):
        here = (slice(r * high, (r + 1) * high), slice(g * wide, (g + 1) * wide))
        block = weight_OI[here].float()
        scales[r, g] = scale = block.abs().max().clamp(min=LEAST_AMAX) / LARGEST[format]
        if scale_format == "ue8m0":
            scales[r, g] = 2.0 ** next(e for e in range(-126, 128) if 2.0**e >= float(scale))
        if format == "fp8":
            codes_OI[here] = (block / scales[r, g]).to(codes_OI.dtype)
            continue
        tried = [scales[r, g]] if importance_I is None else [(scales[r, g].float() * f).bfloat16() for f in TRIED]
        codes = [(block / t.float()).round().clamp(*code_range(format)) for t in tried]
        weighed = torch.ones(columns) if importance_I is None else importance_I.float()
        errors = [
            float(((c * t.float() - block).square() * weighed[here[1]]).sum(dtype=torch.float64))
            for c, t in zip(codes, tried, strict=True)
        ]
        best = errors.index(min(errors))
        codes_OI[here], scales[r, g] = codes[best].to(torch.int8), tried[best]
    if format == "int4":
        codes_OI = pack_int4(codes_OI)
    return Quantized(format=format, codes=codes_OI, scales=scales, shape=(rows, columns), group=group)


def pack_int4(codes_OI: Tensor) -> Tensor:
    """(O, I) int8 of -8..7 -> (O, ceil(I/2)) uint8; an odd last column has an empty neighbour."""
    even = F.pad(codes_OI, (0, codes_OI.shape[1] % 2)).view(codes_OI.shape[0], -1, 2).to(torch.uint8) + 8 & 15
    return even[..., 0] | even[..., 1] << 4


def unpack_int4(codes_OX: Tensor, columns: int) -> Tensor:
    """(O, ceil(I/2)) uint8 -> (O, I) int8."""
    return torch.stack((codes_OX & 15, codes_OX >> 4), dim=-1).flatten(1)[:, :columns].to(torch.int8) - 8


def dequantize(weight: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """(O, I) numbers, computed in FP32 and rounded once."""
    rows, columns = weight.shape
    scales_OG = weight.scales.float()
    if weight.format == "fp8":
        half_OI = None if weight.codes.is_cuda else _e4m3_as_half(weight.codes)
        if half_OI is None:
            return dequantize_ref(weight, dtype)
        numbers_OI, scales_OG = half_OI.float(), (scales_OG * 256).repeat_interleave(BLOCK, 0)[:rows]
    else:
        codes_OI = _nibbles(weight.codes)[:, :columns] if weight.format == "int4" else weight.codes
        numbers_OI = codes_OI.float()
    whole = columns // weight.group * weight.group
    numbers_OI[:, :whole].unflatten(1, (-1, weight.group)).mul_(scales_OG[:, : whole // weight.group, None])
    if whole < columns:
        numbers_OI[:, whole:].mul_(scales_OG[:, -1:])
    return numbers_OI.to(dtype)


def _e4m3_as_half(codes: Tensor) -> Tensor | None:
    """Each number / 256 in FP16, exactly: S EEEE MMM -> S 0EEEE MMM0000000. None when one of them is NaN.

    torch casts FP8 on a CPU one by one, which takes five times as long.
    """
    bits = codes.view(torch.int8).to(torch.int16)
    magnitude = bits & 0x7F
    if int(magnitude.max()) == 0x7F:
        return None
    return magnitude.bitwise_left_shift_(7).bitwise_or_(bits & -0x8000).view(torch.float16)


def _nibbles(codes_OX: Tensor) -> Tensor:
    """As unpack_int4 for even columns: both nibbles of a byte are spread over 16 bits at once (little-endian)."""
    pairs = codes_OX.to(torch.int16)
    return pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(torch.int8).sub_(8)


def dequantize_ref(weight: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same, every scale written out beside its code."""
    rows, columns = weight.shape
    if weight.format == "fp8":
        scales_OI = weight.scales.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        return (weight.codes.float() * scales_OI).to(dtype)
    codes_OI = unpack_int4(weight.codes, columns) if weight.format == "int4" else weight.codes
    scales_OI = weight.scales.float().repeat_interleave(weight.group, 1)[:, :columns]
    return (codes_OI.float() * scales_OI).to(dtype)
