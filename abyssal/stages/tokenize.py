"""Stage `tokenize`: clean the text, learn a vocabulary from the mix, then write the mix as rows of tokens.

The mix is real text and problems as the web has them, most answered at once, some worked out. Problems stand whole in a
row; the room they leave is filled with text, which can be cut anywhere. What became of each document stands in
`data_report.json`; the documents that were kept stay in `documents/`.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from abyssal.data.clean import CleanConfig, Cleaner
from abyssal.data.corpus import encode_documents, open_source
from abyssal.data.document_store import open_documents, write_documents
from abyssal.data.haystack import HayOf, NeedleMix, long_row
from abyssal.data.loader import TokenWriter
from abyssal.data.mix import Drawn, Mixture
from abyssal.data.preferences import request_at
from abyssal.data.problems import ProblemSource, Split, problem_at
from abyssal.data.worked import WebMix, web_document
from abyssal.record import Recorder
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.chat import render
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Conversation


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    vocab_size: int = 2048
    single_digits: bool = True  # no token of several digits: small models compute better digit by digit
    sample_bytes: int = 4_000_000  # of the mix, to learn merges from


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`corpus` is "python", "docs", "debian:PACKAGE,PACKAGE", a folder of text, or a JSONL file with {"text": ...}.

    `mix` takes its place with several of these and their weights: {python = 0.5, docs = 0.3, "/my/folder" = 0.2}.
    """

    corpus: str = "python"
    mix: dict[str, float] = field(default_factory=dict)
    corpus_bytes: int = 20_000_000  # at most this much text is read; it is repeated when the mix needs more
    text_share: float = 0.25  # of all tokens
    fim_rate: float = 0.1  # of text documents, prefix-suffix-middle (DeepSeek-V3 section 4.1)
    tokens: int = 4_000_000
    held_out_tokens: int = 100_000
    clean: CleanConfig = field(default_factory=CleanConfig)
    problems: ProblemSource = field(default_factory=ProblemSource)
    web: WebMix = field(default_factory=WebMix)
    needles: NeedleMix = field(default_factory=NeedleMix)  # rows beside those of text and problems

    def __post_init__(self) -> None:
        if bad := [name for name, weight in self.mix.items() if not weight > 0]:
            raise ValueError(f"data.mix gives {bad[0]} the weight {self.mix[bad[0]]}; give a positive one or drop it")
        if not 0 <= self.text_share <= 1:
            raise ValueError(f"text_share={self.text_share} is outside [0, 1]")

    @property
    def weights(self) -> dict[str, float]:
        """Of the sources of text, summing to 1."""
        mix = self.mix or {self.corpus: 1.0}
        return {name: weight / sum(mix.values()) for name, weight in mix.items()}


N_CLEANING_STEPS = 20
N_STEPS = N_CLEANING_STEPS + 3


def tokenize(
    stage_dir: Path,
    *,
    config: TokenizerConfig,
    data: DataConfig,
    evaluation: Mapping[str, Iterable[str]],
    row_len: int,
    seed: int,
    recorder: Recorder,
    given: Tokenizer | None = None,
) -> Tokenizer:
    """Leaves `documents/`, `tokenizer/`, `train/`, `held_out/` and `data_report.json` in `stage_dir`.

    `evaluation` names the evaluation sets in use, with the texts that no document may hold a part of. A tokenizer that
    is `given` is not trained.
    """
    report = clean_documents(stage_dir, data=data, evaluation=evaluation, seed=seed, recorder=recorder)
    documents = stage_dir / "documents"
    tokenizer = given or Tokenizer(
        train_bpe(
            sample_texts(config, data, seed, documents),
            vocab_size=config.vocab_size,
            single_digits=config.single_digits,
        )
    )
    tokenizer.save(stage_dir / "tokenizer")
    recorder.step(N_CLEANING_STEPS, N_STEPS, {"part": "vocabulary", "vocab_size": tokenizer.vocab_size})
    splits: list[tuple[Split, int]] = [("train", data.tokens), ("held_out", data.held_out_tokens)]
    for k, (split, n_tokens) in enumerate(splits, start=1):
        text = TextStream(documents, data, tokenizer, split=split, seed=seed) if data.text_share > 0 else None
        with TokenWriter(stage_dir / split, vocab_size=tokenizer.vocab_size) as writer:
            rows = mixed_rows(
                data, tokenizer, documents, text, split=split, seed=seed, row_len=row_len, n_tokens=n_tokens
            )
            for ids, mask in rows:
                writer.add(ids, mask)
        report[f"{split}_text"] = text.used() if text is not None else {}
        recorder.step(N_CLEANING_STEPS + k, N_STEPS, {"part": split, "tokens": writer.n_tokens})
    for name, used in report["train_text"].items():
        recorder.log(f"text of {name}: {used['bytes']:,} bytes, {used['epochs']} epochs")
    write_json(stage_dir / "data_report.json", report)
    return tokenizer


