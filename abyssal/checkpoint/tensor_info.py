"""What a file says of a tensor before it is read."""

from __future__ import annotations

from typing import NamedTuple


class TensorInfo(NamedTuple):
    """`stored` is the format's own name of the number type: BF16, F8_E4M3, Q4_1."""

    shape: tuple[int, ...]
    stored: str
