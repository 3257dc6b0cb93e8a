"""The head of a GGUF file: its metadata and where each tensor lies. Owns the layout of bytes, none of their meaning.

    magic, version | counts | key, type, value ... | name, dimensions, type, offset ... | padding | tensor data

The `gguf` package reads this too, but takes every count and length in the file at its word and makes an object for each
number of each token, seconds for a vocabulary of today. Here each is compared with the bytes that are left before
anything is allocated, so a damaged file ends in one line.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 1 had lengths of 32 bits and was gone within weeks
MAX_DIMENSIONS = 4
MAX_STRINGS = 1 << 23  # in one array; the largest vocabularies have a quarter of a million
MAX_ALIGNMENT = 1 << 20
SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


class StoredTensor(NamedTuple):
    """`shape` is row-major, as everywhere but in the file itself; `offset` counts from the start of `file`."""

    file: Path
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    n_bytes: int


class GgufHeader(NamedTuple):
    """Arrays of numbers in `metadata` are NumPy arrays, arrays of text are lists. 32-bit floats are as people wrote
    them: 1e-05, not 9.999999747378752e-06."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_header(path: Path) -> GgufHeader:
    """Metadata and tensors of one file; nothing of the weights is read."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: name a .gguf file")
    with open(path, "rb") as file:
        try:
            return _Reader(file, path).header()
        except (ValueError, struct.error) as error:  # UnicodeDecodeError is a ValueError
            raise ValueError(f"{path} is no GGUF file or damaged ({error}); copy it again") from None


class _Reader:
    """Takes pieces off the front of a file and never more than are left."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.size, self.at = file, path, os.fstat(file.fileno()).st_size, 0

    def header(self) -> GgufHeader:
        if self.take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self.number("<I")
        if version & 0xFFFF == 0:
            raise ValueError("it is big-endian")
        if version not in VERSIONS:
            raise ValueError(f"version {version} instead of {' or '.join(map(str, VERSIONS))}")
        n_tensors, n_keys = self.count(at_least=24), self.count(at_least=13)
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.text()
            if key in metadata:
                raise ValueError(f"the key {key[:60]!r} stands there twice")
            metadata[key] = self.value(self.value_type())
        places = [self.tensor() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise ValueError(f"general.alignment={alignment!r} is no power of two up to {MAX_ALIGNMENT}")
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        for name, tensor in places:
            if name in tensors:
                raise ValueError(f"the tensor {name[:60]!r} stands there twice")
            tensors[name] = tensor._replace(offset=start + tensor.offset)
            if tensors[name].offset + tensor.n_bytes > self.size:
                raise ValueError(f"the tensor {name[:60]!r} reaches beyond its end")
        return GgufHeader(metadata, tensors)

    def tensor(self) -> tuple[str, StoredTensor]:
        """Its offset still counts from the start of the tensor data."""
        name = self.text()
        n_dimensions = self.number("<I")
        if not 1 <= n_dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"the tensor {name[:60]!r} has {n_dimensions} dimensions")
        shape = tuple(reversed([self.number("<Q") for _ in range(n_dimensions)]))
        kind = GGMLQuantizationType(self.number("<I"))  # an unknown one is a ValueError that says so
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise ValueError(f"the tensor {name[:60]!r} of shape {shape} does not divide into blocks of {kind.name}")
        n_bytes = math.prod(shape) // block * block_bytes
        return name, StoredTensor(self.path, shape, kind, self.number("<Q"), n_bytes)

    def value_type(self) -> GGUFValueType:
        return GGUFValueType(self.number("<I"))

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind == GGUFValueType.ARRAY:
            return self.array(self.value_type())
        value = self.number(SCALARS[kind])
        return _shortest(value) if kind == GGUFValueType.FLOAT32 else value

    def array(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.ARRAY:
            raise ValueError("an array of arrays")
        if kind == GGUFValueType.STRING:
            n_strings = self.count(at_least=8)
            if n_strings > MAX_STRINGS:
                raise ValueError(f"an array of {n_strings} strings")
            return [self.text() for _ in range(n_strings)]
        dtype = np.dtype(SCALARS[kind])
        n_numbers = self.count(at_least=dtype.itemsize)
        return np.frombuffer(self.take(n_numbers * dtype.itemsize), dtype)

    def count(self, *, at_least: int) -> int:
        """How many things of `at_least` so many bytes follow."""
        count = self.number("<Q")
        if count * at_least > self.size - self.at:
            raise ValueError(f"it promises {count} entries where {self.size - self.at} bytes are left")
        return count

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8")

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > self.size - self.at:
            raise ValueError(f"it ends after {self.size} bytes")
        self.at += n_bytes
        return self.file.read(n_bytes)


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to the same 32 bits: what was meant."""
    return float(str(np.float32(value)))
