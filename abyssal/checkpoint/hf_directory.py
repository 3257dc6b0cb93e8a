"""A Hugging Face directory, read tensor by tensor and never through pickle. Owns its files, none of the model.

Every header is checked before a weight is read; what a directory can have wrong ends in one line.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from abyssal.checkpoint.compressed_tensors import PARTS, find_packed, read_packed
from abyssal.checkpoint.convert import config_from_hf
from abyssal.checkpoint.fp8_blocks import pair_scales, read_blocks, read_scales, to_bfloat16
from abyssal.checkpoint.quantization_config import read_quantization
from abyssal.checkpoint.safetensors_header import TORCH_TYPES, StoredTensor, read_bytes, read_header, read_tensor
from abyssal.checkpoint.shard_index import PICKLES, check_index, find_weights, refusal
from abyssal.checkpoint.strict_json import one_line, read_object
from abyssal.checkpoint.tensor_info import TensorInfo
from abyssal.checkpoint.tensor_names import mtp_prefix
from abyssal.kernels.quantize import Quantized
from abyssal.model.config import ModelConfig
from abyssal.tokens.tokenizer import Tokenizer


class HfDirectory:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.hf = read_hf_config(path)
        config = _shape(path, self.hf)
        weights = find_weights(path)
        self.files = weights.files
        self._stored: dict[str, StoredTensor] = {}
        for file in self.files:
            for name, place in read_header(file).items():
                if name in self._stored:
                    raise ValueError(f"{file} repeats {name!r} of another shard; copy the checkpoint again")
                self._stored[name] = place
        if weights.weight_map is not None:
            check_index(path, weights.weight_map, self._stored)
        format = read_quantization(self.hf)
        self._scale_of = pair_scales(path, self._stored, expected=format == "fp8")
        self._packed = find_packed(path, self._stored, format)
        parts = set(self._scale_of.values()) | {name + part for name in self._packed for part in PARTS}
        self.tensors = {
            name: TensorInfo(place.shape, place.stored) for name, place in self._stored.items() if name not in parts
        }
        self.tensors |= {name: TensorInfo(place.shape, place.format.upper()) for name, place in self._packed.items()}
        self.config = without_absent_mtp(path, config, self.tensors)

    def read(self, name: str) -> Tensor:
        weight = self.read_quantized(name)
        return read_tensor(self._stored[name]) if weight is None else to_bfloat16(weight)

    def read_into(self, name: str, out: Tensor) -> None:
        place = None if name in self._scale_of else self._stored.get(name)
        is_same = place is not None and TORCH_TYPES[place.stored] == out.dtype
        if place is not None and is_same and out.is_contiguous() and out.device.type == "cpu":
            read_bytes(place, out)
        else:
            out.copy_(self.read(name))

    def read_quantized(self, name: str) -> Quantized | None:
        if name in self._packed:
            return read_packed(self._packed[name])
        scale = self._scale_of.get(name)
        return None if scale is None else read_blocks(self._stored[name], self._stored[scale], name)

    def check_scales(self) -> None:
        """Read the scales alone, a sixteen-thousandth of the weights: a ValueError when one is no positive number."""
        for scale in self._scale_of.values():
            read_scales(self._stored[scale], scale)

    def tokenizer(self) -> Tokenizer | None:
        return Tokenizer.load(self.path) if (self.path / "tokenizer.json").is_file() else None


def read_config(path: Path) -> ModelConfig:
    """config.json alone, or the error that loading would end in."""
    return _shape(path, read_hf_config(path))


def read_hf_config(path: Path) -> dict[str, Any]:
    """config.json as it stands there."""
    if path.is_file():
        reason = refusal() if path.suffix in PICKLES else "name the directory that it is in"
        raise ValueError(f"{path} is a single file: {reason}")
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not there: name the directory of a checkpoint")
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no config.json: name the directory of a checkpoint")
    return read_object(file)


def _shape(path: Path, hf: dict[str, Any]) -> ModelConfig:
    try:
        return config_from_hf(hf)
    except (TypeError, AttributeError, KeyError, ArithmeticError) as error:  # a list for a number, a 0 to divide by
        raise ValueError(
            f"{path / 'config.json'} has a value of the wrong type ({one_line(error)}); copy it again"
        ) from None


def without_absent_mtp(path: Path, config: ModelConfig, found: Collection[str]) -> ModelConfig:
    """transformers drops MTP weights when it saves but keeps their count; said aloud, because drafting needs them."""
    n_mtp = config.num_nextn_predict_layers
    prefixes = tuple(mtp_prefix(config, k) for k in range(min(n_mtp, len(found) + 1)))
    if not n_mtp or any(name.startswith(prefixes) for name in found):
        return config
    warnings.warn(
        f"{path}: config.json promises {n_mtp} MTP layers but no tensor of {prefixes[0]}* is there; "
        f"loading without them",
        stacklevel=4,
    )
    return replace(config, num_nextn_predict_layers=0)
