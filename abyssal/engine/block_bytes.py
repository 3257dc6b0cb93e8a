"""A block's entries in all layers, side by side in bytes, out of the cache's tensors and back into them.

What shares a block's slots goes with it: the entries of MTP modules, and the experts chosen, where they are recorded.
Letters: N blocks, X bytes of a block, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor


def block_width(stores: list[Tensor], block_size: int) -> int:
    """X."""
    return sum(block_size * store[0].numel() * store.dtype.itemsize for store in stores)


def read_blocks(stores: list[Tensor], blocks_N: Tensor, block_size: int) -> Tensor:
    """(N, X) uint8, a copy on the CPU."""
    return torch.cat(
        [_rows(store, block_size).index_select(0, blocks_N).view(torch.uint8) for store in stores], dim=1
    ).cpu()


def write_blocks(stores: list[Tensor], blocks_N: Tensor, block_size: int, bytes_NX: Tensor) -> None:
    """Put back what `read_blocks` gave, perhaps to other blocks."""
    widths = [block_width([store], block_size) for store in stores]
    for store, bytes_NW in zip(stores, bytes_NX.to(blocks_N.device).split(widths, dim=1), strict=True):
        # in the store's own type, because torch copies single bytes at a fifth of the speed
        _rows(store, block_size).index_copy_(0, blocks_N, bytes_NW.contiguous().view(store.dtype))


def _rows(store: Tensor, block_size: int) -> Tensor:
    """(S, ...) -> one row a block, the same memory."""
    return store.view(len(store) // block_size, -1)
