"""What a checkpoint is and whether it would load, from its headers alone, or from the names in an index alone.

Owns the counting; reads no weights, of FP8 checkpoints the scales. What it says of memory is what the weights take
once they are loaded; loading itself takes one tensor more.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from abyssal.checkpoint.compressed_tensors import official_names
from abyssal.checkpoint.convert import model_type
from abyssal.checkpoint.faults import told
from abyssal.checkpoint.fp8_blocks import SCALE, may_be_fp8
from abyssal.checkpoint.hf_directory import HfDirectory, read_config, read_hf_config, without_absent_mtp
from abyssal.checkpoint.load import allowed_tensors, meta_model, tensor_faults
from abyssal.checkpoint.quantization_config import read_quantization
from abyssal.checkpoint.shard_index import read_index
from abyssal.checkpoint.source import Source
from abyssal.checkpoint.tensor_info import TensorInfo
from abyssal.checkpoint.tensor_names import IN_FEW_BITS, common_group, official_views
from abyssal.kernels.quantize import BLOCK, QuantFormat
from abyssal.kernels.quantized_matmul import KERNEL_GROUPS, KERNEL_ROWS
from abyssal.model.config import ModelConfig
from abyssal.model.transformer import Transformer, count_mtp_parameters, count_parameters

KEPT_AS_NUMBERS = "kv_b_proj.weight"  # see model/quantized.py


@dataclass(frozen=True, kw_only=True)
class Survey:
    """`stored` is the format's name of a number type -> numbers of that type, copies included."""

    path: Path
    kind: str
    config: ModelConfig
    n_parameters: int
    n_active: int
    n_mtp: int
    stored: Mapping[str, int]
    n_tensors: int
    n_files: int
    n_bytes: int | None  # None: nobody has seen the files
    memory: Mapping[str, int]  # how weights are kept -> bytes
    faults: Mapping[str, list[str]]
    names_only: bool = False  # an index has neither shapes nor types

    @property
    def verdict(self) -> str:
        """What keeps it from loading, in one line, or nothing."""
        return told(self.faults)


def survey(source: Source) -> Survey:
    """Of an opened checkpoint; a ValueError where a scale is no positive number."""
    if isinstance(source, HfDirectory):
        source.check_scales()
    files = source.files if isinstance(source, HfDirectory) else [source.path]
    stored: Counter[str] = Counter()
    for info in source.tensors.values():
        stored[info.stored] += math.prod(info.shape)
    model = meta_model(source.config, len(source.tensors), path=source.path, dtype=torch.bfloat16)
    views = official_views(model)
    return Survey(
        path=source.path,
        kind=source.hf["model_type"] if isinstance(source, HfDirectory) else model_type(source.config),
        config=source.config,
        **_sizes(model, views),
        stored=stored,
        n_tensors=len(source.tensors),
        n_files=len(files),
        n_bytes=sum(file.stat().st_size for file in files),
        faults=tensor_faults(source.config, source.tensors, _shapes(views)),
    )


def survey_index(index: Path) -> Survey:
    """Of an index with config.json beside it, whether or not there are any weights: by names alone."""
    hf = read_hf_config(index.parent)
    weight_map = read_index(index)
    format = read_quantization(hf)
    scales = {name for name in weight_map if format == "fp8" and name.endswith(f".weight{SCALE}")}
    names = official_names(weight_map.keys(), format) - scales
    config = without_absent_mtp(index.parent, read_config(index.parent), names)
    model = meta_model(config, len(names), path=index, dtype=torch.bfloat16)
    views = official_views(model)
    shapes = _shapes(views)
    allowed = allowed_tensors(config, shapes)
    found = {name: TensorInfo(allowed.get(name, ()), "") for name in sorted(names)}
    scaled = [scale.removesuffix(SCALE) for scale in scales]
    faults = tensor_faults(config, found, shapes) | {
        "scales without an FP8 weight": sorted(
            name + SCALE for name in scaled if name not in names or not may_be_fp8(name)
        )
    }
    in_fp8 = sum(math.prod(allowed[name]) for name in scaled if name in allowed)
    rest = sum(math.prod(info.shape) for info in found.values()) - in_fp8
    return Survey(
        path=index,
        kind=hf["model_type"],
        config=config,
        **_sizes(model, views),
        stored={"FP8 by their scales": in_fp8, "other": rest} if scales else {},
        n_tensors=len(found),
        n_files=len(set(weight_map.values())),
        n_bytes=None,
        faults=faults,
        names_only=True,
    )


def _shapes(views: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(view.shape) for name, view in views.items()}


def _sizes(model: Transformer, views: Mapping[str, Tensor]) -> dict[str, Any]:
    """Counts, and the bytes that the weights take in each way to keep them. Casts the model, which has no numbers."""
    n_parameters, n_active = count_parameters(model)
    n_mtp = count_mtp_parameters(model)
    cast = official_views(model.cast_weights())
    memory = {
        "FP32 masters": sum(view.nbytes for view in views.values()),
        "BF16": sum(view.nbytes for view in cast.values()),
    }
    for format in get_args(QuantFormat):
        group = common_group(cast, format)
        memory[format] = sum(few_bytes(name, view, format, group) for name, view in cast.items())
    return dict(n_parameters=n_parameters, n_active=n_active, n_mtp=n_mtp, memory=memory)


def few_bytes(name: str, view: Tensor, format: QuantFormat, group: int) -> int:
    """Bytes of a tensor in a model whose weights are kept in few bits: codes and scales, or numbers as they are."""
    if not IN_FEW_BITS.search(name) or name.endswith(KEPT_AS_NUMBERS):
        return view.nbytes
    rows, columns = view.shape
    if format == "fp8":
        return view.numel() + 4 * math.ceil(rows / BLOCK) * math.ceil(columns / BLOCK)
    n_groups = rows * math.ceil(columns / group)
    if format == "int8":
        return view.numel() + 2 * n_groups
    in_kernel = group in KERNEL_GROUPS and columns % group == 0 and rows % KERNEL_ROWS == 0
    return rows * math.ceil(columns / 2) + (4 if in_kernel else 2) * n_groups  # the kernel wants a zero with each scale
