"""Loading: a checkpoint of any format into a Transformer, every tensor accounted for before a byte of it is read."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, cast

import torch

from abyssal.checkpoint.atomic import find_directory
from abyssal.checkpoint.hf_directory import read_config
from abyssal.checkpoint.source import Source, open_checkpoint
from abyssal.checkpoint.tensor_names import DERIVED, official_views, shared_copies
from abyssal.machine import Precision, compute_dtype, resolve_device
from abyssal.model.config import DTYPES, ModelConfig
from abyssal.model.rope import rope_frequencies
from abyssal.model.transformer import Transformer
from abyssal.tokens.tokenizer import Tokenizer


class Loaded(NamedTuple):
    model: Transformer
    tokenizer: Tokenizer | None
    config: ModelConfig


def load_checkpoint(
    path: str | Path, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> Loaded:
    """The model (FP32 masters, computing in `dtype`), its tokenizer if there is one, and its config.

    `dtype="auto"` is BF16 where the hardware multiplies it, else FP32.
    """
    target = resolve_device(device)
    computes_in = _dtype(dtype, target)
    source = open_checkpoint(path)
    with torch.device("meta"):  # no random start, no memory before everything fits
        model = Transformer(source.config, dtype=computes_in)
    check_tensors(source, {name: tuple(view.shape) for name, view in official_views(model).items()})
    model.to_empty(device=target)
    model.rope_frequencies.copy_(rope_frequencies(source.config))
    _read_weights(source, model)
    return Loaded(model, source.tokenizer(), source.config)


def load_config(directory: str | Path) -> ModelConfig:
    """The config alone, or the error that loading would end in."""
    return read_config(find_directory(Path(directory)))


def check_tensors(source: Source, wanted: dict[str, tuple[int, ...]]) -> None:
    """Every tensor accounted for, before a byte of them is read."""
    found = {name: info.shape for name, info in source.tensors.items()}
    optional = {copy: wanted[main] for copy, main in _copies_on_disk(source.config).items()}
    allowed = optional | wanted
    faults = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in allowed and not DERIVED.search(name)],
        "of wrong shape": [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in allowed.items()
            if name in found and found[name] != shape
        ],
    }
    said = [
        f"{len(names)} {fault} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for fault, names in faults.items()
        if names
    ]
    if said:
        raise ValueError(f"{source.path}: the tensors do not fit config.json: {'; '.join(said)}")


def _copies_on_disk(config: ModelConfig) -> dict[str, str]:
    """Copies that may stand in a file and must then equal the original."""
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
    return shared_copies(config) | tied


@torch.no_grad()
def _read_weights(source: Source, model: Transformer) -> None:
    views = official_views(model)
    copies = _copies_on_disk(model.config)
    for name in source.tensors:
        if name in views:
            views[name].copy_(source.read(name))
    for name in copies.keys() & source.tensors.keys():
        if not torch.equal(source.read(name).float(), views[copies[name]].cpu()):
            raise ValueError(f"{source.path}: {name} differs from {copies[name]}, of which it must be a copy")


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in ("auto", *DTYPES):
        raise ValueError(f"dtype={name!r} is not supported for compute; use auto, {' or '.join(DTYPES)}")
    return compute_dtype(cast(Precision, name), device)
