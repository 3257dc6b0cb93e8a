"""Paged cache: which blocks are free, how many owners each used one has, and what full ones hold (PagedAttention's
block manager with a prefix cache).

A full block may be remembered under a key of its tokens, all before them and the namespace they belong to. Without
owners it then stays as it is, counted as free, and is given to somebody else only when no empty block is left, the
longest unused first. A key is a cryptographic hash: nobody can make a prompt that finds a block of other tokens, and
who does not share a namespace finds nothing of it, so that no answer comes sooner because a stranger asked the same.
Owns block ids, reference counts and keys. Does not own tensors: see `model/cache.py`; nor who holds a block: see
`scheduler.py`. Block 0 is nobody's: padding tokens write there and columns past a sequence's end read from it.
"""

from __future__ import annotations

import hashlib
from itertools import islice
from typing import Protocol

import numpy as np

TRASH_BLOCK = 0
KEY_BYTES = 32  # as strong as SHA-256: no two blocks have one key


def blocks_for(n_tokens: int, block_size: int) -> int:
    """Blocks that n_tokens entries fill, the last one perhaps in part."""
    return -(-n_tokens // block_size)


def namespace_key(namespace: str) -> bytes:
    """The key before the first block of everything in a namespace."""
    name = namespace.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(name, digest_size=KEY_BYTES, person=b"namespace").digest()


def block_keys(ids: np.ndarray, block_size: int, key: bytes = b"") -> list[bytes]:
    """One key for each full block of a sequence: a hash of its ids and of the key before it, first the namespace's."""
    keys = []
    for end in range(block_size, len(ids) + 1, block_size):
        block = ids[end - block_size : end].astype("<i8", copy=False).tobytes()  # the same key on every machine
        key = hashlib.blake2b(key + block, digest_size=KEY_BYTES, person=b"block").digest()
        keys.append(key)
    return keys


class Tier(Protocol):
    """A slower store of full blocks under the same keys, asked for what is no longer in the cache."""

    most_blocks: int  # that a step may ask it to bring

    def find(self, keys: list[bytes]) -> int:
        """How many of these it has, counted from the first on without a gap."""

    def bring(self, keys: list[bytes], blocks: np.ndarray) -> int:
        """Fill these blocks with what it has under these keys; how many from the first on are now as computed."""

    def offer(self, keys: list[bytes], blocks: np.ndarray) -> None:
        """A sequence begins with these blocks, full and computed, known to it or not. They may change afterwards."""


class BlockPool:
    def __init__(self, n_blocks: int) -> None:
        if n_blocks < 2:
            raise ValueError(f"n_blocks={n_blocks} leaves no block besides the reserved one; use at least 2")
        self.n_blocks = n_blocks
        self._empty = np.arange(n_blocks - 1, TRASH_BLOCK, -1, dtype=np.int64)  # a stack: its first n_empty entries
        self._n_empty = n_blocks - 1
        self._owners = np.zeros(n_blocks, dtype=np.int64)
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: dict[int, None] = {}  # remembered and without owners, the longest unused first

    @property
    def n_usable(self) -> int:
        """All blocks but the trash."""
        return self.n_blocks - 1

    @property
    def n_free(self) -> int:
        """What `take` can give."""
        return self._n_empty + len(self._idle)

    def take(self, n: int) -> np.ndarray:
        """n free blocks, now with one owner each."""
        assert 0 <= n <= self.n_free, f"{n} blocks asked, {self.n_free} free"
        if n > self._n_empty:
            self._empty_idle(n - self._n_empty)
        self._n_empty -= n
        ids = self._empty[self._n_empty : self._n_empty + n].copy()
        self._owners[ids] = 1
        return ids

    def share(self, ids: np.ndarray) -> None:
        """One more owner of each. Only full blocks are shared: nothing is ever written to a block with two owners."""
        for block in ids[self._owners[ids] == 0].tolist():
            assert block in self._idle, f"shared a free block among {ids}"
            del self._idle[block]
        self._owners[ids] += 1

    def release(self, ids: np.ndarray) -> None:
        """One owner less; a block without owners is free again. `ids` names no block twice."""
        assert (self._owners[ids] > 0).all(), f"released a free block among {ids}"
        self._owners[ids] -= 1
        freed = ids[self._owners[ids] == 0]
        if self._key_of:
            is_kept = np.array([block in self._key_of for block in freed.tolist()], dtype=bool)
            for block in freed[is_kept][::-1].tolist():  # the end of a sequence goes before its beginning
                self._idle[block] = None
            freed = freed[~is_kept]
        self._push(freed)

    def remember(self, ids: np.ndarray, keys: list[bytes]) -> None:
        """These blocks are full, computed and will not change. A key that is known keeps the block it has."""
        for block, key in zip(ids.tolist(), keys, strict=True):
            if key not in self._block_of and block not in self._key_of:
                self._block_of[key], self._key_of[block] = block, key

    def find(self, keys: list[bytes]) -> np.ndarray:
        """The remembered blocks of the longest known beginning; `share` them to have them."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return np.array(found, dtype=np.int64)

    def n_idle(self, ids: np.ndarray) -> int:
        """How many of these count as free."""
        return len(self.idle(ids))

    def idle(self, ids: np.ndarray) -> np.ndarray:
        """Those that count as free."""
        found: np.ndarray = ids[self._owners[ids] == 0]
        return found

    def forget(self) -> None:
        """What blocks hold is no longer true, as after a change of weights."""
        self._push(np.array(list(self._idle), dtype=np.int64))
        self._idle.clear()
        self._block_of.clear()
        self._key_of.clear()

    def _empty_idle(self, n: int) -> None:
        blocks = list(islice(self._idle, n))
        for block in blocks:
            del self._idle[block], self._block_of[self._key_of.pop(block)]
        self._push(np.array(blocks, dtype=np.int64))

    def _push(self, ids: np.ndarray) -> None:
        self._empty[self._n_empty : self._n_empty + len(ids)] = ids
        self._n_empty += len(ids)
