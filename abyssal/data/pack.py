"""Packing: many examples in rows of one length.

Two ways. Documents of pretraining are laid end to end and see each other, as in V3. Examples of SFT and RL share a row
but must not see each other: `segment` and `position` tell the model where each begins.

Letters: B rows, T tokens of a row, N examples.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Example(NamedTuple):
    """Ids, and 1 for each of them that is to be learned as a target."""

    ids: Sequence[int]
    mask: Sequence[int]


class PackedRows(NamedTuple):
    """Rows of isolated examples. `places` holds (row, start) of each example, (-1, -1) for one that was dropped."""

    ids_BT: Tensor  # int64, pad_id where nothing stands
    mask_BT: Tensor  # bool: this token is a target, predicted from the tokens before it
    segment_BT: Tensor  # int64: 0 is padding, 1.. numbers the examples of a row
    position_BT: Tensor  # int64: place within the example, 0 in padding
    places: list[tuple[int, int]]
    n_dropped: int


def pack_rows(docs: Iterable[Sequence[int]], *, row_len: int) -> Tensor:
    """Documents end to end in rows (B, T); the tail that fills no row is left out. [1,2],[3,4,5] by 2 -> 12, 34."""
    flat = [token for doc in docs for token in doc]
    n_rows = len(flat) // row_len
    if n_rows == 0:
        raise ValueError(f"{len(flat)} tokens do not fill one row of {row_len}; add text or shorten the rows")
    return torch.tensor(flat[: n_rows * row_len]).view(n_rows, row_len)


def pack_isolated(
    examples: Sequence[Example],
    *,
    row_len: int,
    pad_id: int,
    too_long: Literal["error", "drop"] = "error",
) -> PackedRows:
    """Best-fit decreasing: the longest example first, each into the row with the least room that still takes it.

    The first token of an example has nothing before it, so it is never a target.
    """
    lengths = [len(example.ids) for example in examples]
    for i, example in enumerate(examples):
        if len(example.mask) != lengths[i]:
            raise ValueError(f"example {i} has {lengths[i]} ids and {len(example.mask)} mask values")
        if lengths[i] == 0:
            raise ValueError(f"example {i} is empty; take it out")
        if lengths[i] > row_len and too_long == "error":
            raise ValueError(f"example {i} has {lengths[i]} tokens, a row holds {row_len}; shorten it or lengthen rows")
    places, n_rows = _best_fit(lengths, row_len)

    ids_BT = np.full((n_rows, row_len), pad_id, dtype=np.int64)
    mask_BT = np.zeros((n_rows, row_len), dtype=bool)
    segment_BT = np.zeros((n_rows, row_len), dtype=np.int64)
    position_BT = np.zeros((n_rows, row_len), dtype=np.int64)
    steps_T = np.arange(row_len)
    order = sorted((place, i) for i, place in enumerate(places) if place[0] >= 0)
    segment, last_row = 0, -1
    for (row, start), i in order:
        segment = segment + 1 if row == last_row else 1
        last_row, end = row, start + lengths[i]
        ids_BT[row, start:end] = examples[i].ids
        mask_BT[row, start + 1 : end] = np.asarray(examples[i].mask[1:], dtype=bool)
        segment_BT[row, start:end] = segment
        position_BT[row, start:end] = steps_T[: lengths[i]]
    return PackedRows(
        ids_BT=torch.from_numpy(ids_BT),
        mask_BT=torch.from_numpy(mask_BT),
        segment_BT=torch.from_numpy(segment_BT),
        position_BT=torch.from_numpy(position_BT),
        places=places,
        n_dropped=len(examples) - len(order),
    )


def _best_fit(lengths: list[int], row_len: int) -> tuple[list[tuple[int, int]], int]:
    """(row, start) of each length and the number of rows; a length above `row_len` gets (-1, -1)."""
    places = [(-1, -1)] * len(lengths)
    rooms: list[tuple[int, int]] = []  # (room left, row), sorted: the best fit is found by bisection
    n_rows = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[i]
        if length > row_len:
            continue
        at = bisect_left(rooms, (length, -1))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            room, row, n_rows = row_len, n_rows, n_rows + 1
        places[i] = (row, row_len - room)
        if room > length:
            insort(rooms, (room - length, row))
    return places, n_rows
