"""Fields of a config.json: there or not, of the right type, of the one value that we do. Owns how a refusal reads."""

from __future__ import annotations

from typing import Any


def need(hf: dict[str, Any], name: str, kind: type | tuple[type, ...] = int) -> Any:
    value = hf.get(name)
    if value is None:
        raise ValueError(f"config.json lacks {name!r}")
    if not isinstance(value, kind) or isinstance(value, bool):
        said = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"config.json: {name}={value!r} should be of type {said}")
    return value


def get(hf: dict[str, Any], name: str, default: Any) -> Any:
    """Absent and null mean the same in most of these files."""
    value = hf.get(name)
    return default if value is None else value


def only(hf: dict[str, Any], name: str, supported: Any, *, remedy: str = "") -> None:
    value = get(hf, name, supported)
    if value != supported:
        raise unsupported(name, value, remedy or f"only {supported!r} is")


def unsupported(name: str, value: Any, remedy: str) -> ValueError:
    return ValueError(f"config.json: {name}={value!r} is not supported; {remedy}")
