"""Writing a checkpoint: a Hugging Face directory, whole or not at all.

Weights are BF16 on disk under the official names, the balance bias FP32; `trainer/` beside them is resume.py's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from abyssal.checkpoint.atomic import refuse_other_folders, replace_directory
from abyssal.checkpoint.convert import config_to_hf
from abyssal.checkpoint.resume import TrainerState, save_trainer
from abyssal.checkpoint.shards import write_json, write_shards
from abyssal.checkpoint.tensor_names import keeps_fp32, official_views, shared_copies
from abyssal.model.transformer import Transformer
from abyssal.tokens.tokenizer import Tokenizer


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
    refuse_other_folders(path)
    ids: dict[str, int | None] = {}
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.role_id("bos_token"), "eos_token_id": tokenizer.eos_id}
    try:
        with replace_directory(path) as new:
            write_json(new / "config.json", config_to_hf(model.config, **ids))
            _write_weights(new, model, max_shard_bytes=max_shard_bytes)
            if tokenizer is not None:
                tokenizer.save(new, model_max_length=model.config.max_position_embeddings)
            if generation is not None:
                defaults = ids if tokenizer is None else ids | {"pad_token_id": tokenizer.pad_id}
                write_json(new / "generation_config.json", defaults | generation)
            if trainer is not None:
                save_trainer(new, model=model, optimizers=trainer.optimizers, state=trainer.state)
    except (OSError, SafetensorError, CheckpointException) as error:
        raise OSError(
            f"could not write {path}: {_reason(error)}; free some disk space and run again, the previous "
            f"checkpoint is untouched"
        ) from error


def _write_weights(path: Path, model: Transformer, *, max_shard_bytes: int) -> None:
    """BF16 safetensors; an index when there is more than one."""
    views = official_views(model)
    views |= {copy: views[main] for copy, main in shared_copies(model.config).items()}
    sizes = {name: view.numel() * (4 if keeps_fp32(name) else 2) for name, view in views.items()}
    write_shards(path, sizes, lambda name: {name: _on_disk(name, views[name])}, max_shard_bytes=max_shard_bytes)


def _on_disk(name: str, view: Tensor) -> Tensor:
    """An own copy: safetensors refuses tensors that share memory."""
    dtype = torch.float32 if keeps_fp32(name) else torch.bfloat16
    return view.to("cpu", dtype, copy=True).contiguous()


def _reason(error: BaseException) -> str:
    """One line, whatever the library beneath wrote."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while not isinstance(error, OSError) and error.__context__ is not None:  # torch's writer hides the full disk
        error = error.__context__
    return " ".join(str(error).split())[:200]
