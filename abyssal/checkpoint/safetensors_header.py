"""The header of a safetensors file, checked in every field before a byte of a tensor is read; and that reading.

A file is 8 bytes of length, so much JSON, then the numbers: {"name": {"dtype", "shape", "data_offsets"}, ...}. Nothing
in it is believed that the size of the file does not bear out, so no header can ask for memory that it has not brought
along. Tensors are read, not mapped: a file that shrinks meanwhile is an error and not a crash, and what was read is all
that stays in memory.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from abyssal.checkpoint.strict_json import one_line, parse_object, shown

MOST_HEADER_BYTES = 100_000_000  # the limit of the format's own library
MOST_AXES = 16
MOST_NAME = 500  # characters
MOST_NUMBERS = 2**63 - 1  # torch counts in 64 bits
TORCH_TYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip
REAL_TYPES = ("F64", "F32", "F16", "BF16")  # what a weight may be stored as without a scale


class StoredTensor(NamedTuple):
    """A tensor in its file; `begin` counts from the start of the file."""

    file: Path
    stored: str
    shape: tuple[int, ...]
    begin: int
    n_bytes: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """What is in the file, in the order in which it lies there; an OSError in one line for anything amiss."""
    try:
        return _read_header(file)
    except ValueError as error:
        raise damaged(file, one_line(error)) from None


def read_tensor(place: StoredTensor) -> Tensor:
    """The tensor, in memory of its own."""
    out = torch.empty(place.shape, dtype=TORCH_TYPES[place.stored])
    read_bytes(place, out)
    return out


def read_bytes(place: StoredTensor, out: Tensor) -> None:
    """Straight from the file into a tensor of its type and size, without a copy on the way."""
    assert out.is_contiguous() and out.nbytes == place.n_bytes, (out.shape, place)
    view, n_read = out.view(-1).view(torch.uint8).numpy().data, 0
    with place.file.open("rb", buffering=0) as handle:
        handle.seek(place.begin)
        while n_read < place.n_bytes:  # Linux reads 2 GiB at most at a time
            n_new = handle.readinto(view[n_read:])
            if not n_new:
                raise damaged(place.file, f"ends {place.n_bytes - n_read:,} bytes too early")
            n_read += n_new


def is_name(name: str) -> bool:
    """What can be put into a line of text: printable and not endless."""
    return name.isprintable() and len(name) <= MOST_NAME


def damaged(file: Path, reason: str) -> OSError:
    return OSError(
        f"{file} is truncated or damaged ({reason}): copy that file again, or go back to an earlier checkpoint"
    )


def _read_header(file: Path) -> dict[str, StoredTensor]:
    with file.open("rb") as handle:
        size = handle.seek(0, 2)
        handle.seek(0)
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
        if length > MOST_HEADER_BYTES:
            raise ValueError(f"a header of {length:,} bytes; {MOST_HEADER_BYTES:,} is the most there may be")
        text = handle.read(length)
    try:
        entries = parse_object(text)
    except ValueError as error:
        raise ValueError(f"its header {error}") from None
    _check_metadata(entries.pop("__metadata__", {}))
    pieces = [(*_offsets(name, entry), name, *_type_and_shape(name, entry)) for name, entry in entries.items()]
    found: dict[str, StoredTensor] = {}
    expected = 0
    for begin, end, name, stored, shape in sorted(pieces, key=lambda piece: piece[:2]):
        if begin != expected:
            raise ValueError(f"{shown(name)} begins at {begin:,} where {expected:,} is next")
        if math.prod(shape) * TORCH_TYPES[stored].itemsize != end - begin:
            raise ValueError(f"{shown(name)} of {stored} {list(shape)} does not have {end - begin:,} bytes")
        found[name] = StoredTensor(file, stored, shape, 8 + length + begin, end - begin)
        expected = end
    if 8 + length + expected != size:
        raise ValueError(f"{expected:,} bytes of tensors announced, {size - 8 - length:,} are there")
    return found


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"__metadata__ {shown(metadata)} is no map of texts")


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    if not is_name(name):
        raise ValueError(f"{shown(name)} is no name of a tensor")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown(name)} is {shown(entry)} instead of dtype, shape and data_offsets")
    offsets = entry["data_offsets"]
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{shown(name)} has data_offsets {shown(offsets)}")
    return offsets[0], offsets[1]


def _type_and_shape(name: str, entry: dict[str, Any]) -> tuple[str, tuple[int, ...]]:
    stored, shape = entry["dtype"], entry["shape"]
    if not isinstance(stored, str) or stored not in TORCH_TYPES:
        raise ValueError(f"{shown(name)} has dtype {shown(stored)}; known are {', '.join(TORCH_TYPES)}")
    if not _are_counts(shape) or len(shape) > MOST_AXES or math.prod(max(n, 1) for n in shape) > MOST_NUMBERS:
        raise ValueError(f"{shown(name)} has shape {shown(shape)}")
    return stored, tuple(shape)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n for n in value)  # True is no count
