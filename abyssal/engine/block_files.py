"""Blocks of the cache as files, one each. Nothing that happens to the files makes a wrong block of one.

    DIR/prefix_cache/            only its user may look inside
        lock                     held by the process that writes; the kernel lets go of it when that process dies
        <fingerprint>/           what entries depend on besides their tokens: `cache_fingerprint.py`
            <key>                MAGIC, SHA-256 of fingerprint, key and payload, the payload
            <key>.new            being written; renamed when it is whole

A record is used only if its length is right and its hash is: one that is torn, flipped, renamed or brought here from
other weights is removed when it is met. That is why nothing is ever synced: a power cut may cost blocks, never truth.
One process writes; others only read, which is safe because what a name holds never changes.
The modification time of a file is when it was last used. A block deep in a prompt counts as used a little earlier than
those before it, without which it can't be reached: so the end of a prompt is given up before its beginning, after
a restart too.
Owns the names and the room they take, over all fingerprints. Knows no tensors and no engine.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAGIC = b"abyssal block 1\n"
HASH_BYTES = 32
FOLDER = "prefix_cache"
IS_FINGERPRINT = re.compile(r"[0-9a-f]{64}").fullmatch
IS_KEY = re.compile(r"(?:[0-9a-f]{2}){1,64}").fullmatch
UNFINISHED = ".new"
PAGE = 4096  # what a file takes is a multiple of this
LEAVE = 0.95  # when it is too much, the oldest go until this share of the room is used
DEEPER_NS = 1000  # a block counts as used this much earlier than the one before it


class Record(NamedTuple):
    n_bytes: int
    used_ns: int


class BlockFiles:
    """`records` are changed by the thread that writes alone; others may ask whether a name is among them."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder / FOLDER, max_bytes
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_strangers(self.folder)
        self._lock = _locked(self.folder / "lock")
        self.n_bytes = self.n_evicted = 0
        self.records: dict[str, Record] = {}
        if self.is_owner:
            self._scan()
            self._make_room(0)

    @property
    def is_owner(self) -> bool:
        """Nobody else writes here, and this process may."""
        return self._lock is not None

    def close(self) -> None:
        """Let go of the lock. Reading goes on working."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def has(self, fingerprint: str, key: bytes) -> bool:
        return _name(fingerprint, key) in self.records if self.is_owner else self.exists(fingerprint, key)

    def exists(self, fingerprint: str, key: bytes) -> bool:
        """Asks the disk."""
        return (self.folder / _name(fingerprint, key)).exists()

    def read(self, fingerprint: str, key: bytes, payload: np.ndarray) -> bool:
        """Fill the bytes of `payload`. False: no such record any more, or one that can't be trusted."""
        head = bytearray(len(MAGIC) + HASH_BYTES)
        try:
            file = os.open(self.folder / _name(fingerprint, key), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            if os.fstat(file).st_size != len(head) + len(payload):
                return False
            n_read = os.preadv(file, [head, payload.data], 0)
        finally:
            os.close(file)
        return n_read == len(head) + len(payload) and head == MAGIC + _hash(fingerprint, key, payload)

    def write(self, fingerprint: str, key: bytes, payload: np.ndarray, *, used_ns: int) -> bool:
        """Add a record. False: it is there already, or larger than all the room."""
        name, n_bytes = _name(fingerprint, key), _taken(len(MAGIC) + HASH_BYTES + len(payload))
        if name in self.records or n_bytes > self.max_bytes:
            return False
        self._make_room(n_bytes)
        path, unfinished = self.folder / name, self.folder / (name + UNFINISHED)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(MAGIC + _hash(fingerprint, key, payload))
                file.write(payload.data)
            os.utime(unfinished, ns=(used_ns, used_ns))
            os.rename(unfinished, path)
        except OSError:
            with suppress(OSError):
                os.unlink(unfinished)
            raise
        self.records[name] = Record(n_bytes, used_ns)
        self.n_bytes += n_bytes
        return True

    def touch(self, fingerprint: str, keys: Sequence[bytes], *, now_ns: int) -> None:
        """A prompt that begins with these blocks was used."""
        for key, used_ns in zip(keys, times_of_use(now_ns, len(keys)), strict=True):
            name = _name(fingerprint, key)
            record = self.records.get(name)
            if record is not None:
                self.records[name] = record._replace(used_ns=used_ns)
                with suppress(OSError):  # the times are a help after a restart, no more
                    os.utime(self.folder / name, ns=(used_ns, used_ns))

    def discard(self, fingerprint: str, key: bytes) -> None:
        """Remove a record that could not be read."""
        self._remove(_name(fingerprint, key))

    def _scan(self) -> None:
        """Find what is there, oldest or newest, of these weights or others; sweep up what a killed writer left."""
        for fingerprint in os.scandir(self.folder):
            if not IS_FINGERPRINT(fingerprint.name) or not fingerprint.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(fingerprint):
                if IS_KEY(entry.name) and entry.is_file(follow_symlinks=False):
                    found = entry.stat(follow_symlinks=False)
                    record = Record(_taken(found.st_size), found.st_mtime_ns)
                    self.records[f"{fingerprint.name}/{entry.name}"] = record
                    self.n_bytes += record.n_bytes
                elif IS_KEY(entry.name.removesuffix(UNFINISHED)):
                    os.unlink(entry)

    def _make_room(self, n_bytes: int) -> None:
        """See that so many bytes more are not too many: remove what was not used for longest."""
        if self.n_bytes + n_bytes <= self.max_bytes:
            return
        for name in sorted(self.records, key=lambda name: self.records[name].used_ns):
            if self.n_bytes + n_bytes <= LEAVE * self.max_bytes:
                break
            self._remove(name)
            self.n_evicted += 1

    def _remove(self, name: str) -> None:
        record = self.records.pop(name, None)
        if record is None:
            return
        self.n_bytes -= record.n_bytes
        with suppress(FileNotFoundError):
            os.unlink(self.folder / name)


def times_of_use(now_ns: int, n: int) -> range:
    """Of the first n blocks of a prompt that is used now."""
    return range(now_ns, now_ns - n * DEEPER_NS, -DEEPER_NS)


def _name(fingerprint: str, key: bytes) -> str:
    return f"{fingerprint}/{key.hex()}"


def _taken(n_bytes: int) -> int:
    return -(-n_bytes // PAGE) * PAGE


def _hash(fingerprint: str, key: bytes, payload: np.ndarray) -> bytes:
    """SHA-256, because CPUs have instructions for it: twice as fast as BLAKE2 where it was measured."""
    digest = hashlib.sha256(bytes.fromhex(fingerprint) + len(key).to_bytes(1, "little") + key)
    digest.update(payload.data)
    return digest.digest()


def _refuse_strangers(folder: Path) -> None:
    """What people typed can be read out of the blocks, and blocks are believed: the folder must be ours alone."""
    found = os.stat(folder, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    if found.st_mode & 0o077:
        os.chmod(folder, 0o700)


def _locked(path: Path) -> int | None:
    """An open file that nobody else has locked, or None."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except OSError:  # a file system without locks
        os.close(file)
        raise
    return file
