"""Sources mixed by weight into one endless stream of documents that can be stopped and taken up again.

The next document comes from the source that is furthest behind its weight in bytes. So at every point the share of each
source is its weight to within one document of each source, not only on average as with dice. Within a source every
document comes once an epoch, each epoch in another order. What comes next is a function of the seed and of a few whole
numbers (`state_dict`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from abyssal.data.document_store import DocumentFile
from abyssal.data.loader import shuffled_index


class Drawn(NamedTuple):
    text: str
    source: int  # its place among the sources


class Mixture:
    """An iterator that never ends. A source without documents on this side gives its share to the others."""

    def __init__(self, files: Sequence[DocumentFile], weights: Mapping[str, float], *, seed: int) -> None:
        self.files = [file for file in files if len(file)]
        if not self.files:
            raise ValueError("none of the sources has a document on this side of the split; add documents")
        self._weights = [weights[file.source] for file in self.files]
        self._seed = seed
        self._n_drawn = [0] * len(self.files)
        self._n_bytes = [0] * len(self.files)

    def __iter__(self) -> Iterator[Drawn]:
        return self

    def __next__(self) -> Drawn:
        k = min(range(len(self.files)), key=lambda k: self._n_bytes[k] / self._weights[k])
        file = self.files[k]
        epoch, place = divmod(self._n_drawn[k], len(file))
        text = file.text(shuffled_index(place, len(file), key=f"{self._seed}:{file.number}:{epoch}"))
        self._n_drawn[k] += 1
        self._n_bytes[k] += len(text.encode())
        return Drawn(text, k)

    def state_dict(self) -> dict[str, Any]:
        return {"n_drawn": list(self._n_drawn), "n_bytes": list(self._n_bytes)} | self._identity()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a mixture of the same documents stopped; others are refused."""
        for key, value in self._identity().items():
            if state[key] != value:
                raise ValueError(
                    f"cannot take up the mix: its {key} was {state[key]} and is {value}; "
                    "put it back or begin the mix anew"
                )
        self._n_drawn, self._n_bytes = list(state["n_drawn"]), list(state["n_bytes"])

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "weights": list(self._weights),
            "documents": [[file.source, len(file), file.n_bytes] for file in self.files],
        }
