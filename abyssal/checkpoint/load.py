"""Loading: a checkpoint of any format into a Transformer, every tensor accounted for before a byte of it is read.

Tensors come one by one, in the order in which they lie on disk, each into its place: the memory that loading takes is
the model's and, where the type changes on the way, that of one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from abyssal.checkpoint.atomic import find_directory
from abyssal.checkpoint.faults import told
from abyssal.checkpoint.fp8_blocks import FP8
from abyssal.checkpoint.hf_directory import read_config
from abyssal.checkpoint.safetensors_header import REAL_TYPES, TORCH_TYPES
from abyssal.checkpoint.source import Source, gguf_at, open_checkpoint
from abyssal.checkpoint.strict_json import one_line
from abyssal.checkpoint.tensor_info import TensorInfo
from abyssal.checkpoint.tensor_names import (
    DERIVED,
    IN_FEW_BITS,
    common_group,
    official_slots,
    official_views,
    plain_views,
    shared_copies,
)
from abyssal.kernels.quantize import (
    QuantFormat,
    Quantized,
    ScaleFormat,
    are_powers_of_two,
    dequantize,
    quantize,
)
from abyssal.machine import Precision, compute_dtype, resolve_device
from abyssal.model.config import DTYPES, ModelConfig
from abyssal.model.quantized import quantize_layers
from abyssal.model.rope import rope_frequencies
from abyssal.model.transformer import Transformer
from abyssal.tokens.tokenizer import Tokenizer

ROWS = 8192  # of a table compared at a time
REMEDY = "copy config.json and weights again, both of one checkpoint"

Weights = Literal["master", "compute", "fp8", "int8", "int4"]
OnBytes = Callable[[int, int], None]  # bytes done, bytes in all
FORMATS: dict[str, QuantFormat] = {"fp8": "fp8", "int8": "int8", "int4": "int4"}


class Loaded(NamedTuple):
    model: Transformer
    tokenizer: Tokenizer | None
    config: ModelConfig


def load_checkpoint(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    weights: Weights = "master",
    on_bytes: OnBytes | None = None,
) -> Loaded:
    """The model, computing in `dtype`, its tokenizer if there is one, and its config.

    `dtype="auto"` is BF16 where the hardware multiplies it, else FP32. `weights`: FP32 masters, to train on, or already
    cast to the compute type, to generate with, which a BF16 checkpoint needs no more memory for than it has bytes; or
    rounded to fp8, int8 or int4 as they come, those that are stored so as they are. `on_bytes` is told how far reading
    is.
    """
    target, format = resolve_device(device), FORMATS.get(weights)
    if dtype == "auto" and format == "int4" and target.type == "cpu":
        dtype = "bfloat16"  # the int4 kernel's type, also where other products are slow in it
    computes_in = _dtype(dtype, target)
    source = open_checkpoint(path)
    model = meta_model(source.config, len(source.tensors), path=source.path, dtype=computes_in)
    if weights != "master":
        model.cast_weights()
    check_tensors(source, {name: tuple(view.shape) for name, view in official_views(model).items()})
    if format is not None:
        quantize_layers(model, format)
    tokenizer = source.tokenizer()
    model.to_empty(device=target)
    model.rope_frequencies.copy_(rope_frequencies(source.config))
    _read_weights(source, model, format, on_bytes)
    return Loaded(model, tokenizer, source.config)


def load_config(path: str | Path) -> ModelConfig:
    """The config alone, or the error that loading would end in."""
    file = gguf_at(Path(path))
    return read_config(find_directory(Path(path))) if file is None else open_checkpoint(file).config


def meta_model(
    config: ModelConfig, n_tensors: int, *, path: Path, dtype: torch.dtype = torch.float32
) -> Transformer:
    """Shapes without memory, of a config that is no bigger than what its `n_tensors` can bear out."""
    for name in ("num_hidden_layers", "num_nextn_predict_layers", "n_routed_experts"):
        if (count := getattr(config, name)) > n_tensors:
            raise ValueError(
                f"{path}: the tensors do not fit config.json: it has {name}={count} and there are {n_tensors} tensors"
            )
    try:
        with torch.device("meta"):  # no random start, no memory before everything fits
            return Transformer(config, dtype=dtype)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"{path}: config.json describes no model that there could be ({one_line(error)})") from None


def check_tensors(source: Source, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor accounted for, before a byte of them is read."""
    if said := told(tensor_faults(source.config, source.tensors, wanted)):
        raise ValueError(f"{source.path}: the tensors do not fit config.json: {said}; {REMEDY}")


