"""TOML into frozen dataclasses and back: every name and type is checked, and an error names its neighbours.

Owns no format: recipes (`stages/recipe.py`) and machines (`plan/machine_file.py`) are dataclasses that stand beside
their readers.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal


def from_dict(kind: type[Any], content: dict[str, Any], where: str, *, whole: str = "a recipe") -> Any:
    """Fill a dataclass from nested dicts, checking every name and type. `whole` is what the outermost table is."""
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := [key for key in content if key not in known]:
        raise ValueError(f"unknown key {where}{unknown[0]!s}; {where or whole} has {', '.join(sorted(known))}")
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in content
    ]
    if missing:
        raise ValueError(f"{where}{missing[0]} is missing; give it a value")
    return kind(**{key: _value(hints[key], value, f"{where}{key}") for key, value in content.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{where}={value!r} must be a table")
        return from_dict(typing.cast(type, hint), value, f"{where}.")
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in arguments if a is not type(None)]
        return None if value is None else _value(inner[0], value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where}={value!r}; use one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple and arguments[-1] is Ellipsis:  # of any length
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}={value!r} must be a list")
        return tuple(_value(arguments[0], v, where) for v in value)
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(arguments):
            raise ValueError(f"{where}={value!r} must be a list of {len(arguments)} values")
        return tuple(_value(a, v, where) for a, v in zip(arguments, value, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}={value!r} must be a table")
        return {
            _value(arguments[0], key, f"key of {where}"): _value(arguments[1], item, f"{where}.{key}")
            for key, item in value.items()
        }
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}={value!r} must be of type {hint.__name__}")
    return value


def to_toml(whole: Any) -> str:
    """A dataclass with every default written out; reading it gives the same one."""
    return table_toml(dataclasses.asdict(whole))


def table_toml(content: dict[str, Any]) -> str:
    return "\n".join(_table(content, "")).lstrip("\n") + "\n"


def _table(content: dict[str, Any], name: str) -> list[str]:
    scalars = {k: v for k, v in content.items() if not isinstance(v, dict) and not _tables(v) and v is not None}
    lines = [f"\n[{name}]"] if name and (scalars or not content) else []
    lines += _lines(scalars)
    for key, value in content.items():
        inner = f"{name}.{_key(key)}" if name else _key(key)
        if isinstance(value, dict):
            lines += _table(value, inner)
        elif _tables(value):
            for item in value:
                lines += [f"\n[[{inner}]]", *_lines(item)]
    return lines


def _tables(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, dict) for item in value)


def _lines(scalars: dict[str, Any]) -> list[str]:
    return [f"{_key(key)} = {_literal(value)}" for key, value in scalars.items()]


def _key(key: str) -> str:
    return key if key.replace("_", "").isalnum() and key.isascii() else _literal(key)


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, list | tuple) and len(value) > 1 and all(isinstance(item, list | tuple) for item in value):
        return "[\n" + "".join(f"    {_literal(item)},\n" for item in value) + "]"  # a table of numbers, line by line
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return repr(value)
