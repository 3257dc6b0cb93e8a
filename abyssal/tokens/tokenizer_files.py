"""The tokenizer files of a Hugging Face directory: what they say, read at the door and written whole.

tokenizer.json holds the vocabulary; who begins, ends and pads, and the chat template, stand in tokenizer_config.json,
special_tokens_map.json, config.json and chat_template.jinja. Does not own what any of it means: tokenizer.py, chat.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import tokenizers

ROLES = ("bos_token", "eos_token", "pad_token")


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """A tokenizer.json, or one line that says what is wrong with it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; name the directory of a checkpoint or of a trained tokenizer")
    try:
        return backend_of(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not a tokenizer file ({reason}); copy or train it again") from None


def backend_of(text: str) -> tokenizers.Tokenizer:
    """The library's tokenizer of a JSON text. All its ways to fail become a ValueError."""
    try:
        return tokenizers.Tokenizer.from_str(text)
    except BaseException as error:  # a bare Exception for what it cannot read, and a panic, which is none, for the rest
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise ValueError(str(error)) from None


def read_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, with what only the files beside it say: names of tokens and the chat template."""
    config = _read_object(directory / "tokenizer_config.json")
    beside = _read_object(directory / "special_tokens_map.json")
    config |= {role: beside[role] for role in _unnamed(config) if token_name(beside.get(role))}
    ids = {role: index for role in _unnamed(config) if isinstance(index := _first_id(directory, role), int)}
    names = _names_of(directory, set(ids.values())) if ids else {}
    config |= {role: names[index] for role, index in ids.items() if index in names}
    template = directory / "chat_template.jinja"
    if "chat_template" not in config and template.is_file():
        try:
            config["chat_template"] = template.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{template} is not UTF-8; copy it again") from None
    return config


def token_name(value: Any) -> str | None:
    """A token as the files spell it: its text, or in older ones an object with its text inside."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def template_text(value: Any) -> str | None:
    """The chat template: a text, or the one called "default" of several."""
    if isinstance(value, list):
        named = {str(entry.get("name")): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default", next(iter(named.values()), None))
    return value if isinstance(value, str) and value else None


def write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}; free some space and run again") from None


def _unnamed(config: dict[str, Any]) -> list[str]:
    return [role for role in ROLES if token_name(config.get(role)) is None]


def _first_id(directory: Path, role: str) -> Any:
    """What config.json says of a role; where it lists several ids, the first."""
    index = _read_object(directory / "config.json").get(f"{role}_id")
    return index[0] if isinstance(index, list) and index else index


def _names_of(directory: Path, ids: set[int]) -> dict[int, str]:
    added = _read_object(directory / "tokenizer.json").get("added_tokens")
    return {
        token["id"]: token["content"]
        for token in (added if isinstance(added, list) else [])
        if isinstance(token, dict) and token.get("id") in ids and isinstance(token.get("content"), str)
    }


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({' '.join(str(error).split())[:200]}); copy or train it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not a JSON object; copy or train it again")
    return content
