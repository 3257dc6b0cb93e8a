"""Replace a directory as a whole or not at all. Owns the names `<dir>.new` and `<dir>.old` beside it.

A rename can't overwrite a full directory, so the swap is two renames: dir -> dir.old, dir.new -> dir. A process killed
between the two leaves only dir.old, which is whole; readers take it, and the next writer puts it back first.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def find_directory(path: Path) -> Path:
    """The directory, or its predecessor when a swap was cut in two. The result may not exist: its reader says so."""
    old = _sibling(path, "old")
    return old if not path.exists() and old.is_dir() else path


def refuse_other_folders(path: Path) -> None:
    """What is about to be replaced must be a checkpoint, or nothing yet."""
    if path.exists() and not (path / "config.json").is_file() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is no checkpoint; name another folder or remove it")


def finish_swap(path: Path) -> None:
    """Put right what a killed writer left: a directory half filled, or one whose swap was cut in two or not cleared."""
    new, old = _sibling(path, "new"), _sibling(path, "old")
    if not path.exists() and old.exists():
        os.rename(old, path)
    for left in (old, new):
        if left.exists():
            shutil.rmtree(left)


@contextmanager
def replace_directory(path: Path) -> Iterator[Path]:
    """An empty directory to fill; it takes `path`'s place when the block ends well and vanishes when it does not."""
    new, old = _sibling(path, "new"), _sibling(path, "old")
    path.parent.mkdir(parents=True, exist_ok=True)
    finish_swap(path)
    new.mkdir()
    try:
        yield new
        _sync(new)
    except BaseException:  # a Ctrl-C must not leave half a directory either
        shutil.rmtree(new, ignore_errors=True)
        raise
    if path.exists():
        os.rename(path, old)
    os.rename(new, path)
    _sync_one(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sibling(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{ending}")


def _sync(directory: Path) -> None:
    """To the disk, not only to the page cache: a rename that survives a power cut must not point at empty files."""
    for folder, _, names in os.walk(directory):
        for name in names:
            _sync_one(Path(folder) / name)
        _sync_one(Path(folder))


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
