"""Texts as they come from a source: one document at a time, with a name, a kind and where the source is read from.

Owns what a document is, its order and how long files are cut. Does not own finding them (corpus.py, installed_docs.py).
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["prose", "code"]

PROSE = frozenset(".txt .text .md .markdown .rst .tex .html .org".split())
CODE = frozenset(".py .c .h .cc .cpp .hpp .cu .rs .go .java .kt .js .ts .rb .lua .sh".split())
PIECE_CHARS = 1 << 20  # a longer file becomes several documents, so that reading stays a stream


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text; `name` says where it came from. Code is judged by other rules than prose."""

    text: str
    name: str
    kind: Kind = "prose"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A place that documents come from, in the same order each time it is opened."""

    name: str
    n_bytes: int  # on disk, about: what progress is measured against
    documents: Callable[[], Iterator[Document]]


def in_seeded_order(root: Path, label: str, paths: Iterable[Path], seed: int) -> list[tuple[bytes, str, Path]]:
    """(key, name, path) sorted by a hash of seed and name: the same everywhere, and a new file moves no other."""
    keyed = []
    for path in paths:
        name = f"{label}/{path.relative_to(root).as_posix()}"
        keyed.append((hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest(), name, path))
    return sorted(keyed)


def kind_of(suffix: str) -> Kind:
    return "code" if suffix.lower() in CODE else "prose"


def pieces_of(path: Path, *, longest: int = PIECE_CHARS, errors: str = "strict") -> Iterator[str]:
    """A text file, packed or not, as pieces of at most `longest` characters, cut at an empty line or a line's end."""
    opened = gzip.open if path.suffix in (".gz", ".dz") else open  # .dz is gzip with an index of its own
    with opened(path, "rt", encoding="utf-8-sig", errors=errors) as file:
        rest = ""
        while more := file.read(longest):
            rest += more
            while len(rest) > longest:
                breaks = (rest.rfind("\n\n", 0, longest) + 2, rest.rfind("\n", 0, longest) + 1)
                cut = next((cut for cut in breaks if cut > longest // 2), longest)  # no break near: where it is
                yield rest[:cut]
                rest = rest[cut:]
        if rest:
            yield rest
