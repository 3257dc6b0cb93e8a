"""The held-out split: a hash decides, so that no stage and no order of work can leak one side into the other."""

from __future__ import annotations

import hashlib


def is_held_out(text_or_key: str, share: float = 0.05) -> bool:
    """Whether a document (by its text) or a problem (by its key) is kept for evaluation only."""
    if not 0 <= share < 1:
        raise ValueError(f"share={share} of held-out data is outside [0, 1)")
    digest = hashlib.sha256(text_or_key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) < share * 2**64
