"""Where pretraining text comes from, by name: this Python installation, a folder, a JSONL, documentation, packages.

Owns finding and reading; and fill-in-the-middle, by which a text becomes ids. Does not own what is fit to train on
(clean.py), the held-out split (document_store.py) or packing (pack.py, loader.py).
"""

from __future__ import annotations

import ast
import os
import random
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from abyssal.data.debian import debian_source
from abyssal.data.documents import CODE, PROSE, Document, Source, in_seeded_order, kind_of, pieces_of
from abyssal.data.held_out import is_held_out
from abyssal.data.installed_docs import docs_source
from abyssal.data.jsonl import read_jsonl
from abyssal.tokens.tokenizer import Tokenizer

READABLE = PROSE | CODE | {".jsonl"}
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests", "testing", "idle_test"})
INSTALLED_BYTES = range(200, 300_000)  # below: empty packages; above: generated tables
PROSE_CHARS = 400  # documentation strings that make a page
BATCH_TEXTS, BATCH_CHARS = 256, 1 << 22  # encoded at a time: an encoded text takes a hundred times its memory


def open_source(name: str, *, seed: int) -> Source:
    """A source by its name in a recipe. Its files come in an order that depends on `seed` and their names alone.

    "python": source, documentation strings and readmes of this installation. "docs": the documentation installed on
    this machine. "debian:NAME,NAME": packages, fetched and unpacked, not installed. Else a folder of text and JSONL
    files, or one JSONL file with {"text": ...} on each line (write ./docs for a folder of that name).
    """
    path = Path(name)
    if name == "python":
        return _python_source(seed)
    if name == "docs":
        return docs_source(seed)
    if name.startswith("debian:"):
        return debian_source(name, seed)
    if path.is_dir():
        return _folder_source(name, path, seed)
    if not path.exists():
        raise FileNotFoundError(
            f'corpus {name} does not exist; name a folder, a .jsonl file, "python", "docs" or "debian:PACKAGE"'
        )
    if path.suffix != ".jsonl":
        raise ValueError(f"corpus {name} is neither a folder nor a .jsonl file; name its folder")
    return Source(name=name, n_bytes=path.stat().st_size, documents=partial(_jsonl_documents, path))


def _folder_source(name: str, folder: Path, seed: int) -> Source:
    found = [path for path in folder.rglob("*") if path.suffix.lower() in READABLE and path.is_file()]
    if not found:
        raise ValueError(f"corpus {folder} has no text file (.txt .md .py .jsonl ...); put documents there")

    def documents() -> Iterator[Document]:
        for _, label, path in in_seeded_order(folder, folder.name, found, seed):
            yield from _jsonl_documents(path) if path.suffix == ".jsonl" else _text_documents(path, label)

    return Source(name=name, n_bytes=sum(path.stat().st_size for path in found), documents=documents)


def _text_documents(path: Path, name: str) -> Iterator[Document]:
    try:
        for piece in pieces_of(path):
            yield Document(text=piece, name=name, kind=kind_of(path.suffix))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8; convert it or take it out of the corpus") from None


def _jsonl_documents(path: Path) -> Iterator[Document]:
    for where, record in read_jsonl(path):
        text = record.get("text")
        if not isinstance(text, str):
            raise ValueError(f'{where}: no "text" string; write {{"text": "..."}} on each line')
        text = text.encode("utf-8", "replace").decode()  # JSON can escape half a character, which no bytes can hold
        yield Document(text=text, name=where)


def _python_source(seed: int) -> Source:
    paths = sysconfig.get_paths()
    roots = {Path(paths["stdlib"]): "stdlib", Path(paths["purelib"]): "site", Path(paths["platlib"]): "site"}
    found = {root: list(_installed_files(root)) for root in roots}
    n_bytes = sum(path.stat().st_size for files in found.values() for path in files)

    def documents() -> Iterator[Document]:
        keyed = [item for root, label in roots.items() for item in in_seeded_order(root, label, found[root], seed)]
        for _, name, path in sorted(keyed):
            document = _installed_document(path, name)
            if document is not None and len(document.text) >= INSTALLED_BYTES.start:
                yield document

    return Source(name="python", n_bytes=n_bytes, documents=documents)


def _installed_document(path: Path, name: str) -> Document | None:
    """A file in one form, either its source or its documentation strings, so that nothing is read twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None  # not a text of the user's: an old encoding or a file without permission is no error here
    if path.name == "METADATA":
        text = text.partition("\n\n")[2]  # headers, blank line, readme
    elif path.suffix == ".py" and is_held_out(name, share=0.5):  # any even coin that no seed turns
        if page := documentation(text):
            return Document(text=page, name=name)
    return Document(text=text, name=name, kind=kind_of(path.suffix))


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
    for batch in _batches(texts):
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


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    n_chars = 0
    for text in texts:
        batch.append(text)
        n_chars += len(text)
        if len(batch) == BATCH_TEXTS or n_chars >= BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch
