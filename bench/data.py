"""Speed of the cleaning of text, part by part and all together, over real text of packages, on one core.

    taskset -c 0 python bench/data.py [--sources debian:git-doc python ...] [--max-mb 60] [--no-save]

More than 100 MB: the source of this Python, and manuals and dictionaries of Debian (fetched once by apt-get into
~/.cache/abyssal, not installed). Figures are MB of text (UTF-8) per second of this process's own time, so that what
else the machine does is left out; the wall clock of the whole stands beside them. Each part is timed on its own, lot by
lot; "all" is the cleaner as the stage `tokenize` runs it, with reading and writing. Memory is the process's peak.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import tyro

from abyssal.data.clean import CleanConfig, Cleaner
from abyssal.data.corpus import open_source
from abyssal.data.decontaminate import EvaluationItems
from abyssal.data.document_store import open_documents, write_documents
from abyssal.data.documents import Document, Source
from abyssal.data.language import Languages
from abyssal.data.mix import Mixture
from abyssal.data.near_duplicates import NearDuplicates
from abyssal.data.normal_form import canonical, grams, words
from abyssal.data.problems import NEVER_TRAINED, ProblemSource, problem_at
from abyssal.data.quality import QualityLimits, fault_of

MANUALS = "git-doc python3.11-doc perl-doc postgresql-doc-15 wordnet-base dict-gcide linux-doc-6.1"
LIMIT_MB = 1000  # of memory


@dataclass(frozen=True, kw_only=True)
class Options:
    sources: tuple[str, ...] = (*(f"debian:{package}" for package in MANUALS.split()), "python")
    max_mb: int = 60  # of each source
    python_mb: int = 15  # of this installation's source, whose documentation strings are slow to find
    save: bool = True  # append the result to results/data.jsonl

    def max_bytes(self, source: str) -> int:
        return (self.python_mb if source == "python" else self.max_mb) * 10**6


class Timed:
    """Seconds of this process by part, and the bytes that went through it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.n_bytes: dict[str, int] = defaultdict(int)

    def run(self, part: str, n_bytes: int, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        self.seconds[part] += time.process_time() - start
        self.n_bytes[part] += n_bytes
        return result

    def mb_per_s(self) -> dict[str, float]:
        return {part: round(self.n_bytes[part] / 1e6 / s, 2) for part, s in self.seconds.items()}


def questions() -> dict[str, list[str]]:
    """As many as the laptop's recipe asks."""
    held_out = [problem_at(ProblemSource(), 0, i, "held_out").prompt for i in range(600)]
    unseen = ProblemSource(families={family: 1.0 for family in NEVER_TRAINED})
    return {"held-out": held_out, "never trained": [problem_at(unseen, 0, i, "held_out").prompt for i in range(60)]}


def batches(source: Source, max_bytes: int, timed: Timed) -> Iterator[tuple[list[Document], int]]:
    """The documents of a source in lots of 50, and their bytes; reading is timed."""
    documents = source.documents()
    n_read = 0
    while n_read < max_bytes:
        lot = timed.run(f"read {source.name}", 0, lambda: list(islice(documents, 50)))
        if not lot:
            return
        n_bytes = sum(len(document.text.encode()) for document in lot)
        timed.n_bytes[f"read {source.name}"] += n_bytes
        n_read += n_bytes
        yield lot, n_bytes


class Parts:
    """Each part of the cleaner, timed on its own."""

    def __init__(self) -> None:
        self.timed = Timed()
        self._near = NearDuplicates(0.8)
        self._items = EvaluationItems(questions(), 10)
        self._languages = Languages()

    def run(self, lot: list[Document], n_bytes: int) -> None:
        run, limits = self.timed.run, QualityLimits()
        run("canonical form", n_bytes, lambda: [canonical(d.text) for d in lot])
        found = run("words", n_bytes, lambda: [words(d.text) for d in lot])
        runs = run("runs of five words", n_bytes, lambda: [list(grams(w, 5)) for w in found])
        parts = list(zip(lot, found, runs, strict=True))
        run("quality", n_bytes, lambda: [fault_of(d, w, r, limits) for d, w, r in parts])
        run("language", n_bytes, lambda: [self._languages.of(d.text) for d in lot if d.kind == "prose"])
        run("evaluation items", n_bytes, lambda: [self._items.find(w) for w in found])
        run("near duplicates", n_bytes, lambda: [self._near.find(d.name, r) for d, _, r in parts])


def time_parts(options: Options) -> Timed:
    parts = Parts()
    for name in options.sources:
        for lot, n_bytes in batches(open_source(name, seed=0), options.max_bytes(name), parts.timed):
            parts.run(lot, n_bytes)
        print(f"  {name}", flush=True)
    return parts.timed


def clean_all(options: Options, folder: Path, timed: Timed) -> dict[str, Any]:
    """All of it as the stage does it, then the mix that reads it again."""
    sources = [open_source(name, seed=0) for name in options.sources]
    cleaner = Cleaner(CleanConfig(), questions())
    max_bytes = {name: options.max_bytes(name) for name in options.sources}
    began = time.monotonic()
    timed.run("all", 0, lambda: write_documents(folder / "documents", sources, cleaner, max_bytes=max_bytes))
    wall_s = time.monotonic() - began
    files = open_documents(folder / "documents", "train")
    weights = {file.source: 1.0 for file in files}
    drawn = timed.run(
        "mix", 0, lambda: sum(len(d.text.encode()) for d in islice(Mixture(files, weights, seed=0), 5000))
    )
    timed.n_bytes["mix"] = drawn
    return cleaner.report() | {"wall_s": round(wall_s, 1)}


def peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB; macOS counts bytes
    return round(peak / (1e6 if sys.platform == "darwin" else 1024), 1)


def main(options: Options) -> None:
    print("each part on its own:")
    timed = time_parts(options)
    with tempfile.TemporaryDirectory() as folder:
        report = clean_all(options, Path(folder), timed)
    timed.n_bytes["all"] = report["total"]["read_bytes"]
    peak = peak_mb()  # before the import below, which is not the cleaner's
    total = report["total"]
    n_bytes = total["read_bytes"]
    print(f"\n{n_bytes / 1e6:.1f} MB of text, {total['read']} documents, {total['kept']} kept, one core: MB/s")
    for part, speed in timed.mb_per_s().items():
        print(f"{part:>28} {speed:9.1f}   {timed.seconds[part]:6.1f} s")
    print(f"refused: {', '.join(f'{n} {reason}' for reason, n in total['refused'].items())}")
    print(f"languages: {report['languages']}")
    verdict = "within" if peak < LIMIT_MB else "ABOVE"
    print(f"all together {report['wall_s']} s by the clock; peak memory {peak} MB, {verdict} {LIMIT_MB}")
    if options.save:
        from common import append_result  # imports transformers

        append_result(
            "data",
            {
                "text_mb": round(n_bytes / 1e6, 1),
                "sources": list(options.sources),
                "total": total,
                "languages": report["languages"],
                "mb_per_s": timed.mb_per_s(),
                "cpu_s": {part: round(seconds, 2) for part, seconds in timed.seconds.items()},
                "all_wall_s": report["wall_s"],
                "peak_mb": peak,
            },
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