def clean_documents(
    stage_dir: Path, *, data: DataConfig, evaluation: Mapping[str, Iterable[str]], seed: int, recorder: Recorder
) -> dict[str, Any]:
    """All sources through the cleaner into `documents/`; the account of it. Nothing is read where no text is wanted."""
    if data.text_share == 0 and not (data.needles.share or data.needles.copies):
        return {}
    if data.corpus_bytes <= 0:
        raise ValueError(f"corpus_bytes={data.corpus_bytes} leaves no text; give a positive number of bytes")
    sources = [open_source(name, seed=seed) for name in data.weights]
    cleaner = Cleaner(data.clean, evaluation)
    began, step = time.monotonic(), 0

    def show(share_done: float) -> None:
        nonlocal step
        if share_done * N_CLEANING_STEPS < step + 1 or step == N_CLEANING_STEPS:
            return
        step = min(N_CLEANING_STEPS, int(share_done * N_CLEANING_STEPS))
        total = cleaner.total
        speed = total.read / max(1e-9, time.monotonic() - began)
        counts = {"kept": total.kept, "refused": total.read - total.kept, "documents_per_s": round(speed, 1)}
        recorder.step(step - 1, N_STEPS, {"part": "documents"} | counts)

    max_bytes = {name: max(1, round(weight * data.corpus_bytes)) for name, weight in data.weights.items()}
    write_documents(stage_dir / "documents", sources, cleaner, max_bytes=max_bytes, on_document=show)
    report = {"weights": data.weights} | cleaner.report()
    total = report["total"]
    recorder.log(f"documents: {total['read']} read, {total['kept']} kept, refused {total['refused']}")
    return report


def conversations(data: DataConfig, *, split: Split, seed: int, first: int = 0) -> Iterator[Conversation]:
    """Problems of one side of the split as somebody might have posted them, for ever."""
    for index in itertools.count(first):
        # drawn apart from all else: without requests the mix is what it was
        is_request = random.Random(f"is request {seed} {split} {index}").random() < data.web.request_share
        problem = (request_at if is_request else problem_at)(data.problems, seed, index, split)
        yield web_document(problem, random.Random(f"web {seed} {index}"), data.web)


def sample_texts(config: TokenizerConfig, data: DataConfig, seed: int, documents: Path) -> Iterator[str]:
    """Text and problems in the proportion of the mix, `sample_bytes` in all. Too little text is not repeated."""
    text_bytes = left = int(config.sample_bytes * data.text_share)
    if text_bytes:
        files = open_documents(documents, "train")
        for drawn in itertools.islice(Mixture(files, data.weights, seed=seed), sum(map(len, files))):
            yield drawn.text
            left -= len(drawn.text.encode())
            if left <= 0:
                break
    left = config.sample_bytes - text_bytes
    for conversation in conversations(data, split="train", seed=seed):
        for message in conversation:
            for piece in (message.thinking, message.content):
                if piece:
                    left -= len(piece.encode())
                    yield piece
        if left <= 0:
            return


