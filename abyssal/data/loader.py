"""Token files on disk, and rows of them in an order that can be stopped and taken up again.

`TokenWriter` writes a folder of shards (tokens, loss masks, index.json) that appears whole or not at all;
`TokenShards` opens and checks it; `RowLoader` deals its rows. Letters: B rows of a step, T tokens of a row.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor


class TokenWriter:
    """Writes token files; use as a context manager. Leaving it by an error leaves what was there before."""

    def __init__(self, directory: str | os.PathLike[str], *, vocab_size: int, shard_tokens: int = 1 << 28) -> None:
        self.directory = Path(directory)
        self.n_tokens = 0
        self._partial = self.directory.with_name(self.directory.name + ".partial")
        self._vocab_size = vocab_size
        self._dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self._shard_tokens = shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._files: list[_HashedFile] = []

    def __enter__(self) -> TokenWriter:
        shutil.rmtree(self._partial, ignore_errors=True)  # left by a process that was killed
        try:
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise self._failure(error) from None
        return self

    def add(self, ids: Sequence[int], mask: Sequence[int] | None = None) -> None:
        """Append a document; `mask` is 1 for each token that is to be learned as a target, and all 1 if not given."""
        ids_T = np.asarray(ids, dtype=np.int64)
        mask_T = np.ones(len(ids_T), np.uint8) if mask is None else np.asarray(mask, dtype=np.uint8)
        assert ids_T.shape == mask_T.shape, (ids_T.shape, mask_T.shape)
        if len(ids_T) == 0:
            return
        assert 0 <= ids_T.min() <= ids_T.max() < self._vocab_size, "an id outside the vocabulary"
        try:
            if not self._files:
                number = f"{len(self._shards):05d}"
                self._files = [_HashedFile(self._partial / f"{kind}-{number}.bin") for kind in ("tokens", "mask")]
            self._files[0].write(ids_T.astype(self._dtype).tobytes())
            self._files[1].write(mask_T.tobytes())
            self.n_tokens += len(ids_T)
            if self._files[1].n_bytes >= self._shard_tokens:
                self._end_shard()
        except OSError as error:
            raise self._failure(error) from None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self._commit()
        except OSError as failure:
            raise self._failure(failure) from None
        finally:
            for file in self._files:
                file.abandon()
            shutil.rmtree(self._partial, ignore_errors=True)

    def _end_shard(self) -> None:
        tokens, mask = self._files
        self._shards.append({"n_tokens": mask.n_bytes, "tokens": tokens.close(), "mask": mask.close()})
        self._files = []

    def _commit(self) -> None:
        if self._files:
            self._end_shard()
        index = {
            "dtype": self._dtype.name,
            "vocab_size": self._vocab_size,
            "n_tokens": self.n_tokens,
            "shards": self._shards,
        }
        index_file = _HashedFile(self._partial / "index.json")
        index_file.write(json.dumps(index, indent=1).encode())
        index_file.close()
        _sync_folder(self._partial)
        replaced = self.directory.with_name(self.directory.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if self.directory.exists():  # a folder that holds files cannot be renamed over
            os.rename(self.directory, replaced)
        os.rename(self._partial, self.directory)
        _sync_folder(self.directory.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def _failure(self, error: OSError) -> OSError:
        return OSError(
            f"cannot write tokens to {self.directory}: {error.strerror}; "
            "free some space or choose another folder, nothing was left half-written"
        )


def _sync_folder(path: Path) -> None:
    """Make the names in a folder last through a power cut, as fsync does for the content of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _HashedFile:
    """A file being written, its length and its hash."""

    def __init__(self, path: Path) -> None:
        self.n_bytes = 0
        self._path = path
        self._hash = hashlib.sha256()
        self._file: BinaryIO = open(path, "wb")

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.n_bytes += len(data)

    def close(self) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"file": self._path.name, "n_bytes": self.n_bytes, "sha256": self._hash.hexdigest()}

    def abandon(self) -> None:
        try:
            self._file.close()
        except OSError:  # closing writes what is buffered, and the disk is still full
            pass


