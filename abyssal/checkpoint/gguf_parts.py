"""A GGUF model in several files, NAME-00001-of-00009.gguf, as large ones are published. Owns what belongs together.

The first part has the metadata of all. Every part says which it is, and how many tensors there are in all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from abyssal.checkpoint.gguf_header import GgufHeader, StoredTensor, read_header

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def read_parts(path: Path) -> GgufHeader:
    """The header of one file, or of the whole model whose first part it is."""
    first = read_header(path)
    count = first.metadata.get("split.count", 1)
    if count == 1:
        return first
    named = PART.fullmatch(path.name)
    if named is None or not isinstance(count, int) or int(named["count"]) != count:
        raise ValueError(f"{path} is one of {count!r} parts, which its name does not say; give it its own name back")
    if int(named["number"]) != 1:
        raise ValueError(f"{path} is no first part; name {_sibling(path, 1).name}")
    tensors: dict[str, StoredTensor] = {}
    for number in range(1, count + 1):
        part_path = _sibling(path, number)
        part = first if number == 1 else read_header(part_path)
        _check(part.metadata, part_path, number=number, count=count)
        for name in tensors.keys() & part.tensors.keys():
            raise ValueError(f"{part_path} repeats {name!r} of another part; copy it again")
        tensors |= part.tensors
    promised = first.metadata.get("split.tensors.count", len(tensors))
    if promised != len(tensors):
        raise ValueError(f"{path}: the parts hold {len(tensors)} tensors instead of {promised}; copy them again")
    return GgufHeader(first.metadata, tensors)


def first_parts(files: Iterable[Path]) -> list[Path]:
    """Without those that are later parts of others."""
    return [file for file in files if (named := PART.fullmatch(file.name)) is None or int(named["number"]) == 1]


def _sibling(path: Path, number: int) -> Path:
    named = PART.fullmatch(path.name)
    assert named is not None
    return path.with_name(f"{named['stem']}-{number:05d}-of-{named['count']}.gguf")


def _check(metadata: dict[str, Any], path: Path, *, number: int, count: int) -> None:
    found = metadata.get("split.no"), metadata.get("split.count")
    if found != (number - 1, count):
        raise ValueError(f"{path} is part {found} by its content instead of {(number - 1, count)}; copy it again")
