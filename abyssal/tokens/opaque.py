"""Letters that stand for the letters of a message while a stranger's template arranges it.

What a template is given spells nothing it could be taken for: "<|user|>" in a message is eight letters of a private
alphabet, and whatever of the result is not in that alphabet was written by the template. Blanks at both ends stay what
they are, because templates trim.
"""

from __future__ import annotations

from collections.abc import Iterable

FIRST_LETTER = 0xF0000  # the two planes at Unicode's end, which are for private use
N_LETTERS = 0x110000 - FIRST_LETTER
ALWAYS = "".join(map(chr, range(128)))  # JSON is spelled with these


class Letters:
    """`table` are the letters that can be hidden, in the order of their code points, so that sorting stays the same."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.table = "".join(sorted(set(ALWAYS).union(*texts)))
        if len(self.table) > N_LETTERS:
            raise ValueError(f"{len(self.table)} different characters in one conversation; split it")
        self._hide = {ord(letter): FIRST_LETTER + i for i, letter in enumerate(self.table)}
        self._show = {hidden: letter for letter, hidden in self._hide.items()}

    def hide(self, text: str) -> str:
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        return text[:start] + self.hide_all(core) + text[start + len(core) :]

    def hide_all(self, text: str) -> str:
        return text.translate(self._hide)

    def show(self, text: str) -> str:
        return text.translate(self._show)


def is_hidden(letter: str) -> bool:
    return ord(letter) >= FIRST_LETTER
