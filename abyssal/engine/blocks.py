"""Paged cache: which blocks are free and how many owners each used one has (PagedAttention's block manager).

Owns block ids and reference counts. Does not own tensors: see `model/cache.py`; nor who holds a block: see
`scheduler.py`. Block 0 is nobody's: padding tokens write there and columns past a sequence's end read from it.
"""

from __future__ import annotations

import numpy as np

TRASH_BLOCK = 0


def blocks_for(n_tokens: int, block_size: int) -> int:
    """Blocks that n_tokens entries fill, the last one perhaps in part."""
    return -(-n_tokens // block_size)


class BlockPool:
    def __init__(self, n_blocks: int) -> None:
        if n_blocks < 2:
            raise ValueError(f"n_blocks={n_blocks} leaves no block besides the reserved one; use at least 2")
        self.n_blocks = n_blocks
        self._free = np.arange(n_blocks - 1, TRASH_BLOCK, -1, dtype=np.int64)  # a stack: its first n_free entries
        self._owners = np.zeros(n_blocks, dtype=np.int64)
        self.n_free = n_blocks - 1

    @property
    def n_usable(self) -> int:
        """All blocks but the trash."""
        return self.n_blocks - 1

    def take(self, n: int) -> np.ndarray:
        """n free blocks, now with one owner each."""
        assert 0 <= n <= self.n_free, f"{n} blocks asked, {self.n_free} free"
        self.n_free -= n
        ids = self._free[self.n_free : self.n_free + n].copy()
        self._owners[ids] = 1
        return ids

    def share(self, ids: np.ndarray) -> None:
        """One more owner of each. Only full blocks are shared: nothing is ever written to a block with two owners."""
        assert (self._owners[ids] > 0).all(), f"shared a free block among {ids}"
        self._owners[ids] += 1

    def release(self, ids: np.ndarray) -> None:
        """One owner less; a block without owners is free again. `ids` names no block twice."""
        assert (self._owners[ids] > 0).all(), f"released a free block among {ids}"
        self._owners[ids] -= 1
        freed = ids[self._owners[ids] == 0]
        self._free[self.n_free : self.n_free + len(freed)] = freed
        self.n_free += len(freed)
