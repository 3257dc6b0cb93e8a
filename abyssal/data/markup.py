"""Documentation formats as plain text: HTML, man pages (roff), Perl's pod, WordNet's data files.

Plainly: marks are taken away, what they mark stays. Nothing is laid out again.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable

_NOT_TEXT = re.compile(r"(?is)<(script|style|head|nav|svg|footer)\b.*?</\1\s*>|<!--.*?-->")
_BLOCK = re.compile(r"(?i)</?(?:p|div|br|li|ul|ol|tr|table|h[1-6]|pre|dl|dt|dd|section|article|blockquote|hr)\b[^>]*>")
_CELL = re.compile(r"(?i)</t[dh]\s*>")
_TAG = re.compile(r"<[^>]*>")


def from_html(page: str) -> str:
    text = _NOT_TEXT.sub("", page)
    text = _CELL.sub(" ", _BLOCK.sub("\n", text))
    return tidy(html.unescape(_TAG.sub("", text)).replace("\N{NO-BREAK SPACE}", " ").replace("¶", ""))


_HEADING = ("SH", "SS", "Sh", "Ss")
_FONT = ("B", "I", "SM", "Nm", "Fl", "Ar", "Xr", "Cm", "Pa", "Nd", "Em", "Sy", "Ic", "Va", "Dv", "It", "IP")
_FONTS_IN_TURN = ("BR", "IR", "RB", "BI", "IB", "RI")
_ROFF_SIGN = {"em": "—", "en": "–", "bu": "*", "aq": "'", "dq": '"', "lq": "“", "rq": "”", "oq": "‘", "cq": "’",
              "co": "©", "ha": "^", "ti": "~", "rs": "\\", "mi": "-", "hy": "-", "ga": "`"}  # fmt: skip
_ROFF_DROP = re.compile(
    r"\\f(?:\(..|\[[^]]*\]|.)|\\s(?:[+-]?\d{1,2}|\[[^]]*\])|\\m\[[^]]*\]|\\\*(?:\(..|\[[^]]*\]|.)|\\[&,/|^:%cz]"
)
_ROFF_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"|(\S+)')


def from_roff(page: str) -> str:
    """A man page; macros that set no text are dropped with their arguments."""
    lines = []
    defining = False
    for line in page.split("\n"):
        if line[:1] not in (".", "'"):
            lines += [] if defining else [line]
            continue
        if line.startswith(".."):
            defining = False
            continue
        macro, _, rest = line[1:].strip().partition(" ")
        defining |= macro in ("de", "ig")
        arguments = [quoted or bare for quoted, bare in _ROFF_ARGUMENT.findall(rest.split('\\"')[0])]
        if macro in _HEADING:
            lines += ["", " ".join(arguments)]
        elif macro in _FONT:
            lines.append(" ".join(arguments))
        elif macro in _FONTS_IN_TURN:
            lines.append("".join(arguments))
        elif macro in ("PP", "P", "LP", "TP", "sp", "Pp", "HP"):
            lines.append("")
    text = _ROFF_DROP.sub("", "\n".join(lines))
    text = re.sub(r"\\\((..)|\\\[(\w+)\]", lambda m: _ROFF_SIGN.get(m[1] or m[2], ""), text)
    for sign, shown in (("\\-", "-"), ("\\~", " "), ("\\ ", " "), ("\\'", "'"), ("\\e", "\\")):
        text = text.replace(sign, shown)
    return tidy(text)


_POD_CODE = re.compile(r"([A-Z])(?:<<+ (.*?) >>+|<([^<>]*)>)", re.DOTALL)
_POD_SIGN = {"lt": "<", "gt": ">", "verbar": "|", "sol": "/"}


def from_pod(page: str) -> str:
    """Perl's documentation, alone or inside a program: what stands between =head and =cut."""
    blocks = []
    in_pod = False
    for block in re.split(r"\n[ \t]*\n", page):
        if block.lstrip("\n").startswith("="):
            block = block.lstrip("\n")
            command, _, rest = block[1:].partition(" ")
            in_pod = command.strip() != "cut"
            if command in ("begin", "for", "encoding", "pod", "over", "back", "cut", "end"):
                continue
            block = rest
        if in_pod:
            blocks.append(block)
    text = "\n\n".join(blocks)
    for _ in range(4):  # codes inside codes, from the inside
        text, n = _POD_CODE.subn(_pod_code, text)
        if not n:
            break
    return tidy(text)


def _pod_code(match: re.Match[str]) -> str:
    letter, inside = match[1], match[2] if match[2] is not None else match[3]
    if letter in "XZ":
        return ""
    if letter == "E":
        return _POD_SIGN.get(inside, html.unescape(f"&{inside};"))
    return inside.split("|")[0] if letter == "L" else inside


_SENSE = re.compile(r"^\d{8} \d\d [nvasr] ([0-9a-f]{2}) (.*?) \| (.*)$", re.MULTILINE)


def from_wordnet(lines: str) -> str:
    """Lines of data.noun and its sisters -> "word, word: what it means; "an example""."""
    entries = []
    for n_words, fields, gloss in _SENSE.findall(lines):
        names = fields.split(" ")[: 2 * int(n_words, 16) : 2]  # each is followed by a number
        entries.append(f"{', '.join(names).replace('_', ' ')}: {gloss.strip()}\n")
    return "".join(entries)


def tidy(text: str) -> str:
    """No space at the end of a line, no more than one empty line in a row."""
    text = re.sub(r"[ \t\r\f]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


PLAIN: dict[str, Callable[[str], str]] = {
    ".html": from_html, ".htm": from_html, ".xhtml": from_html,
    ".pod": from_pod, ".pm": from_pod, ".pl": from_pod,
    **{f".{section}": from_roff for section in "12345678"},
}  # fmt: skip
