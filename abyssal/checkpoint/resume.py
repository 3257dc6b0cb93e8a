"""What a run resumes from: FP32 masters, optimizer states, data position, random state, in `<checkpoint>/trainer/`.

Written by torch.distributed.checkpoint, so that the same files serve one process and, later, many. Nothing but resuming
one's own run opens the folder: its index is pickled, the only part of a checkpoint that is.
"""

from __future__ import annotations

import io
import pickle
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from abyssal.checkpoint.atomic import find_directory
from abyssal.model.transformer import Transformer

FOLDER = "trainer"
PLAIN = "plain"  # key of everything that is not a tensor
TENSOR_AT = "__tensor_at__"


class OptimizerLike(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """`state` nests dicts, lists and tuples of tensors, numbers and text: step and token counts, a loader's position,
    `generator.get_state()`, `random.getstate()`."""

    optimizers: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def has_trainer(directory: str | Path) -> bool:
    return (find_directory(Path(directory)) / FOLDER / ".metadata").is_file()


def save_trainer(
    directory: str | Path, *, model: Transformer, optimizers: dict[str, Any], state: dict[str, Any]
) -> None:
    """Write `directory`/trainer. Not atomic by itself: `save_checkpoint(trainer=...)` swaps it in with the weights."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    content = {"optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()}, "state": state}
    tensors[PLAIN] = _to_bytes(_split(content, "run", tensors))
    writer = dcp.FileSystemWriter(Path(directory) / FOLDER, sync_files=False)  # the swap syncs every file once
    with _single_process():
        dcp.save(tensors, storage_writer=writer)


def load_trainer(directory: str | Path, *, model: Transformer, optimizers: dict[str, Any]) -> dict[str, Any]:
    """Bring masters and optimizer states back in place, return `state`. The next step has the bits it would have."""
    folder = find_directory(Path(directory)) / FOLDER
    if not (folder / ".metadata").is_file():
        raise FileNotFoundError(f"{folder} is not there or not whole: this checkpoint can be used but not resumed from")
    reader = dcp.FileSystemReader(folder)
    masters = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    try:
        saved = reader.read_metadata().state_dict_metadata
        found = {
            key: (meta.properties.dtype, meta.size)
            for key, meta in saved.items()
            if isinstance(meta, TensorStorageMetadata)
        }
        _check_masters(folder, masters, found)
        wanted = masters | {
            key: torch.empty(size, dtype=dtype) for key, (dtype, size) in found.items() if key not in masters
        }
        with _single_process():
            dcp.load(wanted, storage_reader=reader)
        content = _join(_from_bytes(wanted[PLAIN]), wanted)
    except (CheckpointException, EOFError, OSError, RuntimeError, pickle.UnpicklingError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"{folder} is damaged ({reason}); delete it and start this stage again") from error
    if content["optimizers"].keys() != optimizers.keys():
        raise ValueError(
            f"{folder} holds the optimizers {sorted(content['optimizers'])}, this run has "
            f"{sorted(optimizers)}; resume with the recipe that wrote it"
        )
    for name, optimizer in optimizers.items():
        _restore(optimizer, content["optimizers"][name])
    return content["state"]


def drop_trainer(directory: str | Path) -> None:
    """A finished stage needs no masters: only its weights are read again."""
    shutil.rmtree(Path(directory) / FOLDER, ignore_errors=True)


def _check_masters(folder: Path, masters: dict[str, Tensor], found: dict[str, Any]) -> None:
    ours = {key: (tensor.dtype, tensor.shape) for key, tensor in masters.items()}
    theirs = {key: value for key, value in found.items() if key.startswith("model.")}
    wrong = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if wrong:
        raise ValueError(
            f"{folder} belongs to another model: {len(wrong)} tensors differ, first {wrong[0]!r}; "
            f"resume with the recipe that wrote it"
        )


def _restore(optimizer: Any, saved: dict[str, Any]) -> None:
    """load_state_dict, undoing torch's habit of casting every state tensor to its parameter's type (BF16 moments!)."""
    optimizer.load_state_dict(saved)
    if not isinstance(optimizer, torch.optim.Optimizer):
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in saved["state"].items():
        current = optimizer.state[parameters[index]]
        for key, value in values.items():
            if isinstance(value, Tensor) and current[key].dtype != value.dtype:
                current[key] = value.to(current[key].device)


def _to_bytes(value: Any) -> Tensor:
    """As a tensor: handed over as it is, a dict would come back with its integer keys turned into text."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _from_bytes(value: Tensor) -> Any:
    return torch.load(io.BytesIO(value.numpy().tobytes()), weights_only=True)


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Move tensors out of a nested value into `tensors`, leaving their keys behind."""
    if isinstance(value, Tensor):
        assert path not in tensors, path
        tensors[path] = value.detach()
        return {TENSOR_AT: path}
    if isinstance(value, dict):
        return {key: _split(item, f"{path}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_split(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    return value


def _join(value: Any, tensors: dict[str, Any]) -> Any:
    """The reverse of _split."""
    if isinstance(value, dict):
        if value.keys() == {TENSOR_AT}:
            return tensors[value[TENSOR_AT]]
        return {key: _join(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_join(item, tensors) for item in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value


@contextmanager
def _single_process() -> Iterator[None]:
    """torch.distributed.checkpoint warns that it runs in one process, which is what we asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