def mixed_rows(
    data: DataConfig,
    tokenizer: Tokenizer,
    documents: Path,
    text: TextStream | None,
    *,
    split: Split,
    seed: int,
    row_len: int,
    n_tokens: int,
    first: int = 0,
) -> Iterator[tuple[list[int], list[int]]]:
    """Rows of `row_len` ids with their loss masks. Only what an assistant says and what a text says is learned."""
    rendered = (render(c, tokenizer) for c in conversations(data, split=split, seed=seed, first=first))
    example = next(rendered)
    has_long = data.needles.share + data.needles.copies > 0
    hay_of = plain_text(documents, data, tokenizer, split=split, seed=seed) if has_long else None
    rng = random.Random(f"needles {seed} {split} {first}")
    n_text = n_all = n_long = 0
    while n_all + n_long < n_tokens:
        if hay_of and (found := long_row(data.needles, hay_of, tokenizer, rng, row_len=row_len)):
            yield found
            n_long += row_len
            continue
        ids: list[int] = []
        mask: list[int] = []
        wants_text = text is not None and n_text + row_len <= data.text_share * (n_all + row_len)
        while not wants_text and len(ids) + len(example.ids) <= row_len:
            ids += example.ids
            mask += example.mask
            example = next(rendered)
        if len(example.ids) > row_len:
            raise ValueError(
                f"a problem has {len(example.ids)} tokens and a row {row_len}: raise pretrain.row_len or "
                f"lower data.problems.levels"
            )
        room = row_len - len(ids)
        fill = text.take(room) if text is not None else [tokenizer.eos_id] * room
        yield ids + fill, mask + [int(text is not None)] * room
        n_text += room
        n_all += row_len


def plain_text(documents: Path, data: DataConfig, tokenizer: Tokenizer, *, split: Split, seed: int) -> HayOf:
    """Ids of the corpus without control tokens: an end token would close the document that the text is part of."""
    stream = TextStream(documents, replace(data, fim_rate=0.0), tokenizer, split=split, seed=seed)

    def take(n: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < n:
            ids += [i for i in stream.take(n - len(ids)) if i not in tokenizer.control_ids]
        return ids

    return take


class TextStream:
    """Documents of the mix as one endless run of ids, to be cut anywhere."""

    def __init__(self, documents: Path, data: DataConfig, tokenizer: Tokenizer, *, split: Split, seed: int) -> None:
        self._mixture = Mixture(open_documents(documents, split), data.weights, seed=seed)
        self._drawn: deque[Drawn] = deque()  # read ahead of what is encoded
        rng = random.Random(f"fim {seed} {split}")
        fim_rate = data.fim_rate if tokenizer.has_fim else 0.0  # a foreign vocabulary may have no marks for it
        self._encoded = encode_documents(self._texts(), tokenizer, rng, fim_rate)
        self._n_used = [0] * len(self._mixture.files)
        self._n_bytes = [0] * len(self._mixture.files)
        self._buffer: list[int] = []

    def take(self, n: int) -> list[int]:
        while len(self._buffer) < n:
            self._buffer += next(self._encoded)
            drawn = self._drawn.popleft()
            self._n_used[drawn.source] += 1
            self._n_bytes[drawn.source] += len(drawn.text.encode())
        taken, self._buffer = self._buffer[:n], self._buffer[n:]
        return taken

    def used(self) -> dict[str, dict[str, float]]:
        """By source: documents, bytes, and how many times over the source was read."""
        counted = zip(self._mixture.files, self._n_used, self._n_bytes, strict=True)
        return {
            file.source: {"documents": n, "bytes": n_bytes, "epochs": round(n / len(file), 3)}
            for file, n, n_bytes in counted
        }

    def _texts(self) -> Iterator[str]:
        for drawn in self._mixture:
            self._drawn.append(drawn)
            yield drawn.text


def write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
