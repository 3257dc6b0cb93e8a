"""Text to ids that mark nothing: whatever a text spells, no control token comes of it.

Owns that promise for every kind of vocabulary. Byte-level ones only have to be told not to look for control tokens in
the text. Others (Unigram, as T5 and Llama 2's kin have it) hold them among the ordinary pieces, where a typed "</s>" is
the best way to spell itself, and are made to spell it in smaller pieces.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from abyssal.tokens.tokenizer_files import backend_of

MARKS = frozenset("<>[]{}|｜")  # an added token without any of them, and not called special, is a word of a vocabulary


class PlainText:
    """`spec` is the content of tokenizer.json; `roles` are the names of tokens that begin, end and pad."""

    def __init__(self, spec: dict[str, Any], *, roles: set[str | None]) -> None:
        self.control = {
            token["content"]: token["id"]
            for token in spec["added_tokens"]
            if token["special"] or token["content"] in roles or not MARKS.isdisjoint(token["content"])
        }
        self.takes_blanks_before = {token["content"] for token in spec["added_tokens"] if token["lstrip"]}
        self.takes_blanks_behind = {token["content"] for token in spec["added_tokens"] if token["rstrip"]}
        # what stands for letters that the vocabulary does not have comes from text, and marks nothing
        unknown = self.control.get(_unknown_token(spec) or "", -1)
        self.control_ids = frozenset(self.control.values()) - {unknown}
        # the library spares only those marked special
        self._steps = list(_parts(spec["normalizer"], spec["pre_tokenizer"]))
        added = [token | {"special": token["content"] in self.control} for token in spec["added_tokens"]]
        self._anywhere = _blind(json.dumps(spec | {"added_tokens": added}))

    def encode(self, texts: list[str], *, behind: bool = False) -> list[list[int]]:
        """`behind`: each text stands behind other tokens; it matters where a vocabulary marks the first word alone."""
        backend = self._behind if behind else self._anywhere
        all_ids = encoded(backend, texts)
        return [
            ids if self.control_ids.isdisjoint(ids) else self._in_pieces(text, backend)
            for text, ids in zip(texts, all_ids, strict=True)
        ]

    def decode(self, ids: list[int]) -> str:
        return self._anywhere.decode(ids, skip_special_tokens=False)

    def _in_pieces(self, text: str, backend: tokenizers.Tokenizer) -> list[int]:
        """A text that a vocabulary would spell with control tokens: cut inside each, and if need be everywhere."""
        names = re.compile("|".join(map(re.escape, sorted(self.control, key=len, reverse=True))))
        cuts = [0, *(found.start() + 1 for found in names.finditer(text)), len(text)]
        for places in (cuts, range(len(text) + 1)):
            pieces = [text[start:end] for start, end in zip(places, places[1:], strict=False)]
            parts = [*encoded(backend, pieces[:1]), *encoded(self._inside, pieces[1:])]
            ids = [i for part in parts for i in part]
            if self.control_ids.isdisjoint(ids):
                return ids
        name = next(name for name, i in self.control.items() if i in ids)
        raise ValueError(f"this tokenizer can spell {name!r} only as a control token; take it out of the text")

    @functools.cached_property
    def _behind(self) -> tokenizers.Tokenizer:
        return self._without_prefix("first")

    @functools.cached_property
    def _inside(self) -> tokenizers.Tokenizer:
        return self._without_prefix("first", "always")

    def _without_prefix(self, *schemes: str) -> tokenizers.Tokenizer:
        """Without the blank that sentencepiece puts before a text: before the whole, or before each stretch."""
        if not any(_unprefixed(step, schemes) for step in self._steps):
            return self._anywhere
        spec = json.loads(self._anywhere.to_str())
        for step in _parts(spec["normalizer"], spec["pre_tokenizer"]):
            step |= _unprefixed(step, schemes)
        return _blind(json.dumps(spec))


def encoded(backend: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    """On all cores; what the library cannot do is said in one line."""
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    except TypeError:  # what it says of a string that has no UTF-8 form
        for text in texts:
            _check_utf8(text)
        raise
    except Exception as error:  # and of letters without any token, not even an unknown one
        raise ValueError(f"this tokenizer cannot spell the text ({error}); use a model that knows it") from None


def unlimited(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.no_truncation()  # some published files carry a limit, which would cut text without a word
    backend.no_padding()
    return backend


def _blind(spec: str) -> tokenizers.Tokenizer:
    """Looks for no control token in its text."""
    backend = unlimited(backend_of(spec))
    backend.encode_special_tokens = True
    return backend


def _unprefixed(step: dict[str, Any], schemes: tuple[str, ...]) -> dict[str, Any]:
    """What to change in a step of a normalizer or pre-tokenizer, so that it puts nothing before a text."""
    match step:
        case {"type": "Metaspace", "prepend_scheme": scheme} if scheme in schemes:
            return {"prepend_scheme": "never"}
        case {"type": "Prepend"} if "always" in schemes:
            return {"prepend": ""}
        case {"type": "ByteLevel", "add_prefix_space": True} if "always" in schemes:
            return {"add_prefix_space": False}
    return {}


def _parts(*values: Any) -> Iterator[dict[str, Any]]:
    """Every step of a normalizer or pre-tokenizer, whatever it is nested in."""
    for value in values:
        if isinstance(value, dict):
            yield value
            yield from _parts(*value.values())
        elif isinstance(value, list):
            yield from _parts(*value)


def _unknown_token(spec: dict[str, Any]) -> str | None:
    """What stands for text without a token of its own; None where bytes can spell everything."""
    model = spec["model"]
    vocabulary = model["vocab"]
    if model["type"] == "Unigram":
        index = model["unk_id"]
        return None if model["byte_fallback"] or index is None else str(vocabulary[index][0])
    if model["type"] == "BPE" and model["byte_fallback"] and all(f"<0x{i:02X}>" in vocabulary for i in range(256)):
        return None
    cuts_bytes = any(part.get("type") == "ByteLevel" for part in _parts(spec["pre_tokenizer"]))
    if cuts_bytes and all(letter in vocabulary for letter in pre_tokenizers.ByteLevel.alphabet()):
        return None
    name: str | None = model.get("unk_token")
    return name


def _check_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text with half a surrogate pair at {error.start}; write the whole character") from None
