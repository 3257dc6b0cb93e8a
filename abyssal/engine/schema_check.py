"""What of a JSON schema becomes a grammar, and how much of it: a hostile one costs little, and nothing is left out.

A keyword that cannot be enforced is an error, never ignored; so is one that nobody knows, since it may be a slip of the
pen. The bounds keep the work of the grammar's compiler, which grows with the square of some counts, far below a tenth
of a second. Dates are checked to the calendar here, because the compiler knows no leap years.
"""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

MAX_CHARS = 1 << 16
MAX_LITERAL_CHARS = 4096  # of a name or a value to be written as it stands
MAX_LEVELS = 100  # of objects and lists within one another
MAX_COUNT = 1 << 16  # minLength and its kin
MAX_ALTERNATIVES = 100  # of what allOf combines, multiplied out
MAX_WORK = 30_000  # about microseconds of compiling: what follows is measured

SCHEMA, NAME, VALUE, VALUES, RANGE, PATTERN, FORM, URI, STATE = 60, 20, 10, 400, 300, 300, 500, 1000, 5

ENFORCED = frozenset(
    "type enum const anyOf oneOf allOf $ref properties patternProperties additionalProperties required minProperties "
    "maxProperties items prefixItems additionalItems minItems maxItems minLength maxLength pattern format minimum "
    "maximum exclusiveMinimum exclusiveMaximum multipleOf".split()
)
SAYING_NOTHING = frozenset(
    "$schema $comment $id $defs definitions title description default examples readOnly writeOnly deprecated".split()
)
ONE = ("additionalProperties", "additionalItems", "items")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
MAPS = ("properties", "patternProperties", "$defs", "definitions")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
# JSON has short escapes for a few control characters; \\u is not written, so that a name has one spelling only
UNWRITABLE = frozenset(map(chr, range(32))) - frozenset("\b\t\n\f\r")

# Gregorian, years 0001 to 9999; a leap year has an even third digit before 0, 4 and 8 or an odd one before 2 and 6
YEAR = r"(?:[1-9]\d{3}|0[1-9]\d{2}|00[1-9]\d|000[1-9])"
LEAP = r"(?:\d{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
DAY = r"(?:0[1-9]|1\d|2[0-8])"
LATE = r"(?:(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
DATE = rf"(?:{YEAR}-(?:(?:0[1-9]|1[0-2])-{DAY}|{LATE})|{LEAP}-02-29)"
TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
FORMATS = {"date": f"^{DATE}$", "time": f"^{TIME}$", "date-time": f"^{DATE}T{TIME}$"}


def checked_schema(text: str, *, work: Work | None = None) -> Any:
    """The schema in a JSON text, as the compiler is to read it. ValueError for what cannot be enforced, or too much.

    Several that share `work` are too much together when one schema of their size would be.
    """
    if len(text) > MAX_CHARS:
        raise ValueError(f"the schema has {len(text)} characters; leave it at {MAX_CHARS}")
    try:
        schema = json.loads(text, parse_float=_finite, parse_constant=_finite, parse_int=_whole)
        _check_levels(schema)
        return Checker(schema, work or Work()).checked(schema, "#")
    except RecursionError:
        raise ValueError(f"the schema has more than {MAX_LEVELS} levels; take some out") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"the schema is no JSON ({error}); correct it") from None


class Work:
    """What compiling will cost, in units of MAX_WORK."""

    def __init__(self) -> None:
        self.spent = 0

    def add(self, units: int, where: str) -> None:
        self.spent += units
        if self.spent > MAX_WORK:
            raise ValueError(f"the schema is too much work ({self.spent} units at {where}, of {MAX_WORK}); shorten it")


