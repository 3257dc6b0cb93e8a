"""The process behind TemplateProcess: reads Jinja templates of strangers from stdin, writes what they render to stdout.

A file of its own that imports nothing of the package. Three walls: Jinja's sandbox, without loader, without attributes
that begin with an underscore and with every operand counted that could grow; limits of this process on memory and on
time in the processor, since no sandbox knows how long a loop will run; and no file, no socket and no program that it
could open any more, should a template leave the sandbox.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import jinja2
import jinja2.debug  # else imported at the first error, when nothing can be opened any more
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 1 << 30
MAX_POWER = 1 << 10  # of a base and of an exponent
FIRST_LETTER = 0xF0000  # see opaque.py
# what Jinja and Python import or open at first use: text with escapes, a filter, both kinds of error
WARM_UP = ("{% for m in x %}{{ m | tojson ~ '\\n' | wordwrap }}{% endfor %}", "{{ raise_exception('') }}", "{% if %}")


class Generation(Extension):
    """{% generation %} marks what an assistant says, for trainers that ask; it renders what stands in it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """Names and options are those that templates are written for: transformers'. Operators are bounded here, filters
    and loops from outside.

    `letters` are those that contents are hidden behind: FIRST_LETTER + i stands for letters[i].
    """

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        self.filters["tojson"] = self.tojson
        self.globals["raise_exception"] = raise_exception
        self.globals["strftime_now"] = strftime_now
        self.letters, self.max_chars = "", 0
        self._compiled: dict[str, jinja2.Template] = {}

    def compiled(self, source: str) -> jinja2.Template:
        """A process has one template; compiling it takes longer than rendering."""
        if source not in self._compiled:
            self._compiled = {source: self.from_string(source)}
        return self._compiled[source]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) for side in (left, right) if isinstance(side, (str, list, tuple))]
        if operator == "*" and sizes and (left if isinstance(left, int) else right) * sizes[0] > self.max_chars:
            raise jinja2.TemplateError("a product too large")
        if operator == "+" and sum(sizes) > self.max_chars:
            raise jinja2.TemplateError("a sum too large")
        if operator == "**" and max(abs(left), abs(right)) > MAX_POWER:
            raise jinja2.TemplateError("a power of large numbers")
        if operator == "%" and sizes:
            raise jinja2.TemplateError("formatting by %")
        return super().call_binop(context, operator, left, right)

    def tojson(
        self, value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
        sort_keys: bool = False,
    ) -> str:  # fmt: skip
        if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
            raise jinja2.TemplateError("an indentation too deep")
        # hidden letters stay as they are in it, and are escaped afterwards as those they stand for
        text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
        return text.translate({ord(letter): self.escaped(letter, ensure_ascii) for letter in set(text)})

    def escaped(self, letter: str, ensure_ascii: bool) -> str:
        """A hidden letter as JSON spells the one it stands for, hidden again. Others are the template's own."""
        if ord(letter) < FIRST_LETTER:
            return letter
        shown = json.dumps(self.letters[ord(letter) - FIRST_LETTER], ensure_ascii=ensure_ascii)[1:-1]
        return "".join(chr(FIRST_LETTER + self.letters.index(part)) for part in shown)


def raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def rendered(template: jinja2.Template, context: dict[str, Any], *, max_chars: int) -> str:
    parts: list[str] = []
    size = 0
    for part in template.generate(**context):
        size += len(part)
        if size > max_chars:
            raise jinja2.TemplateError(f"more than {max_chars} characters")
        parts.append(part)
    return "".join(parts)


def answers(env: Sandbox, request: dict[str, Any]) -> Iterator[tuple[str | None, str | None]]:
    """(text, None) or (None, why) for each job."""
    env.letters, env.max_chars = request["letters"], request["max_chars"]
    for context in request["jobs"]:
        start_clock(request["cpu_s"])
        try:
            yield rendered(env.compiled(request["template"]), context, max_chars=env.max_chars), None
        except BaseException as error:  # SystemExit too: a template gives text or a reason
            yield None, reason(error)


def reason(error: BaseException) -> str:
    said = " ".join(f"{error}".split())[:200]
    return said if isinstance(error, jinja2.TemplateError) and said else f"{type(error).__name__}: {said}"


def start_clock(cpu_s: float) -> None:
    """Its default action ends the process, even inside C code."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, cpu_s)


def close_doors() -> None:
    """Memory is bounded, and nothing can be opened or written any more."""
    if sys.platform == "win32":
        return
    import resource

    limits = {resource.RLIMIT_NOFILE: 0, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    if sys.platform == "linux":
        limits |= {resource.RLIMIT_AS: MEMORY_BYTES, resource.RLIMIT_NPROC: 0}
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most))


def main() -> None:
    requests, replies = os.fdopen(0, "rb"), os.fdopen(1, "wb")
    env = Sandbox()
    strftime_now("%c")  # reads the time zone once
    for source in WARM_UP:
        list(answers(env, {"template": source, "jobs": [{"x": ["a"]}], "letters": "", "max_chars": 99, "cpu_s": 0}))
    close_doors()
    while size := requests.read(4):
        request = json.loads(requests.read(int.from_bytes(size, "big")).decode("utf-8", "surrogatepass"))
        for answer in answers(env, request):
            start_clock(0)
            reply = json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass")
            replies.write(len(reply).to_bytes(4, "big") + reply)
            replies.flush()


if __name__ == "__main__":
    main()
