"""Reading GGUF metadata: keys of one architecture, typed and bounded before anything is built from them."""

from __future__ import annotations

import math
from typing import Any

MAX_CONTEXT = 1 << 24  # the longest there is has ten million tokens
MAX_WIDTH = 1 << 18  # of a layer, and layers or heads in number; what exists stays below 65,536
MAX_EXPERTS = 1 << 12


class Keys:
    """Reads keys of the architecture; a wrong type or an absurd number is an error that names the key."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.metadata = metadata
        self.arch = str(metadata.get("general.architecture"))

    def value(self, key: str, kind: type, default: Any = None) -> Any:
        name = f"{self.arch}.{key}"
        value = self.metadata.get(name, default)
        if value is None:
            raise ValueError(f"the metadata lacks {name}")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name}={short(value)} should be of type {kind.__name__}")
        return value

    def count(self, key: str, default: int | None = None, *, most: int = MAX_WIDTH) -> int:
        value: int = self.value(key, int, default)
        if not 1 <= value <= most:
            raise ValueError(f"{self.arch}.{key}={value} is not between 1 and {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value: float = self.value(key, float, default)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{self.arch}.{key}={value} is no positive number")
        return value

    def only(self, key: str, supported: Any, wanted: str) -> None:
        value = self.metadata.get(f"{self.arch}.{key}", supported)
        if value != supported:
            raise ValueError(f"{self.arch}.{key}={short(value)} is not supported: {wanted}")


def short(value: Any) -> str:
    return repr(value)[:40]
