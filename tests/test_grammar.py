"""Structure: whatever the logits want, what ends is whole and valid, and hostile structures cost little."""

from __future__ import annotations

import datetime
import json
import re
import time
from decimal import Decimal, localcontext
from typing import Any

import jsonschema
import numpy as np
import pytest
from deepseek_files import v4_directory
from hostile_structures import STRUCTURES
from test_any_tokenizer import llama2, unigram
from test_dialects import speaking

from abyssal.engine.grammar import GrammarControl, Grammars
from abyssal.engine.schema_check import MAX_WORK, checked_schema
from abyssal.engine.vocabulary import Vocabulary
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import SamplingParams, Structure

TEXTS = ['{"name": "Ann", "age": 31, "ok": true, "x": null, "y": -1.5e+3}', '{"a":1,"b":[{"c":"d"}]}', "2024-02-29",
         "T23:59:60Z", "mail@example.com 127.0.0.1 ::1 https://x.org", '":"', '","', '"}', '"]}', "\\n\\u0061",
         "所以 😀 é"]  # fmt: skip
TOKENIZER = Tokenizer(train_bpe(TEXTS * 9, vocab_size=420))
GRAMMARS = Grammars(TOKENIZER)
WRITTEN = Vocabulary.of(TOKENIZER).bytes_of
N_VOCAB = TOKENIZER.vocab_size
EOS = TOKENIZER.eos_id


def closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def text(**words: Any) -> dict[str, Any]:
    return {"type": "string", **words}


