"""Is a text worth training on? Simple measures, each with a limit and a name. (After Gopher, appendix A1; StarCoder)

Prose and code are judged apart: what spoils a page of prose (signs everywhere, the same line again and again) is how
code looks, while code is spoilt by what machines wrote. A share is of characters that are no white space.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from abyssal.data.documents import Document


@dataclass(frozen=True, kw_only=True)
class QualityLimits:
    """Prose, unless it says code. A document beyond any of them is refused."""

    least_words: int = 10  # code too
    word_length: tuple[float, float] = (2.0, 12.0)  # characters, on average; not asked of languages without spaces
    least_letters: float = 0.5  # share
    symbols_per_word: float = 2.0  # marks that are neither letter nor digit
    repeated_lines: float = 0.4  # share of the characters that stand in a line that was there before
    repeated_grams: float = 0.6  # share of the runs of five words that were there before
    broken: float = 0.002  # share of U+FFFD and control characters, code too: a wrong encoding, or no text at all
    code_line: int = 200  # characters, on average: packed or generated code
    code_least_words: float = 0.25  # share of letters and digits in code: else it is a table of signs

    def __post_init__(self) -> None:
        low, high = self.word_length
        if not 0 <= low <= high:
            raise ValueError(f"data.clean.limits.word_length={self.word_length}: give the least and the most")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "word_length" and value < 0:
                raise ValueError(f"data.clean.limits.{field.name}={value} is negative; give 0 or more")


def fault_of(document: Document, words: list[str], runs: list[str], limits: QualityLimits) -> str | None:
    """The first limit that the document is beyond, in the words of the report; None if it is fit.

    `words` and `runs` of five of them are the document's in its normal form.
    """
    text = document.text
    if len(words) < limits.least_words:
        return "too short"
    n_chars = sum(map(len, text.split())) or 1
    if broken_share(text, n_chars) > limits.broken:
        return "broken characters"
    n_word_chars = sum(map(len, words))
    if document.kind == "code":
        if n_chars / (1 + text.count("\n")) > limits.code_line:
            return "packed code"
        return "code without words" if n_word_chars / n_chars < limits.code_least_words else None
    n_digits = sum(map(text.count, "0123456789"))
    if (n_word_chars - n_digits) / n_chars < limits.least_letters:
        return "mostly not letters"
    if (n_chars - n_word_chars) / len(words) > limits.symbols_per_word:
        return "too many symbols"
    spaced = words if text.isascii() else [word for word in words if word < "\u3040"]
    low, high = limits.word_length
    if len(spaced) * 2 > len(words) and not low <= sum(map(len, spaced)) / len(spaced) <= high:
        return "word length"
    if repeated_share([line for line in map(str.strip, text.split("\n")) if line]) > limits.repeated_lines:
        return "repeated lines"
    if repeated_share(runs) > limits.repeated_grams:
        return "repeated words"
    return None


def repeated_share(parts: list[str]) -> float:
    """Share of the characters in parts that were there before: ["ab", "c", "ab"] -> 2/5."""
    total = sum(map(len, parts))
    return 1 - sum(map(len, set(parts))) / total if total else 0.0


def broken_share(text: str, n_chars: int) -> float:
    """U+FFFD stands where bytes were no character. Tab, new lines and form feed are the only controls in a text."""
    controls = sum(text.count(sign) for sign in _CONTROLS if sign in text)
    return (controls + text.count("\N{REPLACEMENT CHARACTER}")) / n_chars


_CONTROLS = tuple(chr(code) for code in range(32) if chr(code) not in "\t\n\r\f")