class Checker:
    """Walks one schema. `where` is the place of what is looked at, as a JSON pointer."""

    def __init__(self, root: Any, work: Work) -> None:
        self._root, self._work = root, work
        self._multiples = 1
        self._alternatives: dict[int, int] = {}

    def checked(self, schema: Any, where: str, *, power: int = 1) -> Any:
        """A schema with nothing in it that cannot be enforced; a new one, dates as patterns.

        It is one of `power` that are combined: what has several ways in it may come to have that power of them.
        """
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise ValueError(f"{where} of the schema is {_short(schema)}; write an object or a boolean")
        self._check_words(schema, where)
        self._check_sizes(schema, where)
        self._check_least(schema, where)
        self.alternatives(schema)
        self._work.add(_work(schema, power), where)
        power = min(power * max(1, len(_listed(schema.get("allOf")))), 16)
        return _dated({word: self._within(word, value, f"{where}/{word}", power) for word, value in schema.items()})

    def _within(self, word: str, value: Any, where: str, power: int) -> Any:
        """The value of a keyword, its schemas checked. What is of a wrong kind the compiler refuses by name."""

        if word in MAPS and isinstance(value, dict):
            return {name: self.checked(schema, f"{where}/{name}", power=power) for name, schema in value.items()}
        if word in LISTS and isinstance(value, list):
            return [self.checked(schema, f"{where}/{i}", power=power) for i, schema in enumerate(value)]
        return self.checked(value, where, power=power) if word in ONE else value

    def _check_words(self, schema: dict[str, Any], where: str) -> None:
        for word in schema:
            if word == "x-guidance" or (word not in ENFORCED | SAYING_NOTHING and not word.startswith("x-")):
                raise ValueError(f"{where} of the schema has {_short(word)}, which cannot be enforced; leave it out")
        if "$id" in schema and schema is not self._root:
            raise ValueError(f"{where} of the schema has an $id of its own; refer to it by its place, as #/$defs/name")
        ref = schema.get("$ref")
        if isinstance(ref, str):
            if ref != "#" and not ref.startswith("#/"):
                raise ValueError(f"{where} of the schema refers to {_short(ref)}; only places in it, #/..., are read")
            if not self._found(ref)[0]:
                raise ValueError(f"{where} of the schema refers to {_short(ref)}, and nothing is there; correct it")

    def _check_sizes(self, schema: dict[str, Any], where: str) -> None:
        for word in COUNTS:
            if isinstance(count := schema.get(word), int) and count > MAX_COUNT:
                raise ValueError(f"{where}/{word} of the schema is {_short(count)}; leave it at {MAX_COUNT} or out")
        multiple = schema.get("multipleOf")
        if isinstance(multiple, int | float):
            self._multiples = math.lcm(self._multiples, max(0, _digits(multiple)))
            if not 0 < self._multiples * STATE <= MAX_WORK:
                raise ValueError(
                    f"{where}/multipleOf of the schema is {_short(multiple)}; it has to be positive, and the digits of "
                    f"all have a common multiple up to {MAX_WORK // STATE}"
                )
        for word in ("const", "enum", "required"):
            for text in _texts(schema.get(word)):
                _check_literal(text, f"{where}/{word}")
        for name in _names(schema.get("properties")):
            _check_literal(name, f"{where}/properties")

    def _check_least(self, schema: dict[str, Any], where: str) -> None:
        """Names that the schema does not list may be written twice, and then count once when the text is read."""
        least, n_sure = schema.get("minProperties"), len(set(map(str, _listed(schema.get("required")))))
        is_open = schema.get("additionalProperties") is not False or "patternProperties" in schema
        if isinstance(least, int) and least > n_sure + 1 and is_open:
            raise ValueError(
                f"{where}/minProperties of the schema is {least}, which can be enforced one above the names in "
                "required only; list those meant"
            )

    def alternatives(self, schema: Any) -> int:
        """In how many ways the schema can be met, what allOf and siblings combine multiplied out."""
        if not isinstance(schema, dict):
            return 1
        if (known := self._alternatives.get(id(schema))) is not None:
            return known
        self._alternatives[id(schema)] = 1  # of a schema that refers to itself
        factors = [sum(map(self.alternatives, _listed(schema.get(word)))) for word in ("anyOf", "oneOf")]
        factors += map(self.alternatives, _listed(schema.get("allOf")))
        if isinstance(ref := schema.get("$ref"), str):
            factors.append(self.alternatives(self._found(ref)[1]))
        factors.append(len(_listed(schema.get("enum"))) // 16)  # values are cheaper than schemas
        several = [n for n in factors if n > 1]
        n = self._alternatives[id(schema)] = math.prod(several)
        if len(several) > 1 and n > MAX_ALTERNATIVES:
            raise ValueError(
                f"the schema combines alternatives in more than {MAX_ALTERNATIVES} ways; write out those that are meant"
            )
        return n

    def _found(self, ref: str) -> tuple[bool, Any]:
        """What stands at a place of the schema."""
        value = self._root
        for part in ref.split("/")[1:]:
            part = _unescaped(part)
            if isinstance(value, dict) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                return False, None
        return True, value


def _work(schema: dict[str, Any], power: int) -> int:
    """Of this schema without those in it."""
    n_names = max(len(_names(schema.get("properties"))), len(_listed(schema.get("required"))))
    n_patterns = len(_names(schema.get("patternProperties")))
    ways = [len(_listed(schema.get(word))) for word in ("anyOf", "oneOf")]
    values = [*_all_below(schema.get("enum")), *_all_below(schema.get("const"))]
    form, multiple = schema.get("format"), schema.get("multipleOf")
    work = SCHEMA + NAME * n_names + n_names**2 // 3 + 10 * n_patterns**2
    work += sum(n**2 + (n**power if power > 1 else 0) for n in ways)
    work += VALUE * len(values) + VALUES * sum(isinstance(value, list | dict) for value in values)
    work += PATTERN * (n_patterns + ("pattern" in schema)) + RANGE * any(word in schema for word in BOUNDS)
    work += 0 if form is None else URI if form == "uri" else FORM
    return work + (STATE * _digits(multiple) if isinstance(multiple, int | float) else 0)


def _dated(schema: dict[str, Any]) -> dict[str, Any]:
    """With formats of dates as patterns."""
    form = schema.get("format")
    if not isinstance(form, str) or form not in FORMATS:
        return schema
    rest = {word: value for word, value in schema.items() if word != "format"}
    if "pattern" not in rest:
        return rest | {"pattern": FORMATS[form]}
    return rest | {"allOf": [*_listed(rest.get("allOf")), {"pattern": FORMATS[form]}]}


def _check_levels(value: Any) -> None:
    level, values = 0, [value]
    while values := [below for one in values for below in _below(one)]:
        level += 1
        if level > MAX_LEVELS:
            raise ValueError(f"the schema has more than {MAX_LEVELS} levels; take some out")


def _check_literal(text: str, where: str) -> None:
    if len(text) > MAX_LITERAL_CHARS:
        raise ValueError(f"{where} of the schema has a text of {len(text)} characters; leave it at {MAX_LITERAL_CHARS}")
    if not UNWRITABLE.isdisjoint(text) or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{where} of the schema has {_short(text)}, with letters that cannot be written; leave it out")


def _below(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _all_below(value: Any) -> list[Any]:
    found, values = [], [value]
    while values := [below for one in values for below in _below(one)]:
        found += values
    return found


def _texts(value: Any) -> list[str]:
    """All strings in a value, names included."""
    values = [value, *_all_below(value)]
    return [one for one in values if isinstance(one, str)] + [name for one in values for name in _names(one)]


def _names(value: Any) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _digits(number: float) -> int:
    """0.25 -> 25, 20 -> 20: what a multiple is counted in."""
    _, digits, exponent = Decimal(str(number)).as_tuple()
    assert isinstance(exponent, int), "schemas have finite numbers"
    return int(number) if exponent >= 0 or not number > 0 else int("".join(map(str, digits)))


def _unescaped(part: str) -> str:
    return unquote(part).replace("~1", "/").replace("~0", "~")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the schema has the number {text}; JSON has none so large")
    return number


def _whole(text: str) -> int:
    if len(text) > 40:
        raise ValueError(f"the schema has a number of {len(text)} digits; leave it at 40")
    return int(text)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