INTEGER: dict[str, Any] = {"type": "integer"}
FORMS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
SCHEMAS: dict[str, Any] = {
    "anything": {},
    "true": True,
    "types": {"type": ["integer", "null", "boolean", "array"]},
    "enum": {"enum": ["a", 1, None, {"b": [1, 2.5]}, "é\n", True]},
    "enum with type": text(enum=["a", "ab", 3]),
    "const": {"const": {"a": [1, "x"], "": None}},
    "numbers to be": {"enum": [1e5, 0.1, -0.0, 1.5e10, 100]},
    "a const before another": {"anyOf": [{"const": "ab"}, {"const": "abc"}]},
    "anyOf": {"anyOf": [INTEGER, closed(a=text())]},
    "oneOf by type": {"oneOf": [INTEGER, text()]},
    "oneOf by a word": {"oneOf": [closed(k={"const": "a"}, v=INTEGER), closed(k={"const": "b"}, v=text())]},
    "allOf": {"allOf": [{"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
                        {"properties": {"a": {"minimum": 5}, "b": text()}, "required": ["b"]}]},
    "siblings": {"type": "object", "properties": {"a": INTEGER}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    "properties": {"type": "object", "properties": {"a": INTEGER, "b": text()}, "required": ["b"]},
    "required alone": {"type": "object", "required": ["z", "a"]},
    "required and closed": closed(a=INTEGER, b={"type": "boolean"}),
    "other properties": {"type": "object", "properties": {"a": INTEGER, "a\nb": INTEGER, "é\"\\/": INTEGER},
                         "additionalProperties": text()},
    "never": {"type": "object", "properties": {"a": False, "b": True}},
    "patternProperties": {"type": "object", "patternProperties": {"^s_[a-z]*$": text(), "^i_": INTEGER},
                          "additionalProperties": False},
    "patterns and others": {"type": "object", "patternProperties": {"^s": text()}, "additionalProperties": INTEGER},
    "patterns and properties": {"type": "object", "properties": {"a": INTEGER},
                                "patternProperties": {"a": {"minimum": 5}}},
    "minProperties": {"type": "object", "minProperties": 1, "additionalProperties": INTEGER},
    "minProperties of some": {"type": "object", "minProperties": 1, "properties": {"a": INTEGER, "b": INTEGER},
                              "additionalProperties": False},
    "minProperties above required": {"type": "object", "minProperties": 2, "required": ["a"]},
    "maxProperties": {"type": "object", "maxProperties": 2, "additionalProperties": INTEGER},
    "items": {"type": "array", "items": INTEGER},
    "count": {"type": "array", "items": INTEGER, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "items": [text(), INTEGER], "additionalItems": False, "minItems": 1},
    "tuple and more": {"type": "array", "items": [text(), INTEGER], "additionalItems": {"type": "null"}},
    "prefixItems": {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "array",
                    "prefixItems": [text(), INTEGER], "items": {"type": "null"}, "minItems": 3},
    "range": {"type": "integer", "minimum": -3, "maximum": 17},
    "range without its ends": {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 17},
    "range of fractions": {"type": "number", "minimum": -1.5, "maximum": 2.25},
    "fractions without the ends": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "from": {"type": "number", "minimum": 0.1},
    "whole within fractions": {"type": "integer", "minimum": 1.5, "maximum": 4.5},
    "multipleOf": {"type": "integer", "multipleOf": 7},
    "multipleOf in a range": {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 100},
    "multipleOf a fraction": {"type": "number", "multipleOf": 0.01},
    "length": text(minLength=2, maxLength=5),
    "pattern": text(pattern=r"^[A-Z]{2}-\d+$"),
    "pattern within": text(pattern="[aeiou]{2}", maxLength=20),
    "pattern and length": text(pattern="^[a-z]+$", minLength=3, maxLength=6),
    "pattern of others": text(pattern="^[^a-z]+$", maxLength=9),
    **{form: text(format=form) for form in FORMS},
    "date and pattern": text(format="date", pattern="^20"),
    "$ref": {"$ref": "#/definitions/n", "definitions": {
        "n": closed(v=INTEGER, next={"anyOf": [{"$ref": "#/definitions/n"}, {"type": "null"}]})}},
    "$ref to a property": closed(a=INTEGER, b={"$ref": "#/properties/a"}),
    "$ref by an odd name": {"$ref": "#/$defs/a%20b~1c~0", "$defs": {"a b/c~": text(maxLength=3)}},
    "no type": {"properties": {"a": INTEGER}, "minLength": 3, "minimum": 3, "maxItems": 1},
    "nested": closed(u=closed(t={"type": "array", "items": closed(x={"type": "number", "minimum": 0}, y=text())})),
    "words that say nothing": {"title": "t", "description": "d", "default": 1, "examples": [1], "$comment": "c",
                               "readOnly": True, "x-order": 1, "$id": "https://x.org/s.json", **INTEGER},
}  # fmt: skip

CHECKS = jsonschema.FormatChecker(["ipv4", "ipv6", "uuid", "email"])
CHECKS.checks("date", ValueError)(lambda value: bool(datetime.date.fromisoformat(value)))
CHECKS.checks("time", ValueError)(lambda value: datetime.time.fromisoformat(value).tzinfo is not None)
CHECKS.checks("date-time", ValueError)(lambda value: datetime.datetime.fromisoformat(value).tzinfo is not None)
CHECKS.checks("duration")(lambda value: re.fullmatch(r"P(?=.)(\d+[YMWD])*(T(\d+[HMS])+)?", value) is not None)
CHECKS.checks("hostname")(lambda value: re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", value) is not None)
CHECKS.checks("uri")(lambda value: re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", value) is not None)


def wants(seed: int) -> np.ndarray:
    """Logits of a model that fights: it wants to end, to quote, to speak in control tokens, to write blanks or garbage.
    """
    rng = np.random.default_rng(seed)
    logits_V = rng.normal(size=N_VOCAB) * 3
    wanted = [
        {EOS},
        {i for i, b in enumerate(WRITTEN) if b'"' in b},
        TOKENIZER.control_ids,
        {i for i, b in enumerate(WRITTEN) if b and not b.strip()},
        {i for i, b in enumerate(WRITTEN) if max(b, default=0) > 127},
        {i for i, b in enumerate(WRITTEN) if b.isdigit()},
    ]
    for k in {seed % 6, (seed // 6) % 6}:
        logits_V[list(wanted[k])] += 6
    return logits_V


def drawn_by(control: GrammarControl, seed: int, *, most: int = 90) -> tuple[list[int], bool]:
    """What is drawn at temperature 2, and whether it came to its end."""
    rng, logits_V = np.random.default_rng(seed), wants(seed)
    ids: list[int] = []
    while len(ids) < most:
        forced = control.forced()
        if forced:
            token = forced[0]
        else:
            allowed_V = np.ones(N_VOCAB, dtype=bool)
            assert control.mask(allowed_V) and allowed_V.any()
            assert allowed_V[EOS] == control.is_whole
            token = int(np.where(allowed_V, logits_V / 2 + rng.gumbel(size=N_VOCAB), -np.inf).argmax())
        control.drawn(token)
        if token == EOS:
            return ids, True
        ids.append(token)
    return ids, False


def spelled(ids: list[int]) -> str:
    assert TOKENIZER.control_ids.isdisjoint(ids)
    return b"".join(WRITTEN[i] for i in ids).decode()


def endings(structure: Structure, n: int = 18) -> list[str]:
    """What is written where an answer comes to its end, of n models that fight."""
    found = [drawn_by(GRAMMARS.control(structure), seed) for seed in range(n)]
    return [spelled(ids) for ids, has_ended in found if has_ended]


def exactly(said: str) -> Any:
    """With fractions as they are written: 67.77 is a multiple of 0.01."""
    json.loads(said)
    return json.loads(said, parse_float=lambda digits: float(digits) if "e" in digits.lower() else Decimal(digits))


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_ends_is_valid_however_the_model_fights(name: str):
    schema = exactly(json.dumps(SCHEMAS[name]))
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft7Validator)
    validator = kind(schema, format_checker=CHECKS)
    ended = endings(Structure("schema", SCHEMAS[name]))
    assert len(ended) >= 3
    with localcontext(prec=200):
        for said in ended:
            validator.validate(exactly(said))


def test_json_mode_is_an_object():
    ended = endings(Structure("json"))
    assert len(ended) > 5 and all(isinstance(json.loads(said), dict) for said in ended)


REGEXES = (r"\d{3}-[\da-f]+(x|yz)?", "(ab)*", '[^/]/\n|"', ".{1,9}", "é+[^a-z]?", r"\w+@\w+\.org")


@pytest.mark.parametrize("regex", REGEXES)
def test_a_regex_is_matched_as_a_whole(regex: str):
    ended = endings(Structure("regex", regex))
    assert len(ended) > 3 and all(re.fullmatch(regex, said, re.ASCII) for said in ended)


def test_a_choice_is_one_of_its_texts():
    texts = ["a", "ab", 'say "no"\\', "\n", "<think>", "所以", ""]
    found = set(endings(Structure("choice", texts), 60))
    assert found <= set(texts) and len(found) >= 4


def accepts(schema: Any, said: str) -> bool:
    """Whether the text may be written, byte by byte, and ended there."""
    control = GRAMMARS.control(Structure("schema", schema))
    for byte in said.encode():
        token = WRITTEN.index(bytes([byte]))
        allowed_V = np.ones(N_VOCAB, dtype=bool)
        control.mask(allowed_V)
        if not allowed_V[token]:
            return False
        control.drawn(token)
    return control.is_whole


def test_a_name_has_one_spelling():
    """Else one that is described could be written as if it were another: "\\u0061" is read as "a"."""
    named = {"a": INTEGER, "a\nb": INTEGER, "/": INTEGER}
    schema = {"type": "object", "properties": named, "additionalProperties": text()}
    right = ['{"a":1}', '{"a\\nb":1}', '{"/":2}', '{"b":"x"}', '{"b":"x","b":"y"}', "{}"]
    wrong = ['{"a":"x"}', '{"\\u0061":"x"}', '{"a\\u000ab":"x"}', '{"\\/":"x"}', '{"b":"x","a":1}', '{"b":"x","a":"x"}']
    assert [said for said in right if not accepts(schema, said)] == []
    assert [said for said in wrong if accepts(schema, said)] == []


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        ("date", ["2024-02-29", "2000-02-29", "0001-12-31", "2023-04-30"],
         ["2023-02-29", "1900-02-29", "2024-02-30", "2023-04-31", "0000-01-01", "2023-13-01", "2023-1-1"]),
        ("time", ["23:59:59Z", "00:00:00.5+01:30"], ["24:00:00Z", "23:59:60Z", "12:00:00", "12:00Z"]),
        ("date-time", ["2024-02-29T12:00:00Z"], ["2023-02-29T12:00:00Z", "2024-02-29 12:00:00Z", "2024-02-29"]),
    ],
)  # fmt: skip
def test_dates_are_those_of_the_calendar(form: str, right: list[str], wrong: list[str]):
    assert [said for said in right if not accepts(text(format=form), f'"{said}"')] == []
    assert [said for said in wrong if accepts(text(format=form), f'"{said}"')] == []


def test_blanks_indent_and_do_not_go_on_forever():
    schema = closed(a=INTEGER)
    assert all(accepts(schema, said) for said in ('{"a":1}', '{"a": 1}', '{\n    "a": 1\n}', '{ "a" : 1 }'))
    assert not accepts(schema, '{\n\n"a":1}') and not accepts(schema, '{"a":' + " " * 41 + "1}")
    assert not accepts(schema, ' {"a":1}') and not accepts(schema, '{"a":1}\n')


REFUSED = {
    "not": {"not": text()}, "if": {"if": {}, "then": {}}, "contains": {"contains": INTEGER},
    "uniqueItems": {"type": "array", "uniqueItems": True}, "propertyNames": {"propertyNames": text(maxLength=3)},
    "dependencies": {"dependencies": {"a": ["b"]}}, "contentEncoding": text(contentEncoding="base64"),
    "nullable": text(nullable=True), "requird": {"type": "object", "requird": ["a"]}, "x-guidance": {"x-guidance": {}},
    "unevaluatedProperties": {"unevaluatedProperties": False}, "$dynamicRef": {"$dynamicRef": "#a"},
}  # fmt: skip


@pytest.mark.parametrize("word", REFUSED)
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"items": s}, lambda s: {"$defs": {"a": s}}])
def test_what_cannot_be_enforced_is_said_and_not_ignored(word: str, wrap: Any):
    with pytest.raises(ValueError, match=re.escape(f"has '{word}', which cannot be enforced; leave it out")):
        GRAMMARS.control(Structure("schema", wrap(REFUSED[word])))
    named = {"type": "object", "properties": {word: INTEGER}}  # a property of that name is no keyword
    assert accepts(named, f'{{"{word}":1}}')


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (("schema", '{"a'), "the schema is no JSON"),
        (("schema", 3), "# of the schema is 3; write an object or a boolean"),
        (("schema", {"items": {"anyOf": [3]}}), "#/items/anyOf/0 of the schema is 3"),
        (("schema", {"type": "strin"}), "Invalid type: strin"),
        (("schema", {"properties": 3}), "properties must be an object"),
        (("schema", {"required": 3, "enum": 3, "pattern": 3, "minItems": "a"}), "cannot be|must be|Expected"),
        (("schema", {"type": "string", "format": "zip"}), "Unknown format: zip"),
        (("schema", {"pattern": "(?=a)"}), "look-around"),
        (("schema", False), "confined to this schema: .*nsatisfiable"),
        (("schema", {"minimum": 5, "maximum": 1, "type": "integer"}), "nsatisfiable"),
        (("schema", {"$ref": "#"}), "no text fits it"),
        (("schema", {"$ref": "other.json#/a"}), "refers to 'other.json#/a'; only places in it"),
        (("schema", {"$ref": "#/x/a"}), "refers to '#/x/a', and nothing is there; correct it"),
        (("schema", {"$defs": {"a": {"$id": "a", "type": "null"}}}), "an .id of its own"),
        (("schema", {"const": "\x01"}), "letters that cannot be written"),
        (("schema", {"const": "\ud800"}), "letters that cannot be written"),
        (("schema", {"type": "object", "minProperties": 2}), "one above the names in required only"),
        (("schema", {"oneOf": [{"minimum": 1}, {"maximum": 5}]}), "oneOf"),
        (("schema", {"multipleOf": -1}), "has to be positive"),
        (("schema", {"const": float("nan")}), "is no JSON"),
        (("schema", '{"const": NaN}'), "the number NaN; JSON has none so large"),
        (("schema", {"const": object()}), "is no JSON"),
        (("regex", "[ab"), "this regex: unclosed character class"),
        (("regex", "(?=a)"), "this regex: look-around"),
        (("regex", r"\bword"), "lookarounds not supported"),
        (("regex", 3), "a regular expression is a text, not 3"),
        (("choice", []), "a choice is among 1 to 256 texts"),
        (("choice", [3]), "a choice has '3'"),
        (("choice", {"a": 1}), "a choice is among"),
        (("json", {}), "'json' has value {}"),
        (("schema",), "has value None"),
        (("xml", "a"), "kind 'xml' is unknown"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_line(structure: tuple[Any, ...], message: str):
    with pytest.raises(ValueError, match=message) as error:
        GRAMMARS.control(Structure(*structure))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["small", pytest.param("deepseek", marks=pytest.mark.slow)])
