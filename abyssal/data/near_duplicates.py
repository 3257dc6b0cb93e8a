"""Near duplicates: documents that share most of their runs of five words. (MinHash: Broder 1997)

A document's set of runs is sketched in 128 numbers, so that two sketches agree in as large a share of places as the
sets overlap (Jaccard), give or take 0.04. Sketches that agree in a whole band of four places are candidates, found by
hash and then compared place by place. Sketches and bands are the library rensa's; 2.5 kB stay in memory per document.
"""

from __future__ import annotations

from typing import NamedTuple

N_PLACES = 128
N_BANDS = 32  # of four places: of pairs that overlap by 0.6, 99 in 100 meet in one at least; at 0.8 practically all do
SEED = 1  # of the hash functions; one seed for all, so that a corpus is cleaned the same way in every run


class Near(NamedTuple):
    """The document met before, and the share of runs in common."""

    name: str
    overlap: float


class NearDuplicates:
    """Remembers the documents it was shown."""

    def __init__(self, threshold: float) -> None:
        try:
            import rensa
        except ImportError:
            raise ValueError(
                f"data.clean.near_duplicates={threshold} needs the package rensa; "
                "pip install 'abyssal[data]', or set it to 0"
            ) from None
        self._sketch = rensa.RMinHash
        self._threshold = threshold
        self._bands = rensa.RMinHashLSH(threshold, N_PLACES, N_BANDS)
        self._kept: list[tuple[str, rensa.RMinHash]] = []

    def find(self, name: str, runs: list[str]) -> Near | None:
        """The most alike of the documents remembered, if it is like enough; else this one is remembered too."""
        if not runs:  # nothing to compare by; exact duplicates are found elsewhere
            return None
        sketch = self._sketch(N_PLACES, SEED)
        sketch.update(runs)
        found = [(sketch.jaccard(self._kept[key][1]), -key) for key in self._bands.query(sketch)]
        overlap, key = max(found, default=(0.0, 0))
        if overlap >= self._threshold:
            return Near(self._kept[-key][0], overlap)
        self._bands.insert(len(self._kept), sketch)
        self._kept.append((name, sketch))
        return None
