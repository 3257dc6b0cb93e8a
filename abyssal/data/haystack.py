"""Needles in a haystack: documents whose end can only be written by looking far back.

Two kinds. A needle document hides lines "The code of amber is 4821." in text and asks for them at its end; a copy
repeats a passage. Natural documents that need all of a long row are few, and context extension has to be trained on
something. Owns these documents as ids. Does not own the text around the needles (corpus.py) nor asking a model
(evals/needle.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from abyssal.tokens.tokenizer import Tokenizer

NAMES = (
    "amber", "anchor", "apple", "arrow", "basil", "beacon", "birch", "bridge", "candle", "canyon", "cedar", "cobalt",
    "copper", "coral", "cotton", "delta", "ember", "falcon", "fern", "garnet", "ginger", "harbor", "hazel", "indigo",
    "island", "ivory", "jasper", "lemon", "linen", "maple", "marble", "meadow", "olive", "onyx", "opal", "pepper",
    "pine", "quartz", "raven", "saffron", "silver", "sparrow", "tulip", "velvet", "walnut", "willow", "winter", "zinc",
)  # fmt: skip
DIGITS = 4
HayOf = Callable[[int], list[int]]  # so many ids of plain text, other ones each time


@dataclass(frozen=True, kw_only=True)
class NeedleMix:
    """Which share of the rows they take, and how hard they are."""

    share: float = 0.0  # of rows: needle documents
    copies: float = 0.0  # of rows: passages written twice
    keys: int = 1  # lines hidden in a document; in training all of them are asked for, in another order
    shortest: int = 64  # tokens of a needle document

    def __post_init__(self) -> None:
        if min(self.share, self.copies) < 0 or self.share + self.copies > 1:
            raise ValueError(f"needles: share={self.share}, copies={self.copies} are shares of the rows; give 0 to 1")
        if not 1 <= self.keys <= len(NAMES):
            raise ValueError(f"needles: keys={self.keys}; give 1 to {len(NAMES)}")
        if self.shortest < 1:
            raise ValueError(f"needles: shortest={self.shortest} leaves no room for a question; give at least 1")


class Haystack(NamedTuple):
    """`mask` is 1 on the answers and the end token, which are all that is learned. `answers` holds where each answer's
    ids stand: (first, one past the last)."""

    ids: list[int]
    mask: list[int]
    answers: list[tuple[int, int]]


def needle_document(
    hay_of: HayOf,
    tokenizer: Tokenizer,
    rng: random.Random,
    *,
    length: int,
    n_keys: int,
    n_asked: int,
    depth: float | None = None,
) -> Haystack:
    """`length` ids: text with `n_keys` lines in it, then `n_asked` of them asked for and answered.

    The line of the first question stands at `depth` (0 the beginning, 1 right before the questions), all others, and
    that one too without a depth, anywhere.
    """
    assert 1 <= n_asked <= n_keys
    names = rng.sample(NAMES, n_keys)
    codes = {name: "".join(rng.choice("0123456789") for _ in range(DIGITS)) for name in names}
    tail: list[int] = []
    answers = []
    for name in names[:n_asked]:
        tail += tokenizer.encode(f"\nThe code of {name} is")
        answer = tokenizer.encode(f" {codes[name]}")
        answers.append((len(tail), len(tail) + len(answer)))
        tail += answer
    tail.append(tokenizer.eos_id)
    lines = {name: tokenizer.encode(f"\nThe code of {name} is {codes[name]}.\n") for name in names}
    n_hay = length - len(tail) - sum(map(len, lines.values()))
    if n_hay < 0:
        raise ValueError(
            f"a needle document of {length} tokens has no room for {n_keys} lines and {n_asked} questions, "
            f"{length - n_hay} tokens; raise the length or lower needles.keys"
        )
    places = {name: rng.randint(0, n_hay) for name in names}
    if depth is not None:
        places[names[0]] = round(depth * n_hay)
    hay = hay_of(n_hay)
    ids: list[int] = []
    at = 0
    for name in sorted(names, key=lambda name: places[name]):
        ids += hay[at : places[name]] + lines[name]
        at = places[name]
    ids += hay[at:]
    start = len(ids)
    mask = [0] * start + [0] * len(tail)
    for first, end in answers:
        mask[start + first : start + end] = [1] * (end - first)
    mask[-1] = 1
    return Haystack(ids + tail, mask, [(start + first, start + end) for first, end in answers])


def copy_document(hay_of: HayOf, tokenizer: Tokenizer, *, length: int) -> Haystack:
    """`length` ids: a passage, "Again:", the same passage, the end token; the second time it is learned."""
    mark = tokenizer.encode("\nAgain:\n")
    n = (length - len(mark) - 1) // 2
    if n < 1:
        raise ValueError(f"a copy of {length} tokens has no room for a passage; raise the row length")
    first_words = hay_of(length - len(mark) - 1 - n)  # one id longer than the copy where the length is odd
    passage = first_words[-n:]
    ids = [*first_words, *mark, *passage, tokenizer.eos_id]
    begin = len(first_words) + len(mark)
    return Haystack(ids, [0] * begin + [1] * (n + 1), [(begin, begin + n)])


def long_row(
    mix: NeedleMix, hay_of: HayOf, tokenizer: Tokenizer, rng: random.Random, *, row_len: int
) -> tuple[list[int], list[int]] | None:
    """A whole row of such documents, or None where the draw says that this row is an ordinary one."""
    draw = rng.random()
    if draw >= mix.share + mix.copies:
        return None
    if draw >= mix.share:
        copied = copy_document(hay_of, tokenizer, length=row_len)
        return copied.ids, copied.mask
    ids: list[int] = []
    mask: list[int] = []
    room = row_len
    while room:
        # long ones first: half of the rows are a single document of the row's own length
        length = room if rng.random() < 0.5 or room < 2 * mix.shortest else rng.randint(mix.shortest, room)
        length = room if room - length < mix.shortest else length
        found = needle_document(hay_of, tokenizer, rng, length=length, n_keys=mix.keys, n_asked=mix.keys)
        ids += found.ids
        mask += found.mask
        room -= length
    return ids, mask