def test_hostile_structures_cost_little_and_say_why(name: str):
    """Counted in units of work, since a busy machine knows no milliseconds; those that it took are printed."""
    tokenizer = TOKENIZER if name == "small" else Tokenizer.load(v4_directory())
    grammars = Grammars(tokenizer)
    grammars.control(Structure("json"))  # the vocabulary is read once
    took, n_refused = {}, 0
    for name, structure in STRUCTURES.items():
        start = time.process_time()
        try:
            control = grammars.control(structure)
            step(control, tokenizer.vocab_size)
        except ValueError as error:
            n_refused += 1
            assert "\n" not in str(error) and len(str(error)) < 400
        took[name] = time.process_time() - start
    slowest = max(took, key=lambda name: took[name])
    print(f"{len(took)} structures, {n_refused} refused; the slowest took {took[slowest] * 1e3:.0f} ms: {slowest}")
    assert n_refused > 35 and took[slowest] < 1.0


def step(control: GrammarControl, n_vocab: int = N_VOCAB) -> None:
    allowed_V = np.ones(n_vocab, dtype=bool)
    token = ids[0] if (ids := control.forced()) else (control.mask(allowed_V), int(allowed_V.argmax()))[1]
    control.drawn(token)


def test_work_is_counted_and_bounded():
    """60 a schema, 20 a name and a third of the square of the names: 240 properties fit, 250 do not."""
    assert checked_schema(json.dumps({"properties": {f"p{i}": {"type": "null"} for i in range(100)}}))
    with pytest.raises(ValueError, match=rf"too much work \(\d+ units at #/properties/p\d+, of {MAX_WORK}\)"):
        checked_schema(json.dumps({"properties": {f"p{i}": {"type": "null"} for i in range(250)}}))
    many = {"anyOf": [closed(**{f"k{i}": INTEGER}) for i in range(100)]}
    assert checked_schema(json.dumps(many)) == many
    with pytest.raises(ValueError, match="combines alternatives in more than 100 ways"):
        checked_schema(json.dumps({"allOf": [many, {"anyOf": [text(), closed(a=INTEGER)]}]}))
    twice = {"allOf": [closed(a={"anyOf": [{"const": i} for i in range(60)]})] * 3}
    with pytest.raises(ValueError, match="too much work"):
        checked_schema(json.dumps(twice))


