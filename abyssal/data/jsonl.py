"""Lines of JSON from a user's file, each with the place to name when something is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) for each line that is not blank, streamed."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name a file with one JSON object a line")
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                value = json.loads(text)
            except UnicodeDecodeError:
                raise ValueError(f"{where}: not UTF-8; convert the file to UTF-8") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error.msg}); write one object on each line") from None
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {type(value).__name__} instead of an object; write {{...}} on each line")
            yield where, value
