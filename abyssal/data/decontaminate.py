"""Evaluation items inside training text: a document that shares ten words in a row with one is refused.

As DeepSeekMath does (section 2.1): an item of fewer words than that is looked for as a whole; one of fewer than six
(there: three) not at all, since any text might hold it. Items and documents are compared without case, white space and
punctuation. Runs that stand in more than ten different items are the set's own wording ("answer with a number") and say
nothing about an item. Each of these cases is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from abyssal.data.normal_form import grams, words

SHORTEST = 6  # words
COMMON = 10  # items


@dataclass(frozen=True)
class Hit:
    """An evaluation item that a document holds a part of, and the words they share."""

    evaluation: str
    item: str
    words: str


class EvaluationItems:
    """All evaluation sets in use, by name, as runs of `n` words to look for."""

    def __init__(self, sets: Mapping[str, Iterable[str]], n: int) -> None:
        if n < SHORTEST:
            raise ValueError(f"data.clean.decontaminate={n} words stand anywhere; use {SHORTEST} or more, or 0")
        self.n_items: dict[str, int] = {}
        self.n_too_short = 0
        runs: list[tuple[str, str, str]] = []  # run, set, item
        for name, items in sets.items():
            distinct = dict.fromkeys(items)
            self.n_items[name] = len(distinct)
            for item in distinct:
                found = words(item)
                self.n_too_short += len(found) < SHORTEST
                if len(found) >= SHORTEST:
                    runs += [(run, name, item) for run in dict.fromkeys(grams(found, min(n, len(found))))]
        items_of = Counter(run for run, _ in {(run, item) for run, _, item in runs})
        self.n_common = sum(count > COMMON for count in items_of.values())
        # by their first six words, so that documents are walked through once whatever the lengths
        self._runs: dict[str, list[tuple[list[str], Hit]]] = {}
        for run, name, item in runs:
            if items_of[run] <= COMMON:
                split = run.split(" ")
                head = " ".join(split[:SHORTEST])
                self._runs.setdefault(head, []).append((split[SHORTEST:], Hit(name, item, run)))

    def find(self, document: list[str]) -> list[Hit]:
        """The items that a document, given as its words, holds a part of: each once, with the first run they share."""
        if self._runs.keys().isdisjoint(grams(document, SHORTEST)):  # nearly always, and five times faster than to look
            return []
        hits: dict[tuple[str, str], Hit] = {}
        for start, head in enumerate(grams(document, SHORTEST), start=SHORTEST):
            if head in self._runs:
                for tail, hit in self._runs[head]:
                    if document[start : start + len(tail)] == tail:
                        hits.setdefault((hit.evaluation, hit.item), hit)
        return list(hits.values())
