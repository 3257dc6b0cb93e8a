"""Documentation that packages bring: found, one format a manual, as plain documents.

Owns which files of a documentation tree are worth reading. Does not own formats (markup.py) or fetching (debian.py).
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from abyssal.data.documents import PIECE_CHARS, Document, Source, in_seeded_order, pieces_of
from abyssal.data.markup import PLAIN, from_wordnet

ROOTS = ("/usr/share/doc", "/usr/share/perl", "/usr/share/perl5", "/usr/share/man", "/usr/local/share/doc")
TEXT = frozenset(".txt .md .rst .pod .dict".split())
PROGRAMS_WITH_POD = frozenset({".pm", ".pl"})
PAGES = frozenset({".html", ".htm", ".xhtml"})
NAMES = frozenset({"README", "FAQ", "NEWS", "INSTALL", "TODO"})  # text files without a suffix
NEVER = ("changelog", "licen", "copying", "copyright")
BOOK_CHARS = 8_000  # a dictionary is one file: its documents are as long as a page of two


def suffix_of(path: Path) -> str:
    """The format's suffix, beneath the packing's; a man page's section without its letters (.3perl -> .3)."""
    name = path.name.removesuffix(".gz").removesuffix(".dz")
    suffix = Path(name).suffix.lower()
    return suffix[:2] if suffix[1:2].isdigit() and path.parent.name.startswith("man") else suffix


def readable(root: Path) -> list[Path]:
    """The text files under a package's folder in one format: what is written plainly goes before HTML and man pages.

    Most manuals come in several formats; a plain form of at least a tenth of the pages' size is taken to be the whole.
    """
    plain: list[Path] = []
    pages: list[Path] = []
    man: list[Path] = []
    for path in root.rglob("*"):
        suffix, name = suffix_of(path), path.name.lower()
        if name.startswith(NEVER) or path.is_symlink() or not path.is_file():
            continue
        if suffix in TEXT | PROGRAMS_WITH_POD or path.name.split(".")[0] in NAMES or is_wordnet(path):
            plain.append(path)
        elif suffix in PAGES:
            pages.append(path)
        elif suffix[1:].isdigit() and suffix in PLAIN and path.parent.name == f"man{suffix[1:]}":
            man.append(path)
    if size(plain) * 10 >= size(pages):
        pages = []
    return plain + pages + (man if size(plain) + size(pages) < size(man) else [])


def is_wordnet(path: Path) -> bool:
    return path.parent.name == "wordnet" and path.name.startswith("data.")


def size(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def documents_of(path: Path, name: str) -> Iterator[Document]:
    """A documentation file as plain documents. One that cannot be read is nobody's mistake here; what is no UTF-8 in it
    becomes U+FFFD, which clean.py counts."""
    suffix = suffix_of(path)
    longest = BOOK_CHARS if suffix == ".dict" or is_wordnet(path) else PIECE_CHARS
    try:
        for piece in pieces_of(path, longest=longest, errors="replace"):
            text = from_wordnet(piece) if is_wordnet(path) else PLAIN.get(suffix, str)(piece)
            if text.strip():
                yield Document(text=text, name=name)
    except (OSError, EOFError):
        return


def documentation_source(name: str, roots: Mapping[Path, str], files: Mapping[Path, list[Path]], seed: int) -> Source:
    """All these files, those of different roots shuffled together."""

    def documents() -> Iterator[Document]:
        keyed = [item for root, label in roots.items() for item in in_seeded_order(root, label, files[root], seed)]
        for _, label, path in sorted(keyed):
            yield from documents_of(path, label)

    return Source(name=name, n_bytes=sum(size(found) for found in files.values()), documents=documents)


def docs_source(seed: int) -> Source:
    """The documentation of this machine: its packages' manuals, and the readmes of Python packages."""
    roots = {Path(root): root.rpartition("/")[2] for root in ROOTS if Path(root).is_dir()}
    files = {
        root: [path for package in sorted(root.iterdir()) if package.is_dir() for path in readable(package)]
        for root in roots
    }
    site = Path(sysconfig.get_paths()["purelib"])
    roots[site] = "site"
    files[site] = [path for path in site.rglob("*") if path.suffix in (".md", ".rst", ".txt") and path.is_file()]
    files[site] = [path for path in files[site] if not path.name.lower().startswith(NEVER)]
    if not any(files.values()):
        raise ValueError(
            f"no documentation found under {', '.join(ROOTS)}; install some, or take docs out of the corpus"
        )
    return documentation_source("docs", roots, files, seed)
