"""The checkpoint that a user means by a path."""

from __future__ import annotations

from pathlib import Path

from abyssal.checkpoint.atomic import find_directory
from abyssal.stages.run import CHECKPOINTS


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint directory itself, or out/<run>/<name> with a checkpoint's name: base, zero, dev1 .. r1, student."""
    if (find_directory(path) / "config.json").is_file():
        return path
    stage = next((stage for stage, name in CHECKPOINTS.items() if name == path.name), None)
    if path.name == "base" and (path.parent / "extend" / "done.json").is_file():  # the base that later stages know
        stage = "extend"
    for candidate in (path / "checkpoint", path.parent / (stage or path.name) / "checkpoint"):
        if find_directory(candidate).is_dir():
            return candidate
    known = ", ".join(CHECKPOINTS.values())
    raise FileNotFoundError(f"{path} is no checkpoint: name a Hugging Face directory, or out/<run>/ and one of {known}")
