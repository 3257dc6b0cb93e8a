"""The bytes that each id writes. Characters do not do: a token may hold half of one.

Byte-level vocabularies spell every byte as a printable letter (GPT-2's table). Others are asked, token by token, what
they add to a text that has begun: there a token writes the same wherever it stands.
"""

from __future__ import annotations

import re
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

BYTE_NAME = re.compile(r"<0x([0-9A-F]{2})>")  # sentencepiece's byte, where a vocabulary lacks the letter


def token_bytes(backend: tokenizers.Tokenizer, decoder: Any, *, n_ids: int, control_ids: frozenset[int]) -> list[bytes]:
    """One entry an id, empty for control tokens and for ids that are none. `decoder` is that of tokenizer.json."""
    names = {
        i: name for name, i in backend.get_vocab(with_added_tokens=True).items() if i < n_ids and i not in control_ids
    }
    steps = set(_types(decoder))
    found = _byte_level(names) if "ByteLevel" in steps else _asked(backend, names, has_bytes="ByteFallback" in steps)
    return [found.get(i, b"") for i in range(n_ids)]


def _byte_level(names: dict[int, str]) -> dict[int, bytes]:
    """A token with a letter that stands for no byte is an added word, and written as it is."""
    table = byte_letters()
    written = {}
    for i, name in names.items():
        try:
            written[i] = name.translate(table).encode("latin-1")
        except UnicodeEncodeError:
            written[i] = name.encode()
    return written


def byte_letters() -> dict[int, int]:
    """Code point of a letter -> the byte it stands for; other letters below 256 -> one that is no byte.

    GPT-2's table: a byte that is printable in Latin-1 is itself, the others in their order take the letters from 256.
    """
    alphabet = {ord(letter) for letter in pre_tokenizers.ByteLevel.alphabet()}
    hidden = [byte for byte in range(256) if byte not in alphabet]
    return dict.fromkeys(hidden, 0xFFFF) | {256 + n: byte for n, byte in enumerate(hidden)}


def _asked(backend: tokenizers.Tokenizer, names: dict[int, str], *, has_bytes: bool) -> dict[int, bytes]:
    written: dict[int, bytes] = {}
    if has_bytes:
        written = {i: bytes.fromhex(found[1]) for i, name in names.items() if (found := BYTE_NAME.fullmatch(name))}
    begin = next((i for i, name in names.items() if name.isalnum()), None)
    before = "" if begin is None else backend.decode([begin], skip_special_tokens=False)
    for i, name in names.items():
        if i not in written:
            text = backend.decode([i] if begin is None else [begin, i], skip_special_tokens=False)
            written[i] = (text[len(before) :] if text.startswith(before) else name).encode()
    return written


def _types(step: Any) -> list[str]:
    """The kinds of decoder in a chain of them."""
    if not isinstance(step, dict):
        return []
    return [step["type"], *(name for part in step.get("decoders", []) for name in _types(part))]
