"""A GGUF file, in parts or whole, as a source of tensors: official names and layout, numbers of any of its types.

Weights are read one tensor at a time and not mapped: under a map, a file cut short by somebody else ends the process.
Letters: H heads, N unrotated rows of a key, V rows of a value, L latent.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from numpy.typing import NDArray
from torch import Tensor

from abyssal.checkpoint.gguf_config import config_from_gguf
from abyssal.checkpoint.gguf_header import StoredTensor
from abyssal.checkpoint.gguf_names import ROPE_FACTORS, Entry, entries, halves_from_pairs, join_kv_b
from abyssal.checkpoint.gguf_parts import read_parts
from abyssal.checkpoint.gguf_tokenizer import tokenizer_from_gguf
from abyssal.checkpoint.tensor_info import TensorInfo
from abyssal.kernels.quantize import Quantized
from abyssal.tokens.tokenizer import Tokenizer

PLAIN: dict[GGMLQuantizationType, tuple[np.dtype[Any], torch.dtype]] = {
    GGMLQuantizationType.F32: (np.dtype("<f4"), torch.float32),
    GGMLQuantizationType.F16: (np.dtype("<f2"), torch.float16),
    GGMLQuantizationType.BF16: (np.dtype("<i2"), torch.bfloat16),  # NumPy has no such numbers: bits
}


class Place(NamedTuple):
    """Where an official tensor comes from: one piece of the file, or k_b and v_b. `n_heads` is not 0 where the rows of
    its heads are in pairs."""

    pieces: tuple[StoredTensor, ...]
    n_heads: int = 0


class GgufFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_parts(path)
        self._metadata, stored = header.metadata, dict(header.tensors)
        try:
            for kind in {tensor.type for tensor in stored.values()}:
                _refuse_unreadable(kind)
            factors = stored.pop(ROPE_FACTORS, None)
            shapes = {name: tensor.shape for name, tensor in stored.items()}
            self.config = config_from_gguf(
                self._metadata, shapes, rope_factors=None if factors is None else self._numbers(factors).numpy()
            )
            arch: str = self._metadata["general.architecture"]
            whole_kv_b = "blk.0.attn_kv_b.weight" in stored
            self._places = _places(stored, entries(self.config, arch, whole_kv_b=whole_kv_b))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        self.tensors = {name: _info(place) for name, place in self._places.items()}

    def read(self, name: str) -> Tensor:
        pieces, n_heads = self._places[name]
        weight = self._numbers(pieces[0])
        if len(pieces) == 2:
            return join_kv_b(weight, self._numbers(pieces[1]))
        return halves_from_pairs(weight, n_heads) if n_heads else weight

    def read_into(self, name: str, out: Tensor) -> None:
        out.copy_(self.read(name))

    def read_quantized(self, name: str) -> Quantized | None:
        return None  # GGUF's few bits come in blocks of other forms than those we compute with

    def tokenizer(self) -> Tokenizer | None:
        try:
            return tokenizer_from_gguf(self._metadata)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def _numbers(self, stored: StoredTensor) -> Tensor:
        """In the type they are stored in; those of few bits in FP32."""
        if stored.type in PLAIN:
            dtype, torch_dtype = PLAIN[stored.type]
            return torch.from_numpy(self._bytes(stored).view(dtype).reshape(stored.shape)).view(torch_dtype)
        block, block_bytes = GGML_QUANT_SIZES[stored.type]
        rows = self._bytes(stored).reshape(-1, stored.shape[-1] // block * block_bytes)
        with np.errstate(all="ignore"):  # what it would warn of is an error here
            numbers = dequantize(rows, stored.type)
        if not np.isfinite(numbers).all():
            raise ValueError(f"{stored.file}: scales of {stored.type.name} at byte {stored.offset} are NaN or infinite")
        return torch.from_numpy(numbers.reshape(stored.shape))

    def _bytes(self, stored: StoredTensor) -> NDArray[np.uint8]:
        data = np.fromfile(stored.file, np.uint8, stored.n_bytes, offset=stored.offset)
        if len(data) != stored.n_bytes:
            raise OSError(f"{stored.file} has become shorter while it was read; copy it again")
        return data


def _places(stored: dict[str, StoredTensor], wanted: Iterable[Entry]) -> dict[str, Place]:
    """Official name -> place. What no entry knows keeps its own name: whoever compares names will say so."""
    left = dict(stored)
    places: dict[str, Place] = {}
    split: dict[str, list[StoredTensor]] = {}
    for entry in wanted:
        if entry.gguf not in left:
            continue
        tensor = left.pop(entry.gguf)
        shape = (1,) * (entry.n_dimensions - len(tensor.shape)) + tensor.shape
        if len(shape) != entry.n_dimensions:
            raise ValueError(f"{entry.gguf} of shape {shape} should have {entry.n_dimensions} dimensions")
        tensor = tensor._replace(shape=shape)
        if entry.layout == "experts":
            if shape[0] != len(entry.official):
                raise ValueError(f"{entry.gguf} of shape {shape} should hold {len(entry.official)} experts")
            places |= zip(entry.official, map(Place, _slices(tensor)), strict=True)
        elif entry.layout in ("k_b", "v_b"):
            split.setdefault(entry.official[0], []).append(tensor)
        elif entry.layout == "pairs":
            if shape[0] % (2 * entry.n_heads):
                raise ValueError(f"{entry.gguf} of shape {shape} has no pairs of rows for {entry.n_heads} heads")
            places[entry.official[0]] = Place((tensor,), entry.n_heads)
        else:
            places[entry.official[0]] = Place((tensor,))
    for name, pieces in split.items():
        shapes = [piece.shape for piece in pieces]
        if len(pieces) != 2 or (shapes[0][0], shapes[0][1]) != (shapes[1][0], shapes[1][2]):
            raise ValueError(f"{name}: k_b and v_b of shapes {shapes} do not belong together")
        places[name] = Place(tuple(pieces))
    for name, tensor in left.items():
        if name in places:
            raise ValueError(f"the tensor {name} stands there under two names")
        places[name] = Place((tensor,))
    return places


def _slices(stack: StoredTensor) -> list[tuple[StoredTensor]]:
    """The matrices of (E, rows, columns) one by one: whole rows lie one after another in any type."""
    n_bytes = stack.n_bytes // stack.shape[0]
    return [
        (stack._replace(shape=stack.shape[1:], offset=stack.offset + expert * n_bytes, n_bytes=n_bytes),)
        for expert in range(stack.shape[0])
    ]


def _info(place: Place) -> TensorInfo:
    first = place.pieces[0]
    if len(place.pieces) == 1:
        return TensorInfo(first.shape, first.type.name)
    n_heads, n_latent, n_key = first.shape
    return TensorInfo((n_heads * (n_key + place.pieces[1].shape[1]), n_latent), first.type.name)


def _refuse_unreadable(kind: GGMLQuantizationType) -> None:
    """Ask the library, with one block of zeros; it has no list of what it can."""
    if kind in PLAIN:
        return
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        raise ValueError(f"tensors of type {kind.name} cannot be read; convert the file to another type") from None
