"""A Hugging Face directory, read shard by shard and never through pickle. Owns its files, none of the model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from abyssal.checkpoint.convert import config_from_hf
from abyssal.checkpoint.tensor_info import TensorInfo
from abyssal.checkpoint.tensor_names import mtp_prefix
from abyssal.kernels.quantize import Quantized
from abyssal.model.config import ModelConfig
from abyssal.tokens.tokenizer import Tokenizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class HfDirectory:
    def __init__(self, path: Path) -> None:
        self.path = path
        config = _read_config(path)
        self._file_of: dict[str, Path] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in _weight_files(path):
            with _open(file) as handle:
                for name in handle.keys():
                    if name in self.tensors:
                        raise ValueError(f"{file} repeats {name!r} of another shard; copy the checkpoint again")
                    piece = handle.get_slice(name)
                    self.tensors[name] = TensorInfo(tuple(piece.get_shape()), piece.get_dtype())
                    self._file_of[name] = file
        self.config = _without_absent_mtp(path, config, self.tensors)

    def read(self, name: str) -> Tensor:
        with _open(self._file_of[name]) as handle:
            return handle.get_tensor(name)

    def read_quantized(self, name: str) -> Quantized | None:
        return None

    def tokenizer(self) -> Tokenizer | None:
        return Tokenizer.load(self.path) if (self.path / "tokenizer.json").is_file() else None


def read_config(path: Path) -> ModelConfig:
    """config.json alone, or the error that loading would end in."""
    return _read_config(path)


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


def _without_absent_mtp(path: Path, config: ModelConfig, found: dict[str, TensorInfo]) -> ModelConfig:
    """transformers drops MTP weights when it saves but keeps their count; said aloud, because drafting needs them."""
    n_mtp = config.num_nextn_predict_layers
    prefixes = tuple(mtp_prefix(config, k) for k in range(n_mtp))
    if not n_mtp or any(name.startswith(prefixes) for name in found):
        return config
    warnings.warn(
        f"{path}: config.json promises {n_mtp} MTP layers but no tensor of {prefixes[0]}* is there; "
        f"loading without them",
        stacklevel=4,
    )
    return replace(config, num_nextn_predict_layers=0)


def _reason(error: BaseException) -> str:
    """One line, whatever the library beneath wrote."""
    return " ".join(str(error).split())[:200]
