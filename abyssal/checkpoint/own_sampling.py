"""How a model's makers say it should be asked: temperature and top-p.

A directory says it in generation_config.json, a GGUF file under general.sampling. Where nobody says anything, R1's
numbers stand.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from abyssal.checkpoint.atomic import find_directory
from abyssal.checkpoint.gguf_header import read_header
from abyssal.checkpoint.packaged import PACKAGED
from abyssal.checkpoint.source import gguf_at
from abyssal.checkpoint.strict_json import read_object, shown

GGUF_KEYS = {"temperature": "general.sampling.temp", "top_p": "general.sampling.top_p"}
MOST = {"temperature": 10.0, "top_p": 1.0}


class Sampling(NamedTuple):
    temperature: float = 0.6
    top_p: float = 0.95


R1 = Sampling()


def own_sampling(path: Path) -> Sampling:
    return Sampling(**said_sampling(path))


def said_sampling(path: Path) -> dict[str, float]:
    """`temperature` and `top_p` as far as the checkpoint says them."""
    file = gguf_at(path)
    if file is not None:
        packaged = {Path(model.weights).name: model.sampling for model in PACKAGED.values()}
        metadata = read_header(file).metadata
        found = {name: metadata.get(key) for name, key in GGUF_KEYS.items()}
        return packaged.get(file.name, {}) | _numbers(found, file)
    config = find_directory(path) / "generation_config.json"
    return _numbers(read_object(config), config) if config.is_file() else {}


def _numbers(found: dict[str, Any], file: Path) -> dict[str, float]:
    numbers = {}
    for name, most in MOST.items():
        value = found.get(name)
        if value is None:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not 0 <= value <= most or (name == "top_p" and value == 0):
            raise ValueError(f"{file}: {name}={shown(value)} is no number up to {most:g}; correct it or take it out")
        numbers[name] = float(value)
    return numbers
