"""Structures that are meant to cost: huge, deep, recursive, ambiguous, impossible."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from abyssal.types import Structure

STRING: dict[str, Any] = {"type": "string"}


def nested(n: int, wrap: Callable[[Any], Any]) -> Any:
    schema: Any = STRING
    for _ in range(n):
        schema = wrap(schema)
    return schema


def chain(n: int, wrap: Callable[[dict[str, str]], Any]) -> dict[str, Any]:
    """n definitions, each made of the one behind it."""
    definitions: dict[str, Any] = {f"a{i}": wrap({"$ref": f"#/definitions/a{i + 1}"}) for i in range(n)}
    return {"$ref": "#/definitions/a0", "definitions": definitions | {f"a{n}": STRING}}


def named(n: int, schema: Any = STRING, stem: str = "p", **words: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"{stem}{i}": schema for i in range(n)}, **words}


def choices(n: int, k: int) -> dict[str, Any]:
    """k ways, n times over, all at once."""
    ways = [[named(1, {"const": j}, f"p{i}_{j}", required=[f"p{i}_{j}0"]) for j in range(k)] for i in range(n)]
    return {"allOf": [{"anyOf": way} for way in ways]}


ARRAY = {"type": "array"}
SCHEMAS: dict[str, Any] = {
    "5,000 properties": named(5000),
    "256 optional properties": named(256),
    "256 required properties": named(256, required=[f"p{i}" for i in range(256)]),
    "seven objects of 250 properties": {"type": "object", "properties": {f"o{i}": named(250) for i in range(7)}},
    "5,000 required names": {"type": "object", "required": [f"r{i}" for i in range(5000)]},
    "10,000 values": {"enum": [f"v{i * 7919 % 100_003}" for i in range(10_000)]},
    "4,000 values": {"enum": [f"v{i * 7919 % 100_003}" for i in range(4_000)]},
    "two lists of 3,000 values": {"allOf": [{"enum": [*range(3000)]}, {"enum": [*range(2999, 5999)]}]},
    "200 objects in one another": nested(200, lambda schema: {"type": "object", "properties": {"a": schema}}),
    "5,000 arrays in one another": "[" * 5000,
    "100 lists as a value": {"const": nested(98, lambda value: [value])},
    "2,000 branches": {"anyOf": [{"required": [f"k{i}"], "properties": {f"k{i}": {}}} for i in range(2000)]},
    "256 branches": {"anyOf": [{"required": [f"k{i}"], "properties": {f"k{i}": {}}} for i in range(256)]},
    "256 exclusive branches": {"oneOf": [named(1, {"const": i}, required=["p0"]) for i in range(256)]},
    "six choices of six": choices(6, 6),
    "four choices of four": choices(4, 4),
    "three choices of four": choices(3, 4),
    "choices in choices": {"allOf": [named(20, {"anyOf": [{"const": [i, j]} for j in range(9)]}) for i in range(5)]},
    "a chain of 1,500 references": chain(1500, lambda ref: ref),
    "references doubled 20 times": chain(20, lambda ref: {"allOf": [ref, ref]}),
    "references branched 20 times": chain(20, lambda ref: {"anyOf": [ref, {**ARRAY, "items": ref}]}),
    "tuples doubled 20 times": chain(20, lambda ref: {**ARRAY, "prefixItems": [ref, ref], "minItems": 2}),
    "itself": {"$ref": "#"},
    "two that are each other": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "itself and more": {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "object"}]}}},
    "never whole": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "another's": {"$ref": "https://example.com/schema.json"},
    "a file": {"$ref": "file:///etc/passwd"},
    "a billion items": {**ARRAY, "minItems": 10**9},
    "60,000 items of 60,000": nested(3, lambda schema: {**ARRAY, "items": schema, "minItems": 60_000}),
    "60,000 letters": {**STRING, "minLength": 60_000, "maxLength": 65_536},
    "a multiple of a prime": {"type": "integer", "multipleOf": 1_000_003},
    "a multiple of 997": {"type": "integer", "multipleOf": 997, "minimum": -(10**12), "maximum": 10**12},
    "two multiples": {"allOf": [{"type": "integer", "multipleOf": 499}, {"type": "integer", "multipleOf": 491}]},
    "many multiples": named(100, {"type": "integer", "multipleOf": 99}),
    "a multiple of nearly nothing": {"type": "number", "multipleOf": 1e-12},
    "a number without end": {"type": "number", "minimum": -1e300, "maximum": 1e300},
    "an integer of 5,000 digits": '{"const": ' + "1" * 5000 + "}",
    "six patterns at once": {"allOf": [{**STRING, "pattern": "a.{50}"} for _ in range(6)]},
    "eight different patterns at once": {"allOf": [{**STRING, "pattern": f"{c}.{{50}}{c}"} for c in "abcdefgh"]},
    "a pattern and 5,000 letters": {**STRING, "pattern": r"(\w+\s)*x", "minLength": 500, "maxLength": 5000},
    "a pattern and a form": {**STRING, "pattern": "(a|b|c.{30})*", "format": "email"},
    "names by 20 patterns": {"type": "object", "patternProperties": {f"a.{{{i + 20}}}b{i}": {} for i in range(20)}},
    "names by 32 patterns": {"type": "object", "patternProperties": {f"^p{i:02}_.*$": {} for i in range(32)}},
    "500 forms": {**ARRAY, "prefixItems": [{**STRING, "format": "uri"}, {**STRING, "format": "email"}] * 125},
    "a text of 60,000 letters": {"const": "x" * 60_000},
    "15 texts of 4,096 letters": {**ARRAY, "prefixItems": [{"const": c * 4096} for c in "abcdefghijklmno"]},
    "a megabyte": json.dumps({"description": "x" * (1 << 20)}),
}  # fmt: skip
REGEXES = {
    "nested stars": "(a+)+(b*)*(a|a)*$",
    "a million letters": "a{1,1000000}",
    "a billion of three": "((a{1,1000}){1,1000}){1,1000}",
    "a billion of anything": "(((.{1,1000}b?){1,1000}c?){1,1000}d?)*",
    "the 200th letter from the end": ".*a.{200}",
    "twenty of them": "(.*a.{20}){20}",
    "optional and not": "(a?){2000}a{2000}",
    "a hundred stars": "(.*x)" * 100,
    "words": r"(\w+\s){1000}",
    "letters of all languages": r"[\p{L}&&\p{Greek}]{1,100}(\p{L}|\p{N}){1,500}",
    "1,000 alternatives": "|".join(f"w{i * 7919 % 9973}" for i in range(680)),
    "ambiguous alternatives": "(a|aa|aaa|aaaa)*b" * 100,
    "case": "(?i)" + "abcdefghij" * 100,
    "brackets": "(" * 2000,
    "closed brackets": "(" * 1000 + "a" + ")" * 1000,
    "too long": "ab" * 5000,
    "long": "ab" * 2000,
    "empty things": "(()*){1,1000000}",
}
STRUCTURES = {name: Structure("schema", schema) for name, schema in SCHEMAS.items()}
STRUCTURES |= {name: Structure("regex", regex) for name, regex in REGEXES.items()}
STRUCTURES |= {
    "choice of 5,000": Structure("choice", [f"{i}" for i in range(5000)]),
    "choice of 256": Structure("choice", [f"{i} " * 40 for i in range(256)]),
    "choice of a long text": Structure("choice", ["x" * 60_000]),
    "choice of nothing": Structure("choice", []),
}
