"""The checkpoint is a Hugging Face directory: written whole or not at all, read shard by shard, never through pickle.

Weights are BF16 on disk under the official names, the balance bias FP32; `trainer/` beside them is resume.py's.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from abyssal.checkpoint.atomic import find_directory, replace_directory
from abyssal.checkpoint.convert import config_from_hf, config_to_hf
from abyssal.checkpoint.resume import TrainerState, save_trainer
from abyssal.checkpoint.tensor_names import DERIVED, keeps_fp32, mtp_prefix, official_views, shared_copies
from abyssal.machine import resolve_device
from abyssal.model.config import DTYPES, ModelConfig
from abyssal.model.rope import rope_frequencies
from abyssal.model.transformer import Transformer
from abyssal.tokens.tokenizer import Tokenizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Loaded(NamedTuple):
    model: Transformer
    tokenizer: Tokenizer | None
    config: ModelConfig


def save_checkpoint(
    directory: str | Path,
    model: Transformer,
    tokenizer: Tokenizer | None,
    *,
    generation: dict[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    trainer: TrainerState | None = None,
) -> None:
    """Write weights, configs, tokenizer and, for a run that may resume, `trainer/`; the old one stays until then."""
    path = Path(directory)
    if path.exists() and not (path / "config.json").is_file() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is no checkpoint; name another folder or remove it")
    ids = {} if tokenizer is None else {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    try:
        with replace_directory(path) as new:
            _write_json(new / "config.json", config_to_hf(model.config, **ids))
            _write_weights(new, model, max_shard_bytes=max_shard_bytes)
            if tokenizer is not None:
                tokenizer.save(new, model_max_length=model.config.max_position_embeddings)
            if generation is not None:
                defaults = ids if tokenizer is None else ids | {"pad_token_id": tokenizer.pad_id}
                _write_json(new / "generation_config.json", defaults | generation)
            if trainer is not None:
                save_trainer(new, model=model, optimizers=trainer.optimizers, state=trainer.state)
    except (OSError, SafetensorError, CheckpointException) as error:
        raise OSError(
            f"could not write {path}: {_reason(error)}; free some disk space and run again, the previous "
            f"checkpoint is untouched"
        ) from error


def load_checkpoint(
    directory: str | Path, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> Loaded:
    """The model (FP32 masters, computing in `dtype`), its tokenizer if the directory has one, and its config."""
    compute_dtype, target = _dtype(dtype), resolve_device(device)
    path = find_directory(Path(directory))
    config = _read_config(path)
    files = _weight_files(path)
    shapes = _read_shapes(files)
    config = _without_absent_mtp(path, config, shapes)
    with torch.device("meta"):  # no random start, no memory before everything fits
        model = Transformer(config, dtype=compute_dtype)
    _check_tensors(path, config, {name: tuple(view.shape) for name, view in official_views(model).items()}, shapes)
    model.to_empty(device=target)
    model.rope_frequencies.copy_(rope_frequencies(config))
    _read_weights(path, files, model)
    tokenizer = Tokenizer.load(path) if (path / "tokenizer.json").is_file() else None
    return Loaded(model, tokenizer, config)


def load_config(directory: str | Path) -> ModelConfig:
    """The config alone, or the error that loading would end in."""
    return _read_config(find_directory(Path(directory)))


def _write_weights(path: Path, model: Transformer, *, max_shard_bytes: int) -> None:
    """BF16 safetensors; an index when there is more than one."""
    views = official_views(model)
    views |= {copy: views[main] for copy, main in shared_copies(model.config).items()}
    sizes = {name: view.numel() * (4 if keeps_fp32(name) else 2) for name, view in views.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _on_disk(name, views[name]) for name in names}
        save_file(tensors, path / file, metadata={"format": "pt"})
        shutil.copymode(path / "config.json", path / file)  # safetensors makes files that only their owner may read
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        _write_json(path / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def _on_disk(name: str, view: Tensor) -> Tensor:
    """An own copy: safetensors refuses tensors that share memory."""
    dtype = torch.float32 if keeps_fp32(name) else torch.bfloat16
    return view.to("cpu", dtype, copy=True).contiguous()


def _read_config(path: Path) -> ModelConfig:
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not there: name the directory of a checkpoint")
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no config.json: name the directory of a checkpoint")
    try:
        hf = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); copy it again") from None
    if not isinstance(hf, dict):
        raise ValueError(f"{file} holds no JSON object; copy it again")
    return config_from_hf(hf)


def _weight_files(path: Path) -> list[Path]:
    index = path / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise ValueError(f"{index} is damaged; copy it again") from None
    else:
        names = [SINGLE]
    for name in names:
        if Path(name).name != name:  # an index from elsewhere must not reach outside its directory
            raise ValueError(f"{index} points at {name!r} outside its directory; copy the checkpoint again")
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name} is missing: copy it again, or go back to an earlier checkpoint")
    return [path / name for name in names]


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            yield handle
    except SafetensorError as error:
        raise OSError(
            f"{file} is truncated or damaged ({_reason(error)}): copy that file again, or go back to an "
            f"earlier checkpoint"
        ) from None


def _read_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """From the headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with _open(file) as handle:
            for name in handle.keys():
                if name in shapes:
                    raise ValueError(f"{file} repeats {name!r} of another shard; copy the checkpoint again")
                shapes[name] = tuple(handle.get_slice(name).get_shape())
    return shapes


def _without_absent_mtp(path: Path, config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> ModelConfig:
    """transformers drops MTP weights when it saves but keeps their count; said aloud, because drafting needs them."""
    n_mtp = config.num_nextn_predict_layers
    prefixes = tuple(mtp_prefix(config, k) for k in range(n_mtp))
    if not n_mtp or any(name.startswith(prefixes) for name in shapes):
        return config
    warnings.warn(
        f"{path}: config.json promises {n_mtp} MTP layers but no tensor of {prefixes[0]}* is there; "
        f"loading without them",
        stacklevel=3,
    )
    return replace(config, num_nextn_predict_layers=0)


def _check_tensors(
    path: Path, config: ModelConfig, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]
) -> None:
    """Every tensor accounted for, before a byte of them is read."""
    optional = {copy: wanted[main] for copy, main in _copies_on_disk(config).items()}
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
        raise ValueError(f"{path}: the tensors do not fit config.json: {'; '.join(said)}")


def _copies_on_disk(config: ModelConfig) -> dict[str, str]:
    """Copies that may stand in a file and must then equal the original."""
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
    return shared_copies(config) | tied


@torch.no_grad()
def _read_weights(path: Path, files: list[Path], model: Transformer) -> None:
    views = official_views(model)
    copies = _copies_on_disk(model.config)
    for file in files:
        with _open(file) as handle:
            for name in handle.keys():
                if name in views:
                    views[name].copy_(handle.get_tensor(name))
    for file in files:
        with _open(file) as handle:
            for name in copies.keys() & set(handle.keys()):
                if not torch.equal(handle.get_tensor(name).float(), views[copies[name]].cpu()):
                    raise ValueError(f"{path}: {name} differs from {copies[name]}, of which it must be a copy")


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r} is not supported for compute; use {' or '.join(DTYPES)}")
    return getattr(torch, name)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _reason(error: BaseException) -> str:
    """One line, whatever the library beneath wrote."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while not isinstance(error, OSError) and error.__context__ is not None:  # torch's writer hides the full disk
        error = error.__context__
    return " ".join(str(error).split())[:200]
