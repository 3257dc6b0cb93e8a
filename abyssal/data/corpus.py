"""Documents for pretraining: from this Python installation, a folder, or a JSONL file, as text and then as ids.

Owns reading order, the held-out split of documents and fill-in-the-middle. Does not own packing (pack.py, loader.py).
"""

from __future__ import annotations

import ast
import hashlib
import os
import random
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from abyssal.data.held_out import is_held_out
from abyssal.data.jsonl import read_jsonl
from abyssal.tokens.tokenizer import Tokenizer

Split = Literal["train", "held_out"]

PROSE = ".txt .text .md .markdown .rst .tex .html .org"
CODE = ".py .c .h .cc .cpp .hpp .cu .rs .go .java .kt .js .ts .rb .lua .sh"
READABLE = frozenset(f"{PROSE} {CODE} .jsonl".split())
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests", "testing", "idle_test"})
PIECE_CHARS = 1 << 20  # a longer file becomes several documents, so that reading stays a stream
INSTALLED_BYTES = range(200, 300_000)  # below: empty packages; above: generated tables
PROSE_CHARS = 400  # documentation strings that make a page


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text; `name` says where it came from."""

    text: str
    name: str


def read_corpus(
    source: str,
    *,
    max_bytes: int,
    seed: int,
    split: Split = "train",
    held_out_share: float = 0.05,
) -> Iterator[Document]:
    """Stream the documents of one side of the split until `max_bytes` are reached (the last one is not cut).

    `source` is "python" (source, documentation strings and readmes of this installation), a folder of text and JSONL
    files, or one JSONL file with {"text": ...}. Files come in an order that depends on `seed` and their names alone;
    a text that was seen before is left out.
    """
    if max_bytes <= 0:
        raise ValueError(f"max_bytes={max_bytes} leaves no text; give a positive number of bytes")
    path = Path(source)
    if source == "python":
        documents = _installed_documents(seed)
    elif path.is_dir():
        documents = _folder_documents(path, seed)
    elif not path.exists():
        raise FileNotFoundError(f'corpus {source} does not exist; name a folder, a .jsonl file, or "python"')
    elif path.suffix == ".jsonl":
        documents = _jsonl_documents(path)
    else:
        raise ValueError(f"corpus {source} is neither a folder nor a .jsonl file; name its folder")
    return _one_side(documents, source, max_bytes=max_bytes, split=split, share=held_out_share)


def _one_side(
    documents: Iterable[Document], source: str, *, max_bytes: int, split: Split, share: float
) -> Iterator[Document]:
    seen: set[bytes] = set()
    n_bytes = 0
    for document in documents:
        raw = document.text.encode()
        digest = hashlib.blake2b(raw, digest_size=16).digest()
        if not raw.strip() or digest in seen:
            continue
        seen.add(digest)
        if is_held_out(document.text, share) != (split == "held_out"):
            continue
        yield document
        n_bytes += len(raw)
        if n_bytes >= max_bytes:
            return
    if not seen:
        raise ValueError(f"corpus {source} holds no text; add documents to it")
    if n_bytes == 0 and split == "train":
        raise ValueError(f"all {len(seen)} documents of corpus {source} are held out; add documents to it")


def _shuffled(root: Path, label: str, paths: Iterable[Path], seed: int) -> list[tuple[bytes, str, Path]]:
    """Sorted by a hash of seed and name: the same on every machine, and a new file moves no other."""
    keyed = []
    for path in paths:
        name = f"{label}/{path.relative_to(root).as_posix()}"
        keyed.append((hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest(), name, path))
    return sorted(keyed)


def _folder_documents(folder: Path, seed: int) -> Iterator[Document]:
    found = [path for path in folder.rglob("*") if path.suffix.lower() in READABLE and path.is_file()]
    if not found:
        raise ValueError(f"corpus {folder} has no text file (.txt .md .py .jsonl ...); put documents there")

    def stream() -> Iterator[Document]:
        for _, name, path in _shuffled(folder, folder.name, found, seed):
            yield from _jsonl_documents(path) if path.suffix == ".jsonl" else _text_documents(path, name)

    return stream()


def _text_documents(path: Path, name: str) -> Iterator[Document]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            rest = ""
            while piece := file.read(PIECE_CHARS):
                rest += piece
                while len(rest) > PIECE_CHARS:
                    cut = max(rest.rfind("\n\n", 0, PIECE_CHARS) + 2, rest.rfind("\n", 0, PIECE_CHARS) + 1)
                    cut = cut if cut > PIECE_CHARS // 2 else PIECE_CHARS  # no line break near: cut where it is
                    yield Document(text=rest[:cut], name=name)
                    rest = rest[cut:]
            if rest:
                yield Document(text=rest, name=name)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8; convert it or take it out of the corpus") from None


def _jsonl_documents(path: Path) -> Iterator[Document]:
    for where, record in read_jsonl(path):
        text = record.get("text")
        if not isinstance(text, str):
            raise ValueError(f'{where}: no "text" string; write {{"text": "..."}} on each line')
        text = text.encode("utf-8", "replace").decode()  # JSON can escape half a character, which no bytes can hold
        yield Document(text=text, name=where)


def _installed_documents(seed: int) -> Iterator[Document]:
    """One document a file, either its source or its documentation strings, so that nothing is read twice."""
    paths = sysconfig.get_paths()
    roots = {Path(paths["stdlib"]): "stdlib", Path(paths["purelib"]): "site", Path(paths["platlib"]): "site"}
    keyed = [item for root, label in roots.items() for item in _shuffled(root, label, _installed_files(root), seed)]
    for _, name, path in sorted(keyed):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # not a text of the user's: an old encoding or a file without permission is no error here
        if path.name == "METADATA":
            text = text.partition("\n\n")[2]  # headers, blank line, readme
        elif path.suffix == ".py" and is_held_out(name, share=0.5):  # any even coin that no seed turns
            text = documentation(text) or text
        if len(text) >= INSTALLED_BYTES.start:
            yield Document(text=text, name=name)


def _installed_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name.lower() not in SKIPPED_FOLDERS]
        for name in names:
            path = Path(folder, name)
            if folder.endswith(".dist-info"):
                wanted = name == "METADATA"
            else:
                wanted = path.suffix in (".py", ".md", ".rst") and not name.upper().startswith(("LICEN", "TEST_"))
            if wanted and path.stat().st_size in INSTALLED_BYTES:
                yield path


def documentation(source: str) -> str:
    """The documentation strings of a Python file as a page of prose, or "" where they do not make one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in other people's code are not our user's business
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    parts = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if text := ast.get_docstring(node):
                parts.append(text if isinstance(node, ast.Module) else f"{node.name}: {text}")
    page = "\n\n".join(parts) + "\n"
    return page if len(page) >= PROSE_CHARS else ""


