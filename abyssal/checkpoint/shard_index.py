"""Which safetensors files make up a checkpoint: one, or those that an index names. Opens no weights and no pickle.

An index and its shards must agree in both directions, for a tensor that only one of them knows is a file of another
checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from abyssal.checkpoint.faults import listed, told
from abyssal.checkpoint.safetensors_header import StoredTensor, is_name
from abyssal.checkpoint.strict_json import read_object, shown

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class WeightFiles(NamedTuple):
    """`weight_map` is the index's: the file of each tensor."""

    files: list[Path]
    weight_map: dict[str, str] | None


def find_weights(path: Path) -> WeightFiles:
    """The files with the weights of a directory, all of which are there."""
    index = path / INDEX
    weight_map = read_index(index) if index.is_file() else None
    names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    if SINGLE not in names and (path / SINGLE).is_file():
        raise ValueError(f"{path} has both {SINGLE} and {INDEX}, which does not name it; remove the one of the two")
    missing = [name for name in names if not (path / name).is_file()]
    if missing == [SINGLE] and weight_map is None:
        raise FileNotFoundError(_no_weights(path))
    if missing:
        others = f" and so are {listed(missing[1:], most=3)}" if missing[1:] else ""
        raise FileNotFoundError(
            f"{path / missing[0]} is missing{others}: copy it again, or go back to an earlier checkpoint"
        )
    return WeightFiles([path / name for name in names], weight_map)


def read_index(file: Path) -> dict[str, str]:
    """Tensor -> file, each a plain name of a safetensors file beside the index."""
    weight_map = read_object(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{file} has no weight_map; copy it again")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{file} has a weight_map of something else than names; copy it again")
    for name in sorted(set(weight_map.values())):
        if not name.isprintable() or Path(name).name != name or name in (".", ".."):
            raise ValueError(f"{file} points at {shown(name)} outside its directory; copy the checkpoint again")
        if not name.endswith(".safetensors"):
            raise ValueError(f"{file} points at {shown(name)}; {refusal()}")
    for tensor in weight_map:
        if not is_name(tensor):
            raise ValueError(f"{file}: {shown(tensor)} is no name of a tensor; copy it again")
    return weight_map


def check_index(path: Path, weight_map: Mapping[str, str], stored: Mapping[str, StoredTensor]) -> None:
    """Every tensor of the index is in the file that it says, and every tensor of a file is in the index."""
    here = {name: place.file.name for name, place in stored.items()}
    faults = {
        "not in the shard that the index names": [
            f"{name} in {file}" for name, file in weight_map.items() if here.get(name) != file
        ],
        "in a shard and not in the index": [
            f"{name} in {file}" for name, file in here.items() if name not in weight_map
        ],
    }
    if said := told(faults):
        raise ValueError(f"{path / INDEX} and the shards disagree: {said}; copy the checkpoint again")


def refusal() -> str:
    """Why no pickle is opened, and what to do about it."""
    return (
        "files of that kind run code when they are opened and are never read here: "
        "save the checkpoint as safetensors where you trust it (transformers: save_pretrained) and name that directory"
    )


def _no_weights(path: Path) -> str:
    found = sorted(file.name for file in path.iterdir())
    if others := [name for name in found if name.endswith(".safetensors") and name != SINGLE]:
        return f"{path} has {listed(others, most=3)} but neither {SINGLE} nor {INDEX}: copy the index too"
    if pickles := [name for name in found if name.endswith(PICKLES)]:
        return f"{path} has no safetensors, only {listed(pickles, most=3)}; {refusal()}"
    return f"{path / SINGLE} is missing: copy it again, or go back to an earlier checkpoint"