def test_a_step_that_takes_too_much_is_an_error():
    control = GRAMMARS.control(Structure("regex", "(a?){2000}a{2000}"))
    with pytest.raises(ValueError, match="the structure of this answer cannot be followed further: .* too many"):
        for _ in range(2000):
            step(control)


def test_forced_text_is_spelled_as_the_tokenizer_spells_it():
    said = '{"name": "Ann", "age": 31}'
    control = GRAMMARS.control(Structure("choice", [said]))
    assert control.forced() == TOKENIZER.encode(said)
    free = GRAMMARS.control(Structure("choice", [said, said[:-3] + "7}"]))
    ids = TOKENIZER.encode(said)
    assert 0 < len(free.forced()) < len(ids) and ids[: len(free.forced())] == free.forced()


def test_the_most_recently_used_are_kept():
    grammars = Grammars(TOKENIZER, kept=3, kept_chars=1000)
    compiled: list[Structure] = []
    compile_one = grammars._compiled
    grammars._compiled = lambda one: compiled.append(one) or compile_one(one)  # type: ignore
    a, b, c, d = (Structure("choice", [letter]) for letter in "abcd")
    for one in (a, b, c, a, d, a, Structure("choice", ["a"])):
        grammars.control(one)
    assert compiled == [a, b, c, d] and len(grammars) == 3
    grammars.control(b)  # gave way to d
    assert compiled == [a, b, c, d, b]
    long = Structure("choice", ["x" * 998])
    grammars.control(long)
    assert len(grammars) == 1  # however few, their texts have a limit too
    assert grammars.control(a).forced() == grammars.control(a).forced() == TOKENIZER.encode("a")


