"""Needle in a haystack: how often a model finds a line hidden in text, by context length and depth.

An answer counts when every token of it is the most likely one given the right ones before it, which is when greedy
decoding writes exactly that answer. Owns the grid. Does not own the documents (data/haystack.py) nor the picture
(evals/page_needles.py). Letters: B documents, T tokens, N answer tokens, D width.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from abyssal.data.haystack import HayOf, Haystack, needle_document
from abyssal.model.transformer import Transformer
from abyssal.tokens.tokenizer import Tokenizer

BATCH_TOKENS = 16384


@dataclass(frozen=True, kw_only=True)
class NeedleEval:
    """The grid that is asked. A cell whose accuracy is p is off by up to 1/sqrt(documents)."""

    lengths: int = 8  # context lengths, evenly from the longest one's share of 1/lengths up to it
    depths: int = 5  # from 0, the beginning, to 1, right before the question
    documents: int = 16  # per cell
    keys: int = 1  # hidden lines, one of which is asked for

    def __post_init__(self) -> None:
        for name in ("lengths", "depths", "documents", "keys"):
            if getattr(self, name) < 1:
                raise ValueError(f"needle {name}={getattr(self, name)} leaves nothing to ask; give at least 1")

    def lengths_up_to(self, longest: int) -> list[int]:
        return [longest * k // self.lengths for k in range(1, self.lengths + 1)]

    def all_depths(self) -> list[float]:
        return [k / (self.depths - 1) for k in range(self.depths)] if self.depths > 1 else [0.5]


def needle_grid(
    config: NeedleEval, *, lengths: list[int], hay_of: HayOf, tokenizer: Tokenizer, seed: int
) -> list[list[list[Haystack]]]:
    """Documents by length, depth and number; the same ones for every model that is asked."""
    rng = random.Random(f"needle grid {seed}")
    return [
        [
            [
                needle_document(hay_of, tokenizer, rng, length=length, n_keys=config.keys, n_asked=1, depth=depth)
                for _ in range(config.documents)
            ]
            for depth in config.all_depths()
        ]
        for length in lengths
    ]


def needle_accuracy(model: Transformer, grid: list[list[list[Haystack]]]) -> list[list[float]]:
    """Share found, by length and depth."""
    return [[sum(found) / len(found) for found in (retrieved(model, cell) for cell in row)] for row in grid]


@torch.inference_mode()
def retrieved(model: Transformer, documents: list[Haystack]) -> list[bool]:
    """For each document whether its first answer is found. All of a call have one length."""
    device = model.embed_tokens.weight.device
    per_pass = max(1, BATCH_TOKENS // len(documents[0].ids))
    found: list[bool] = []
    for start in range(0, len(documents), per_pass):
        batch = documents[start : start + per_pass]
        ids_BT = torch.tensor([document.ids for document in batch], device=device)
        hidden_BTD = model.hidden(ids_BT)
        for row, document in enumerate(batch):
            first, end = document.answers[0]
            guess_N = model.logits(hidden_BTD[row, first - 1 : end - 1]).argmax(-1)
            found.append(bool((guess_N == ids_BT[row, first:end]).all()))
    return found