class TokenShards:
    """Token files opened for reading, each checked against the index."""

    def __init__(self, directory: str | os.PathLike[str], *, check: Literal["content", "size"] = "content") -> None:
        self.directory = Path(directory)
        path = self.directory / "index.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; run the stage that writes these tokens again")
        try:
            index = json.loads(path.read_bytes())
            self.vocab_size: int = index["vocab_size"]
            self.n_tokens: int = index["n_tokens"]
            dtype = np.dtype(index["dtype"])
            for shard in index["shards"]:
                for kind in ("tokens", "mask"):
                    _check_file(self.directory / shard[kind]["file"], shard[kind], check)
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError):
            raise ValueError(f"{path} is damaged; {_REMEDY}") from None
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()  # the index holds every file's hash
        self.tokens = [self._map(shard["tokens"]["file"], dtype) for shard in index["shards"]]
        self.masks = [self._map(shard["mask"]["file"], np.dtype(np.uint8)) for shard in index["shards"]]

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
        return np.memmap(self.directory / name, dtype=dtype, mode="r")


_REMEDY = "delete its folder and run the stage that writes these tokens again"


def _check_file(path: Path, want: dict[str, Any], check: Literal["content", "size"]) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {_REMEDY}")
    size = path.stat().st_size
    if size != want["n_bytes"]:
        raise ValueError(f"{path} has {size} bytes instead of {want['n_bytes']}; {_REMEDY}")
    if check == "content":
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != want["sha256"]:
                raise ValueError(f"{path} was altered (its sha256 is not the index's); {_REMEDY}")


class Rows(NamedTuple):
    """One step's rows."""

    ids_BT: Tensor  # int64
    mask_BT: Tensor  # bool: this token is a target


class RowLoader:
    """Rows of `row_len` tokens, every row once an epoch, each epoch in another order.

    `position` counts the rows dealt since the start of training; it alone says what comes next.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        row_len: int,
        rows_per_step: int,
        seed: int,
        check: Literal["content", "size"] = "content",
    ) -> None:
        if row_len < 2 or rows_per_step < 1:
            raise ValueError(f"row_len={row_len} and rows_per_step={rows_per_step}; use at least 2 and 1")
        self.shards = TokenShards(directory, check=check)
        self.row_len = row_len
        self.rows_per_step = rows_per_step
        self.position = 0
        self._seed = seed
        ends = np.cumsum([len(tokens) // row_len for tokens in self.shards.tokens], dtype=np.int64)
        self._row_ends = ends  # of each shard; a row never crosses from one into the next
        self.n_rows = int(ends[-1]) if len(ends) else 0
        if self.n_rows == 0:
            raise ValueError(f"{directory}: {self.shards.n_tokens} tokens do not fill one row of {row_len}; add text")

    @property
    def epoch(self) -> int:
        return self.position // self.n_rows

    def next(self, n_rows: int | None = None) -> Rows:
        """The next `n_rows` rows, or `rows_per_step`; goes over into the next epoch where one ends."""
        n_rows = self.rows_per_step if n_rows is None else n_rows
        found = [self._row(self.position + i) for i in range(n_rows)]
        self.position += n_rows
        ids_BT = torch.from_numpy(np.stack([ids for ids, _ in found]).astype(np.int64))
        return Rows(ids_BT, torch.from_numpy(np.stack([mask for _, mask in found]).astype(bool)))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position} | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a loader over the same rows stopped; another step size is fine, other rows are not."""
        for key, value in self._identity().items():
            if state[key] != value:
                raise ValueError(
                    f"cannot resume on {self.shards.directory}: {key} was {state[key]} and is {value}; "
                    "put it back or start the stage anew"
                )
        self.position = int(state["position"])

    def _identity(self) -> dict[str, Any]:
        return {"seed": self._seed, "row_len": self.row_len, "tokens_sha256": self.shards.fingerprint}

    def _row(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, index = divmod(position, self.n_rows)
        row = shuffled_index(index, self.n_rows, key=f"{self._seed}:{epoch}")
        shard = int(np.searchsorted(self._row_ends, row, side="right"))
        start = (row - (int(self._row_ends[shard - 1]) if shard else 0)) * self.row_len
        window = slice(start, start + self.row_len)
        return self.shards.tokens[shard][window], self.shards.masks[shard][window]


def shuffled_index(index: int, n: int, *, key: str) -> int:
    """Where `index` goes when 0..n-1 are shuffled by `key`, without holding the shuffled list.

    A Feistel network permutes the next power of four; walking it until it lands below n permutes 0..n-1. Unlike a
    library's generator it can never change under a run that is being resumed.
    """
    assert 0 <= index < n
    half = ((n - 1).bit_length() + 1) // 2
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for i in range(4):
            digest = hashlib.blake2b(f"{key}:{i}:{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest) & low)
        index = left << half | right
        if index < n:
            return index
