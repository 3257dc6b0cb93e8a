"""int8 and int4 weights as compressed-tensors packs them ("pack-quantized"), which transformers and vLLM load.

`<linear>.weight` is three tensors: `weight_packed`, codes side by side in int32, the first in the lowest bits, each
with half its range added; `weight_scale`, BF16, one for each row and group of columns; `weight_shape`, int64. Read are
symmetric weights of 8 or 4 bits in groups or one scale a row, the same bits in the whole checkpoint.
Letters: O rows out, I columns in, P packed columns, G groups of columns.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.checkpoint.faults import told
from abyssal.checkpoint.safetensors_header import StoredTensor, damaged, read_tensor
from abyssal.checkpoint.strict_json import shown
from abyssal.kernels.quantize import QuantFormat, Quantized

METHOD = "compressed-tensors"
PARTS = PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"  # after "<linear>.weight"
BITS: dict[QuantFormat, int] = {"int8": 8, "int4": 4}
FORMAT_OF: dict[int, QuantFormat] = {8: "int8", 4: "int4"}
SCALE_TYPES = ("BF16", "F32", "F16")
NEVER = ("lm_head", r"re:.*\.mlp\.gate$", r"re:.*\.eh_proj$", r"re:.*\.shared_head\.head$")


@dataclass(frozen=True)
class PackedPlace:
    """Where the three tensors of one matrix lie."""

    packed: StoredTensor
    scale: StoredTensor
    shape_at: StoredTensor
    format: QuantFormat
    shape: tuple[int, int]


def pack(weight: Quantized) -> dict[str, Tensor]:
    """Suffix of the name -> tensor."""
    codes_OB = weight.codes  # a byte holds one int8 or two int4
    if weight.format == "int8":
        codes_OB = codes_OB.view(torch.uint8) ^ 128
    words_OP = F.pad(codes_OB, (0, -codes_OB.shape[1] % 4)).view(torch.int32)
    return {PACKED: words_OP, SCALE: weight.scales, SHAPE: torch.tensor(weight.shape, dtype=torch.int64)}


def packed_bytes(format: QuantFormat, shape: tuple[int, int], group: int) -> int:
    """What `pack` makes of a matrix of this shape."""
    rows, columns = shape
    words = -(-columns * BITS[format] // 32)
    return rows * (4 * words + 2 * (columns // group)) + 16


def packing_config(format: QuantFormat, group: int, kept: Iterable[str]) -> dict[str, Any]:
    """For config.json. `kept` are projections that are not in few bits."""
    weights = {"num_bits": BITS[format], "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    linears = {"targets": ["Linear"], "weights": weights | {"dynamic": False}}
    return {
        "quant_method": METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": linears | {"input_activations": None, "output_activations": None}},
        "ignore": [*NEVER, *sorted(name.removesuffix(".weight") for name in kept)],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def read_packing(given: Mapping[str, Any]) -> QuantFormat:
    """The format that a quantization_config of this method speaks of, or a ValueError naming what is not read."""

    def need(name: str, value: object, *known: object) -> None:
        if value not in known:
            raise ValueError(
                f"config.json: quantization_config has {name}={shown(value)}, which is not supported, only "
                f"{shown(known[0])} is; convert the weights to BF16 first"
            )

    need("format", given.get("format"), "pack-quantized")
    need("kv_cache_scheme", given.get("kv_cache_scheme"), None)
    groups = given.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError(f"config.json: quantization_config has config_groups={shown(groups)}; copy it again")
    found = set()
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise ValueError(f"config.json: quantization_config has a group {shown(group)}; copy it again")
        need("input_activations", group.get("input_activations"), None)
        need("output_activations", group.get("output_activations"), None)
        need("format", group.get("format"), "pack-quantized", None)
        need("type", weights.get("type"), "int")
        need("symmetric", weights.get("symmetric", True), True)
        need("strategy", weights.get("strategy"), "group", "channel")
        need("dynamic", weights.get("dynamic", False), False)
        need("num_bits", weights.get("num_bits"), 4, 8)
        found.add(weights["num_bits"])
    if len(found) > 1:
        raise ValueError("config.json: quantization_config mixes 4 and 8 bits; convert the weights to BF16 first")
    return FORMAT_OF[found.pop()]


def official_names(stored: Collection[str], format: QuantFormat | None) -> set[str]:
    """Names in files -> names of tensors: the three of a packed weight are one, all others stay as they are."""
    bases = {name.removesuffix(PACKED) for name in stored if name.endswith(f".weight{PACKED}") and format in BITS}
    whole = {base for base in bases if all(base + part in stored for part in PARTS)}
    return (set(stored) - {base + part for base in whole for part in PARTS}) | whole


def find_packed(path: Path, stored: Mapping[str, StoredTensor], format: QuantFormat | None) -> dict[str, PackedPlace]:
    """Official name -> its three tensors, or a ValueError that lists what does not fit together."""
    if format not in BITS:
        return {}
    bases = [name.removesuffix(PACKED) for name in stored if name.endswith(f".weight{PACKED}")]
    whole = [base for base in bases if base + SCALE in stored and base + SHAPE in stored]
    parts = {base + suffix for base in bases for suffix in PARTS}
    faults: dict[str, list[str]] = {
        "packed weights without a scale or a shape": [base for base in bases if base not in whole],
        "packed weights that are also there as numbers": [base for base in bases if base in stored],
        "scales, shapes or zero points without a symmetric packed weight": [
            name
            for name in stored
            if re.search(r"\.weight_(scale|shape|zero_point|g_idx|global_scale)$", name) and name not in parts
        ],
        "packed weights of a type or shape that does not fit": [],
    }
    places = {}
    for base in whole:
        packed, scale, shape_at = (stored[base + suffix] for suffix in PARTS)
        fits = (packed.stored, shape_at.stored, shape_at.shape) == ("I32", "I64", (2,)) and scale.stored in SCALE_TYPES
        fits = fits and len(packed.shape) == len(scale.shape) == 2 and packed.shape[0] == scale.shape[0]
        columns = packed.shape[-1] * 32 // BITS[format]
        if fits and columns and scale.shape[1] and columns % scale.shape[1] == 0:
            places[base] = PackedPlace(packed, scale, shape_at, format, (packed.shape[0], columns))
        else:
            faults["packed weights of a type or shape that does not fit"].append(base)
    if said := told(faults):
        raise ValueError(f"{path}: {said}; copy the checkpoint again, or convert it to BF16 where it was made")
    return places


def read_packed(place: PackedPlace) -> Quantized:
    rows, columns = place.shape
    if (said := tuple(read_tensor(place.shape_at).tolist())) != place.shape:
        raise damaged(place.shape_at.file, f"a weight of {rows} x {columns} has the shape {said}")
    codes_OB, scales_OG = read_tensor(place.packed).view(torch.uint8), read_tensor(place.scale)
    if not scales_OG.isfinite().all():
        raise ValueError(f"{place.scale.file}: a weight has scales that are no numbers; convert it again")
    codes = codes_OB if place.format == "int4" else (codes_OB ^ 128).view(torch.int8)
    group = columns // scales_OG.shape[1]
    return Quantized(format=place.format, codes=codes, scales=scales_OG, shape=place.shape, group=group)