def test_equal_structures_are_one_and_stop_strings_would_cut_them():
    assert Structure("schema", {"type": "null"}) == Structure("schema", '{"type": "null"}')
    with pytest.raises(ValueError, match="would cut an answer that has a structure"):
        SamplingParams(structure=Structure("json"), stop=("}",))


@pytest.mark.parametrize("kind", ["prepended", "metaspace", "unigram"])
def test_vocabularies_of_other_kinds(kind: str):
    """Sentencepiece's: a word has its blank in front, and bytes where the vocabulary lacks the letter."""
    backend = unigram(byte_fallback=True) if kind == "unigram" else llama2(kind)
    tokenizer = Tokenizer(backend, config={"eos_token": "</s>"})
    written, n_vocab = Vocabulary.of(tokenizer).bytes_of, tokenizer.vocab_size
    control_of, schema = Grammars(tokenizer), closed(a={"enum": ["to the sea", "所"]}, b=INTEGER)
    said = []
    for seed in range(30):
        control, rng, ids = control_of.control(Structure("schema", schema)), np.random.default_rng(seed), list[int]()
        while len(ids) < 90 and tokenizer.end_ids.isdisjoint(ids):
            allowed_V = np.ones(n_vocab, dtype=bool)
            forced = control.forced()
            assert forced or control.mask(allowed_V)
            ids.append(forced[0] if forced else int(np.where(allowed_V, rng.gumbel(size=n_vocab), -np.inf).argmax()))
            control.drawn(ids[-1])
        if not tokenizer.end_ids.isdisjoint(ids):
            said.append(b"".join(written[i] for i in ids[:-1]).decode())
            assert json.loads(tokenizer.decode(ids[:-1])) == json.loads(said[-1])
    assert len(said) > 10
    for one in said:
        jsonschema.validate(json.loads(one), schema)


def test_an_answer_may_end_with_any_of_the_ends():
    """ChatML's turn ends with its own mark, a document with another."""
    tokenizer = speaking(None, "<|im_start|>", "<|im_end|>", without=("<｜User｜>", "<｜Assistant｜>"))
    assert len(tokenizer.end_ids) == 2
    control = Grammars(tokenizer).control(Structure("choice", ["ab", "a"]))
    for token, ends in ((None, False), (tokenizer.encode("a")[0], True), (tokenizer.encode("b")[0], True)):
        if token is not None:
            control.drawn(token)
        allowed_V = np.ones(tokenizer.vocab_size, dtype=bool)
        assert control.mask(allowed_V)
        assert {i for i in tokenizer.control_ids if allowed_V[i]} == (tokenizer.end_ids if ends else set())
    assert {*allowed_V.nonzero()[0].tolist()} == tokenizer.end_ids
