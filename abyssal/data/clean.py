"""Data made fit: each document is kept, or refused for one reason that is counted.

In this order: empty, exact duplicate, quality, language, evaluation item, near duplicate. Documents are streamed; what
stays in memory is a hash and a sketch of each, some 3 kB. Duplicates are looked for across all sources and across the
held-out split, so that no held-out text has a twin in training; the ten-word rule is not applied between the two sides
of a corpus, since licences and idioms stand everywhere. (DeepSeek-V3 section 4.1; DeepSeekMath section 2.1)
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from abyssal.data.decontaminate import EvaluationItems, Hit
from abyssal.data.documents import Document
from abyssal.data.language import Languages
from abyssal.data.near_duplicates import NearDuplicates
from abyssal.data.normal_form import canonical, grams, words
from abyssal.data.quality import QualityLimits, fault_of

N_EXAMPLES = 20  # of duplicates, and of documents refused for quality, in the report
N_HITS = 200


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """What a document must pass. Exact duplicates and empty texts are always left out."""

    near_duplicates: float = 0.8  # share of runs of five words in common that makes two documents one; 0: not asked
    decontaminate: int = 10  # words in a row that may not be an evaluation item's; 0: not asked
    quality: bool = True
    limits: QualityLimits = field(default_factory=QualityLimits)
    identify_languages: bool = True
    languages: tuple[str, ...] = ()  # ISO 639 codes of the prose that is kept; none: all

    def __post_init__(self) -> None:
        if not 0 <= self.near_duplicates <= 1:
            raise ValueError(f"data.clean.near_duplicates={self.near_duplicates} is a share; give a number from 0 to 1")
        if self.decontaminate < 0:
            raise ValueError(f"data.clean.decontaminate={self.decontaminate} is negative; use 0 to switch it off")
        if self.languages and not self.identify_languages:
            raise ValueError(
                f"data.clean.languages={list(self.languages)} needs identify_languages=true, or no text would be asked"
            )


@dataclass
class Counts:
    """What became of the documents of one source, or of all."""

    read: int = 0
    read_bytes: int = 0
    kept: int = 0
    kept_bytes: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        reasons = dict(self.refused.most_common())
        sizes = {"read_bytes": self.read_bytes, "kept_bytes": self.kept_bytes}
        return {"read": self.read, "kept": self.kept, **sizes, "refused": reasons}


class Cleaner:
    """Judges documents one after the other and keeps the account."""

    def __init__(self, config: CleanConfig, evaluation: Mapping[str, Iterable[str]]) -> None:
        self.config = config
        self.counts: dict[str, Counts] = {}  # by source
        self.languages: Counter[str] = Counter()
        self.hits: list[tuple[str, Hit]] = []  # document, item
        self.examples: dict[str, list[dict[str, Any]]] = {}  # by reason
        self._hit_items: set[tuple[str, str]] = set()
        self._seen: dict[bytes, str] = {}  # hash of a text -> its document's name
        self._items = EvaluationItems(evaluation, config.decontaminate) if config.decontaminate else None
        self._near = NearDuplicates(config.near_duplicates) if config.near_duplicates else None
        self._languages = Languages() if config.identify_languages else None
        if self._languages and (unknown := set(config.languages) - self._languages.known - {"und"}):
            raise ValueError(f"data.clean.languages: {sorted(unknown)} are not known; use ISO 639 codes such as en, zh")

    def keeps(self, document: Document, source: str) -> bool:
        """Whether the document is fit; either way it is counted."""
        counts = self.counts.setdefault(source, Counts())
        n_bytes = len(document.text.encode())
        counts.read += 1
        counts.read_bytes += n_bytes
        if reason := self._fault(document):
            counts.refused[reason] += 1
            return False
        counts.kept += 1
        counts.kept_bytes += n_bytes
        return True

    def _fault(self, document: Document) -> str | None:
        plain = canonical(document.text)
        if not plain:
            return "empty"
        digest = hashlib.blake2b(plain.encode(), digest_size=12).digest()
        if digest in self._seen:
            return self._example("exact duplicate", document, of=self._seen[digest])
        self._seen[digest] = document.name
        found = words(document.text)
        runs = list(grams(found, 5))
        if self.config.quality and (fault := fault_of(document, found, runs, self.config.limits)):
            return self._example(fault, document)
        if self._languages:
            language = "code" if document.kind == "code" else self._languages.of(document.text)
            self.languages[language] += 1
            if self.config.languages and language not in (*self.config.languages, "code"):
                return self._example("language", document, language=language)
        if self._items and (hits := self._items.find(found)):
            self.hits += [(document.name, hit) for hit in hits][: N_HITS - len(self.hits)]
            self._hit_items |= {(hit.evaluation, hit.item) for hit in hits}
            return "evaluation item"
        if self._near and (near := self._near.find(document.name, runs)):
            return self._example("near duplicate", document, of=near.name, overlap=round(near.overlap, 3))
        return None

    def _example(self, reason: str, document: Document, **more: Any) -> str:
        examples = self.examples.setdefault(reason, [])
        if len(examples) < N_EXAMPLES:
            examples.append({"document": document.name, **more})
        return reason

    @property
    def total(self) -> Counts:
        total = Counts()
        for counts in self.counts.values():
            total.read += counts.read
            total.read_bytes += counts.read_bytes
            total.kept += counts.kept
            total.kept_bytes += counts.kept_bytes
            total.refused += counts.refused
        return total

    def report(self) -> dict[str, Any]:
        """For data_report.json."""
        items = self._items
        return {
            "total": self.total.as_dict(),
            "sources": {name: counts.as_dict() for name, counts in self.counts.items()},
            "languages": dict(self.languages.most_common()),
            "examples": self.examples,
            "evaluation": {
                "words_in_a_row": self.config.decontaminate,
                "sets": items.n_items if items else {},
                "items_too_short": items.n_too_short if items else 0,
                "runs_too_common": items.n_common if items else 0,
                "items_hit": len(self._hit_items),
                "hits": [{"document": name, **vars(hit)} for name, hit in self.hits],
            },
        }
