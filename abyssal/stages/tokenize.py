"""Stage `tokenize`: learn a vocabulary from the mix, then write the mix as rows of tokens for pretraining.

The mix is real text and problems as the web has them, most answered at once, some worked out. Problems stand whole in a
row; the room they leave is filled with text, which can be cut anywhere.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from abyssal.data.corpus import encode_documents, read_corpus
from abyssal.data.haystack import HayOf, NeedleMix, long_row
from abyssal.data.loader import TokenWriter
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
    """`corpus` is "python", a folder of text, or a JSONL file with {"text": ...}."""

    corpus: str = "python"
    corpus_bytes: int = 20_000_000  # at most this much text is read; it is repeated when the mix needs more
    text_share: float = 0.25  # of all tokens
    fim_rate: float = 0.1  # of text documents, prefix-suffix-middle (DeepSeek-V3 section 4.1)
    tokens: int = 4_000_000
    held_out_tokens: int = 100_000
    problems: ProblemSource = field(default_factory=ProblemSource)
    web: WebMix = field(default_factory=WebMix)
    needles: NeedleMix = field(default_factory=NeedleMix)  # rows beside those of text and problems


def tokenize(
    stage_dir: Path,
    *,
    config: TokenizerConfig,
    data: DataConfig,
    row_len: int,
    seed: int,
    recorder: Recorder,
    given: Tokenizer | None = None,
) -> Tokenizer:
    """Leaves `tokenizer/`, `train/` and `held_out/` in `stage_dir`. A tokenizer that is given is not trained."""
    recorder.step(0, 4, {"part": "vocabulary"})
    tokenizer = given or Tokenizer(
        train_bpe(sample_texts(config, data, seed), vocab_size=config.vocab_size, single_digits=config.single_digits)
    )
    tokenizer.save(stage_dir / "tokenizer")
    splits: list[tuple[Split, int]] = [("train", data.tokens), ("held_out", data.held_out_tokens)]
    for k, (split, n_tokens) in enumerate(splits, start=1):
        with TokenWriter(stage_dir / split, vocab_size=tokenizer.vocab_size) as writer:
            for ids, mask in mixed_rows(data, tokenizer, split=split, seed=seed, row_len=row_len, n_tokens=n_tokens):
                writer.add(ids, mask)
        recorder.step(k, 4, {"part": split, "tokens": writer.n_tokens})
    recorder.step(3, 4, {"part": "done", "vocab_size": tokenizer.vocab_size})
    return tokenizer


def conversations(data: DataConfig, *, split: Split, seed: int, first: int = 0) -> Iterator[Conversation]:
    """Problems of one side of the split as somebody might have posted them, for ever."""
    for index in itertools.count(first):
        # drawn apart from all else: without requests the mix is what it was
        is_request = random.Random(f"is request {seed} {split} {index}").random() < data.web.request_share
        problem = (request_at if is_request else problem_at)(data.problems, seed, index, split)
        yield web_document(problem, random.Random(f"web {seed} {index}"), data.web)


def sample_texts(config: TokenizerConfig, data: DataConfig, seed: int) -> Iterator[str]:
    """Text and problems in the proportion of the mix, `sample_bytes` in all."""
    text_bytes = int(config.sample_bytes * data.text_share)
    if text_bytes:
        for document in read_corpus(data.corpus, max_bytes=text_bytes, seed=seed):
            yield document.text
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
    data: DataConfig, tokenizer: Tokenizer, *, split: Split, seed: int, row_len: int, n_tokens: int, first: int = 0
) -> Iterator[tuple[list[int], list[int]]]:
    """Rows of `row_len` ids with their loss masks. Only what an assistant says and what a text says is learned."""
    if not 0 <= data.text_share <= 1:
        raise ValueError(f"text_share={data.text_share} is outside [0, 1]")
    text = TextStream(data, tokenizer, split=split, seed=seed) if data.text_share > 0 else None
    rendered = (render(c, tokenizer) for c in conversations(data, split=split, seed=seed, first=first))
    example = next(rendered)
    hay_of = plain_text(data, tokenizer, split=split, seed=seed)
    rng = random.Random(f"needles {seed} {split} {first}")
    n_text = n_all = n_long = 0
    while n_all + n_long < n_tokens:
        if found := long_row(data.needles, hay_of, tokenizer, rng, row_len=row_len):
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


def plain_text(data: DataConfig, tokenizer: Tokenizer, *, split: Split, seed: int) -> HayOf:
    """Ids of the corpus without control tokens: an end token would close the document that the text is part of."""
    stream = TextStream(replace(data, fim_rate=0.0), tokenizer, split=split, seed=seed)

    def take(n: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < n:
            ids += [i for i in stream.take(n - len(ids)) if i not in tokenizer.control_ids]
        return ids

    return take


class TextStream:
    """Documents of the corpus as one endless run of ids, to be cut anywhere."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, *, split: Split, seed: int) -> None:
        self._data, self._tokenizer, self._split, self._seed = data, tokenizer, split, seed
        self._fim_rate = data.fim_rate if tokenizer.has_fim else 0.0  # a foreign vocabulary may have no marks for it
        self._documents = self._endless()
        self._buffer: list[int] = []

    def take(self, n: int) -> list[int]:
        while len(self._buffer) < n:
            self._buffer += next(self._documents)
        taken, self._buffer = self._buffer[:n], self._buffer[n:]
        return taken

    def _endless(self) -> Iterator[list[int]]:
        for epoch in itertools.count():
            rng = random.Random(f"fim {self._seed} {epoch}")
            documents = read_corpus(
                self._data.corpus, max_bytes=self._data.corpus_bytes, seed=self._seed, split=self._split
            )
            n_documents = 0
            for ids in encode_documents((d.text for d in documents), self._tokenizer, rng, self._fim_rate):
                n_documents += 1
                yield ids
            if n_documents == 0:  # so small a corpus that the hash held none of it out
                raise ValueError(f"corpus {self._data.corpus} has no {self._split} document; add documents to it")
