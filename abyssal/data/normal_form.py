"""What is left of a text when spelling is taken away: the form in which texts are compared.

Two forms. `canonical` forgets case and white space and keeps every mark: texts equal in it are the same text. `words`
forgets punctuation too: it is what near-duplicates and evaluation items are looked for in.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

# Chinese and Japanese are written without spaces: each character counts as a word
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_ASCII_WORD = re.compile(r"[a-z0-9_]+")


def canonical(text: str) -> str:
    """ "A  b\\nC." -> "a b c."."""
    return " ".join(text.casefold().split())


def words(text: str) -> list[str]:
    """ "Don't 从左 X=3" -> ["don", "t", "从", "左", "x", "3"]. Full-width letters become the plain ones."""
    text = text.lower()
    if text.isascii():
        return _ASCII_WORD.findall(text)
    return _WORD.findall(unicodedata.normalize("NFKC", text))


def grams(of: list[str], n: int) -> Iterator[str]:
    """Each run of `n` words, joined by spaces."""
    return map(" ".join, zip(*(of[i:] for i in range(n)), strict=False))
