"""Structure: an answer that has to be JSON, to fit a schema, to match an expression. By llguidance, as a control.

A grammar is compiled once and kept while it is used. Each request has a matcher of its own, which is told every id
that is drawn behind the thinking and says which may come next. An end may be drawn exactly where the text is whole, and
where nothing more fits it is all that is left. Where one text alone can follow, the ids that usually spell it are
forced.
Everything is bounded: what goes in (schema_check.py), what compiling costs, what a step costs and what is kept.
Letters: V vocabulary, X the matcher's words, V filled up to whole bytes.
"""

from __future__ import annotations

import functools
import json
import re
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark

from abyssal.engine.schema_check import MAX_CHARS, MAX_LITERAL_CHARS, Work, checked_schema
from abyssal.engine.vocabulary import Vocabulary
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Structure

KEPT_GRAMMARS, KEPT_CHARS = 64, 1 << 20
MAX_CHOICES = 256
MAX_REGEX_CHARS = 4096
# a step that needs more ends its request. Measured: fuel 14 to 50 a microsecond, items 20, a lexer state 1 to 2 kB
LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=400_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
JSON_OPTIONS = {
    "lenient": False,
    "coerce_one_of": False,
    "whitespace_pattern": r"\n?[ \t]{0,40}",  # enough to indent; endless blanks are how models lose themselves in JSON
    "json_allowed_escapes": 'nrbtf\\"',  # no \u: two spellings of one name would get around what is said of it
}
CLASSES = "dws"  # \\d, \\w and \\s are of ASCII, as in JSON schemas: a digit of an answer is 0 to 9
SPELLED = '{"name": [1, true, null], "a b": "é所 \\n"}'


class Grammars:
    """Compiled for one tokenizer; the most recently used are kept."""

    def __init__(self, tokenizer: Tokenizer, *, kept: int = KEPT_GRAMMARS, kept_chars: int = KEPT_CHARS) -> None:
        self._tokenizer = tokenizer
        self._kept, self._kept_chars = kept, kept_chars
        self._grammars: OrderedDict[Structure, LLMatcher] = OrderedDict()
        self._n_chars = 0

    def control(self, structure: Structure) -> GrammarControl:
        """For one answer. ValueError where the structure makes no sense, or too much work."""
        matcher = self._grammars.pop(structure, None)
        if matcher is None:
            matcher = self._compiled(structure)
            self._n_chars += len(structure.value or "")
        self._grammars[structure] = matcher
        while len(self._grammars) > self._kept or (self._n_chars > self._kept_chars and len(self._grammars) > 1):
            dropped, _ = self._grammars.popitem(last=False)
            self._n_chars -= len(dropped.value or "")
        return GrammarControl(matcher.deep_copy(), end_ids=self._words.end_ids, can_force=self._words.can_force)

    def __len__(self) -> int:
        return len(self._grammars)

    def _compiled(self, structure: Structure) -> LLMatcher:
        try:
            source = grammar_source(structure)
        except ValueError as error:  # llguidance's own, of values that are no JSON for it
            raise ValueError(f"{_first_line(str(error))}") from None
        matcher = LLMatcher(self._words.tokenizer, source, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first step too: what fits nothing is said here
        if matcher.is_error():
            raise ValueError(f"no answer can be confined to this {structure.kind}: {_why(matcher)}; change it")
        return matcher

    @functools.cached_property
    def _words(self) -> Words:
        return words_of(self._tokenizer)


class Words(NamedTuple):
    """A vocabulary as the matcher knows it. `can_force`: texts without control tokens are spelled as they stand."""

    tokenizer: LLTokenizer
    end_ids: frozenset[int]
    can_force: bool


def words_of(tokenizer: Tokenizer) -> Words:
    """Half a second for 129,000 words."""
    vocabulary = Vocabulary.of(tokenizer)
    spelling = Spelling(vocabulary, tokenizer)
    return Words(
        LLTokenizer(TokenizerWrapper(spelling), n_vocab=len(spelling.tokens), eos_token=sorted(vocabulary.end_ids)),
        vocabulary.end_ids,
        can_force=vocabulary.bytes_from(tokenizer.encode_after(SPELLED)) == SPELLED.encode(),
    )


class Spelling:
    """What `TokenizerWrapper` asks for. Words without bytes are marks, which no text can be."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
        self.eos_token_id = min(vocabulary.end_ids)
        self.special_token_ids = [i for i, written in enumerate(vocabulary.bytes_of) if not written]
        self.tokens = [written or f"<|{i}|>".encode() for i, written in enumerate(vocabulary.bytes_of)]
        self._vocabulary, self._tokenizer = vocabulary, tokenizer
        self._id_of = {written: i for i, written in reversed([*enumerate(vocabulary.bytes_of)]) if written}
        self._longest = max(map(len, self._id_of), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """As the tokenizer spells it; where that writes a blank in front of its own, by the longest words there are."""
        ids = self._tokenizer.encode_after(text.decode())
        return ids if self._vocabulary.bytes_from(ids) == text else self._greedy(text)

    def _greedy(self, text: bytes) -> list[int]:
        ids: list[int] = []
        start = 0
        while start < len(text):
            ends = range(min(start + self._longest, len(text)), start, -1)
            end = next((end for end in ends if text[start:end] in self._id_of), None)
            if end is None:
                break  # the vocabulary cannot spell it
            ids.append(self._id_of[text[start:end]])
            start = end
        return ids


class GrammarControl:
    """Confines one answer to a grammar. A control (control.py); it is told of no thinking."""

    def __init__(self, matcher: LLMatcher, *, end_ids: frozenset[int], can_force: bool) -> None:
        self._matcher, self._end_ids, self._can_force = matcher, end_ids, can_force
        self._is_ended = False
        self._ahead = self._only()  # what is forced from here on

    @property
    def is_whole(self) -> bool:
        """Is what was drawn so far all that was asked for?"""
        return self._matcher.is_accepting()

    def forced(self) -> list[int]:
        return self._ahead

    def mask(self, allowed_V: np.ndarray) -> bool:
        if self._is_ended:
            return False
        bits = self._matcher.compute_bitmask()
        self._check()
        allowed_X = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little").view(bool)
        n = min(len(allowed_V), len(allowed_X))
        allowed_V[:n] &= allowed_X[:n]
        allowed_V[n:] = False
        return True

    def drawn(self, token: int) -> None:
        if token in self._end_ids:
            self._is_ended = True
            self._ahead = []
            return
        self._matcher.consume_token(token)
        self._check()
        ahead = self._ahead
        self._ahead = ahead[1:] if ahead[1:] and ahead[0] == token else self._only()

    def _only(self) -> list[int]:
        """The ids of the one text that can follow, as far as they do not hang on what comes behind it."""
        return self._matcher.compute_ff_tokens() if self._can_force else []

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the structure of this answer cannot be followed further: {_why(self._matcher)}")


def grammar_source(structure: Structure) -> str:
    """In llguidance's own terms. ValueError for what cannot be enforced, or is too much."""
    if structure.kind == "regex":
        if len(structure.value) > MAX_REGEX_CHARS:
            raise ValueError(f"the regex has {len(structure.value)} characters; leave it at {MAX_REGEX_CHARS}")
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(structure.value, CLASSES)}/")
    if structure.kind == "choice":
        texts = checked_choice(structure.value)
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in texts))
    if structure.kind == "tools":
        return LLMatcher.grammar_from_lark(tools_lark(structure.value))
    schema = checked_schema(structure.value or '{"type": "object"}')
    return LLMatcher.grammar_from_json_schema(_with_options(schema))