def tensor_faults(
    config: ModelConfig, found: Mapping[str, TensorInfo], wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, list[str]]:
    """Kind of fault -> the tensors that have it."""
    allowed = allowed_tensors(config, wanted)
    known = {name: info for name, info in found.items() if name in allowed}
    return {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in allowed and not DERIVED.search(name)],
        "of wrong shape": [
            f"{name} {info.shape} instead of {allowed[name]}"
            for name, info in known.items()
            if info.shape != allowed[name]
        ],
        "of a type that is no weight's": [
            f"{name} {info.stored} instead of {', '.join(REAL_TYPES)}"
            for name, info in known.items()
            if info.stored in TORCH_TYPES and info.stored not in (*REAL_TYPES, FP8)
        ],
    }


def allowed_tensors(config: ModelConfig, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What must be there and what may be: copies of others."""
    return {copy: wanted[main] for copy, main in _copies_on_disk(config).items()} | dict(wanted)


def _copies_on_disk(config: ModelConfig) -> dict[str, str]:
    """Copies that may stand in a file and must then equal the original."""
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
    return shared_copies(config) | tied


@torch.no_grad()
def _read_weights(source: Source, model: Transformer, format: QuantFormat | None, on_bytes: OnBytes | None) -> None:
    views, slots, device = plain_views(model), official_slots(model), model.embed_tokens.weight.device
    copies = {name: main for name, main in _copies_on_disk(model.config).items() if name in source.tensors}
    sizes = {name: view.nbytes for name, view in views.items()} | {name: slot.n_bytes for name, slot in slots.items()}
    n_done, n_all = 0, sum(sizes.values()) + sum(sizes[main] for main in copies.values())
    group = 0 if format is None else common_group(source.tensors, format)
    later = []  # a copy may lie before its original
    for name in source.tensors:
        if name in copies:
            later.append(name)
        elif name in sizes:
            if format is None or not IN_FEW_BITS.search(name):
                source.read_into(name, views[name])
            elif name in slots:
                slots[name].put(read_rounded(source, name, format, group=group).to(device))
            else:
                views[name].copy_(dequantize(read_rounded(source, name, format, group=group), model.dtype))
            n_done += sizes[name]
            if on_bytes is not None:
                on_bytes(n_done, n_all)
    for name in later:
        original = views[copies[name]]
        if not _equal(source.read(name), original):
            raise ValueError(f"{source.path}: {name} differs from {copies[name]}, of which it must be a copy")
        n_done += original.nbytes
        if on_bytes is not None:
            on_bytes(n_done, n_all)


def read_rounded(
    source: Source, name: str, format: QuantFormat, *, group: int, scale_format: ScaleFormat = "fp32"
) -> Quantized:
    """A matrix in few bits: as it is stored, or rounded here."""
    stored = source.read_quantized(name)
    if stored is not None and stored.format == format and (scale_format == "fp32" or are_powers_of_two(stored.scales)):
        return stored
    return quantize(source.read(name), format, group=group, scale_format=scale_format)


def _equal(stored: Tensor, original: Tensor) -> bool:
    """In the type of the original, some rows at a time."""
    pairs = zip(stored.split(ROWS), original.split(ROWS), strict=True)
    return all(torch.equal(a.to(b.dtype), b.cpu()) for a, b in pairs)


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in ("auto", *DTYPES):
        raise ValueError(f"dtype={name!r} is not supported for compute; use auto, {' or '.join(DTYPES)}")
    return compute_dtype(cast(Precision, name), device)
