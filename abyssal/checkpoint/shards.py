"""Safetensors files of a checkpoint: what goes into which, one in memory at a time, an index beside several."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from abyssal.checkpoint.shard_index import INDEX, SINGLE

OnBytes = Callable[[int, int], None]  # bytes done, bytes in all


def write_shards(
    path: Path,
    sizes: Mapping[str, int],
    pieces: Callable[[str], dict[str, Tensor]],
    *,
    max_shard_bytes: int,
    on_bytes: OnBytes | None = None,
) -> None:
    """`sizes` are bytes in the files, in their order; `pieces` gives what is written for a name, by names in the file.
    What belongs to one name stays in one shard."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map: dict[str, str] = {}
    n_done, n_all = 0, sum(sizes.values())
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            made = pieces(name)
            assert sum(tensor.nbytes for tensor in made.values()) == sizes[name], name
            tensors |= made
            n_done += sizes[name]
            if on_bytes is not None:
                on_bytes(n_done, n_all)
        save_file(tensors, path / file, metadata={"format": "pt"})
        shutil.copymode(path / "config.json", path / file)  # safetensors makes files that only their owner may read
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        write_json(path / INDEX, {"metadata": {"total_size": n_all}, "weight_map": weight_map})


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
