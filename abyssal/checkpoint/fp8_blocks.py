"""FP8 weights as DeepSeek publishes them: codes beside one scale for each block of 128 x 128. (V3 section 3.3)

`<linear>.weight` is F8_E4M3 and `<linear>.weight_scale_inv` FP32, or powers of two alone (F8_E8M0); whatever the name
says, number = code x scale. Every projection may be FP8; embedding, head, norms and router may not.
Letters: O rows out, I columns in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from abyssal.checkpoint.faults import told
from abyssal.checkpoint.safetensors_header import StoredTensor, read_tensor
from abyssal.kernels.quantize import BLOCK, Quantized, dequantize

FP8, SCALE = "F8_E4M3", "_scale_inv"
SCALE_TYPES = ("F32", "BF16", "F8_E8M0")
PROJECTION = re.compile(r"_proj(_with_mqa)?\.weight$")
BAND = 4 * BLOCK  # rows dequantised at a time: FP32 numbers of a whole matrix would be four times its codes
MOST_CODE = torch.finfo(torch.float8_e4m3fn).max


def pair_scales(path: Path, stored: Mapping[str, StoredTensor], *, expected: bool) -> dict[str, str]:
    """FP8 weight -> its scale, or a ValueError that lists every weight and scale that do not fit.

    `expected`: whether config.json speaks of FP8; without that word no reader would look for scales.
    """
    weights = {name: place for name, place in stored.items() if place.stored == FP8}
    if not expected:
        if weights:
            said = told({"FP8 weights, but config.json has no quantization_config": list(weights)})
            raise ValueError(f"{path}: {said}; copy config.json again")
        return {}
    scales = {name: place for name, place in stored.items() if name.endswith(f".weight{SCALE}")}
    pairs = {name: name + SCALE for name in weights if name + SCALE in scales}
    faults = {
        "FP8 weights where none is allowed": [
            name for name, place in weights.items() if not may_be_fp8(name) or len(place.shape) != 2
        ],
        "FP8 weights without a scale": [name for name in weights if name not in pairs],
        "scales without an FP8 weight": [name for name in scales if name.removesuffix(SCALE) not in weights],
        "scales of wrong shape": [
            f"{scale} {scales[scale].shape} instead of {blocks(weights[name].shape)}"
            for name, scale in pairs.items()
            if scales[scale].shape != blocks(weights[name].shape)
        ],
        "scales of wrong type": [
            f"{scale} {scales[scale].stored} instead of F32"
            for scale in pairs.values()
            if scales[scale].stored not in SCALE_TYPES
        ],
    }
    if said := told(faults):
        raise ValueError(f"{path}: {said}; copy the checkpoint again, or convert it to BF16 where it was made")
    return pairs


def may_be_fp8(name: str) -> bool:
    """Whether this weight is a projection's, and not embedding, head, norm or router."""
    return PROJECTION.search(name) is not None


def blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks along each axis; the last may be ragged: V3's kv_a_proj has 576 rows, four blocks and a half."""
    return tuple(-(-n // BLOCK) for n in shape)


def read_scales(place: StoredTensor, name: str) -> Tensor:
    """FP32 scales, every one of them a positive number."""
    scales_OI = read_tensor(place).float()
    good = (scales_OI > 0) & (scales_OI * MOST_CODE).isfinite()
    if not good.all():
        wrong = scales_OI[~good][0].item()
        raise ValueError(
            f"{place.file}: {name} has {int((~good).sum()):,} scales that are no positive number, the first {wrong:g}; "
            f"copy the checkpoint again, or convert it again where it was made"
        )
    return scales_OI


def read_blocks(weight: StoredTensor, scale: StoredTensor, name: str) -> Quantized:
    codes_OI, (rows, columns) = read_tensor(weight), weight.shape
    scales = read_scales(scale, name + SCALE)
    if n_nan := sum(int((band.view(torch.uint8) & 127 == 127).sum()) for band in codes_OI.split(BAND)):
        raise ValueError(f"{weight.file}: {name} has {n_nan:,} codes that are NaN; convert it again where it was made")
    return Quantized(format="fp8", codes=codes_OI, scales=scales, shape=(rows, columns))


def to_bfloat16(weight: Quantized) -> Tensor:
    """(O, I) BF16 of any format, computed in FP32 and rounded once, some rows at a time."""
    rows, columns = weight.shape
    high = BLOCK if weight.format == "fp8" else 1  # rows that share a scale
    out_OI = torch.empty(weight.shape, dtype=torch.bfloat16)
    for start in range(0, rows, BAND):
        codes = weight.codes[start : start + BAND]
        scales = weight.scales[start // high : (start + BAND) // high]
        band = replace(weight, codes=codes, scales=scales, shape=(len(codes), columns))
        out_OI[start : start + BAND] = dequantize(band, torch.bfloat16)
    return out_OI
