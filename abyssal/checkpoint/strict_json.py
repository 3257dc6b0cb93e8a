"""JSON from a stranger: bounded in size and depth, every key once, and nothing that is no JSON. Errors are one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 256_000_000  # the index of a 671B checkpoint has 9 million


def read_object(file: Path) -> dict[str, Any]:
    """The object in a file, or a ValueError that names the file."""
    if (n_bytes := file.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{file} has {n_bytes:,} bytes, more than any such file needs; copy it again")
    try:
        return parse_object(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} {error}; copy it again") from None


def parse_object(text: bytes) -> dict[str, Any]:
    """The object, or a ValueError that says what the text is instead."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_each_key_once, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("is not JSON that anybody wrote (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"is not JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise ValueError("holds no JSON object")
    return value


def one_line(error: BaseException) -> str:
    """Its message in one line, whatever the library beneath wrote."""
    return " ".join(str(error).split())[:200]


def shown(value: object) -> str:
    """A value from a file, short and without control characters, for an error."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"{shown(key)} stands there twice")
            seen.add(key)
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")