def fill_in_the_middle(text: str, rng: random.Random) -> tuple[str, str, str]:
    """Cut a document at two random characters: (prefix, middle, suffix)."""
    start, end = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
    return text[:start], text[start:end], text[end:]


def document_ids(text: str, tokenizer: Tokenizer, rng: random.Random, fim_rate: float) -> list[int]:
    """A document as it is trained on: its ids and the end token; with `fim_rate` as begin, prefix, hole, suffix, end,
    middle (PSM order)."""
    return next(encode_documents([text], tokenizer, rng, fim_rate))


def encode_documents(
    texts: Iterable[str], tokenizer: Tokenizer, rng: random.Random, fim_rate: float
) -> Iterator[list[int]]:
    """`document_ids` of each text in order, encoded many at a time on all cores."""
    if not 0 <= fim_rate <= 1:
        raise ValueError(f"fim_rate={fim_rate} is outside [0, 1]")
    texts = iter(texts)
    while batch := list(islice(texts, 256)):
        cut = [fill_in_the_middle(text, rng) if rng.random() < fim_rate else (text,) for text in batch]
        encoded = iter(tokenizer.encode_batch([piece for pieces in cut for piece in pieces]))
        for pieces in cut:
            if len(pieces) == 1:
                yield [*next(encoded), tokenizer.eos_id]
                continue
            prefix, middle, suffix = next(encoded), next(encoded), next(encoded)
            yield [
                *(tokenizer.fim_begin_id, *prefix, tokenizer.fim_hole_id, *suffix),
                *(tokenizer.fim_end_id, *middle, tokenizer.eos_id),
            ]