def tools_lark(text: str) -> str:
    """Of tokens/tool_structure.py's description, in which all but the schemas is ours."""
    if len(text) > MAX_CHARS:
        raise ValueError(f"the tools have {len(text)} characters; leave them at {MAX_CHARS}")
    tools, work, rules = json.loads(text), Work(), list[str]()

    def rule(parts: list[dict[str, Any]]) -> str:
        written = []
        for part in parts:
            match part:
                case {"id": int(token)}:
                    written.append(f"<[{token}]>")
                case {"text": str(said)}:
                    written.append(json.dumps(said))
                case {"schema": schema}:
                    written.append(f"s{len(rules)}")
                    schema = checked_schema(json.dumps(schema), work=work)
                    rules.append(f"s{len(rules)}: %json {json.dumps(_with_options(schema))}")
        return " ".join(written)

    calls = [f"({rule(call)})" for call in tools["calls"]]
    end = f"({rule(tools['end'])})" + "?" * tools["may_lack_end"] if tools["end"] else ""
    between = json.dumps(tools["between"]) if tools["between"] else ""
    free = "TEXT? | TEXT? calls" if tools["may_speak"] else "calls"
    return "\n".join(
        (f"start: {free}", "TEXT: /(.|\\n)+/", f"calls: {rule(tools['begin'])} call ({between} call)* {end}",
         f"call: {' | '.join(calls)}", *rules)
    )  # fmt: skip


def _with_options(schema: Any) -> dict[str, Any]:
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    return schema | {"x-guidance": JSON_OPTIONS}


def checked_choice(text: str) -> list[str]:
    texts = json.loads(text) if len(text) <= MAX_CHARS else None
    if not isinstance(texts, list) or not 1 <= len(texts) <= MAX_CHOICES:
        raise ValueError(f"a choice is among 1 to {MAX_CHOICES} texts of {MAX_CHARS} characters in all; give so many")
    for one in texts:
        if not isinstance(one, str) or len(one) > MAX_LITERAL_CHARS:
            raise ValueError(f"a choice has {str(one)[:60]!r}; give texts of at most {MAX_LITERAL_CHARS} characters")
    return texts


def _why(matcher: LLMatcher) -> str:
    said = matcher.get_error()
    if said.startswith("NoExtension"):
        return "no text fits it"
    # a parser of expressions draws a picture of many lines and ends with what is wrong
    wrong = re.search(r"^error: (.+)$", said, re.MULTILINE)
    return _first_line(said) if wrong is None else wrong[1]


def _first_line(text: str) -> str:
    return text.split("\n")[0][:200].rstrip(" :;.")
