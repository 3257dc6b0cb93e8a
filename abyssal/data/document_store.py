"""Cleaned documents on disk: a JSONL for each source and each side of the held-out split, read again by number.

Owns the split and the budget of each source. Does not own what is fit (clean.py) or the order of reading (mix.py). The
folder appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Literal

from abyssal.data.clean import Cleaner, Counts
from abyssal.data.documents import Document, Source
from abyssal.data.held_out import is_held_out

Side = Literal["train", "held_out"]
HELD_OUT_SHARE = 0.05


class DocumentFile:
    """The documents of one source on one side, by number. Only their places are held in memory."""

    def __init__(self, directory: Path, *, source: str, number: int, side: Side) -> None:
        self.source = source
        self.number = number  # of the source
        self._path = path_of(directory, number, side)
        self._starts = array("q", [0])
        with open(self._path, "rb") as file:
            for line in file:
                self._starts.append(self._starts[-1] + len(line))

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def n_bytes(self) -> int:
        return self._starts[-1]

    def text(self, number: int) -> str:
        with open(self._path, "rb") as file:
            file.seek(self._starts[number])
            line = file.read(self._starts[number + 1] - self._starts[number])
        return str(json.loads(line)["text"])


def path_of(directory: Path, number: int, side: Side) -> Path:
    return directory / f"{number:02d}-{side}.jsonl"


def open_documents(directory: Path, side: Side) -> list[DocumentFile]:
    """What `write_documents` left, in the order of its sources."""
    names = json.loads((directory / "sources.json").read_text(encoding="utf-8"))
    return [DocumentFile(directory, source=name, number=k, side=side) for k, name in enumerate(names)]


def write_documents(
    directory: Path,
    sources: Sequence[Source],
    cleaner: Cleaner,
    *,
    max_bytes: Mapping[str, int],
    held_out_share: float = HELD_OUT_SHARE,
    on_document: Callable[[float], None] = lambda share_done: None,
) -> None:
    """Each source through the cleaner until `max_bytes` of it are kept for training (the last document is not cut).

    A source is read past that point only until it has a held-out document. `on_document` hears what share is done.
    """
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir(parents=True)
    try:
        _fill(partial, sources, cleaner, max_bytes=max_bytes, held_out_share=held_out_share, on_document=on_document)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fill(
    folder: Path,
    sources: Sequence[Source],
    cleaner: Cleaner,
    *,
    max_bytes: Mapping[str, int],
    held_out_share: float,
    on_document: Callable[[float], None],
) -> None:
    expected = [max(1, min(max_bytes[source.name], source.n_bytes)) for source in sources]
    for k, source in enumerate(sources):
        with ExitStack() as stack:
            files: dict[Side, BinaryIO] = {
                side: stack.enter_context(open(path_of(folder, k, side), "wb")) for side in ("train", "held_out")
            }
            for share_done in _judged(
                source, cleaner, files, max_bytes=max_bytes[source.name], held_out_share=held_out_share
            ):
                on_document((sum(expected[:k]) + share_done * expected[k]) / sum(expected))
            n_train = files["train"].tell()
        on_document(sum(expected[: k + 1]) / sum(expected))
        if n_train == 0:
            raise ValueError(nothing_left(source.name, cleaner.counts.get(source.name, Counts())))
    if all(path_of(folder, k, "held_out").stat().st_size == 0 for k in range(len(sources))):
        names = ", ".join(source.name for source in sources)  # so small that the hash held none of it out
        raise ValueError(f"corpus {names} has no held_out document; add documents to it")
    (folder / "sources.json").write_text(json.dumps([source.name for source in sources]), encoding="utf-8")


def _judged(
    source: Source, cleaner: Cleaner, files: Mapping[Side, BinaryIO], *, max_bytes: int, held_out_share: float
) -> Iterator[float]:
    """Writes what is kept, document by document; yields the share of the source that is done."""
    n_read = n_train = 0
    any_held_out = False
    for document in source.documents():
        side: Side = "held_out" if is_held_out(document.text, held_out_share) else "train"
        if n_train >= max_bytes:
            if any_held_out:
                return
            if side == "train":
                continue
        n_bytes = len(document.text.encode())
        n_read += n_bytes
        if cleaner.keeps(document, source.name):
            files[side].write(as_line(document))
            n_train += n_bytes if side == "train" else 0
            any_held_out |= side == "held_out"
        yield min(1.0, max(n_train / max_bytes, n_read / max(1, source.n_bytes)))


def as_line(document: Document) -> bytes:
    return json.dumps({"name": document.name, "text": document.text}, ensure_ascii=False).encode() + b"\n"


def nothing_left(name: str, counts: Counts) -> str:
    """Why a source gives nothing to train on, in one line."""
    if not counts.read:
        return f"corpus {name} holds no text; add documents to it"
    reasons = ", ".join(f"{n} {reason}" for reason, n in counts.refused.most_common())
    if counts.kept:
        return f"corpus {name} keeps no document for training: of {counts.read}, {counts.kept} are held out" + (
            f" and the others refused ({reasons}); add documents to it" if reasons else "; add documents to it"
        )
    return f"all {counts.read} documents of corpus {name} were refused: {reasons}; see data.clean, or add documents"
