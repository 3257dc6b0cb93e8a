"""Strict tool calls: what an answer may be where tools can be called, in the form that its model calls them in.

Names are those of the tools, arguments fit their schemas. Owns the description, a `Structure` made of ids, texts and
schemas; engine/grammar.py makes a grammar of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from abyssal.tokens.bpe import CALLS_BEGIN, CALLS_END
from abyssal.tokens.pieces import Piece, control
from abyssal.tokens.tool_calls import TAG_BEGIN, TAG_END, bare_call, fenced_call
from abyssal.types import Structure, ToolCall

if TYPE_CHECKING:
    from abyssal.tokens.tokenizer import Tokenizer

MAX_TOOLS = 64
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
ARGUMENTS = "\0"  # stands where a call's arguments go; no name has it


def tool_structure(tools: Sequence[dict[str, Any]], tokenizer: Tokenizer, *, choice: str = "auto") -> Structure:
    """`choice`: "auto" leaves it to the model whether it calls, behind what it says or at once; "required" has it call;
    the name of a tool has it call that one."""
    functions = [_function(tool) for tool in tools]
    names = [function["name"] for function in functions]
    if not 1 <= len(names) <= MAX_TOOLS or len(set(names)) < len(names):
        raise ValueError(f"{len(names)} tools, {len(set(names))} names; give 1 to {MAX_TOOLS}, each its own name")
    if choice not in ("auto", "required"):
        if choice not in names:
            raise ValueError(f"tool choice {choice!r} is none of the tools; use 'auto', 'required' or one of {names}")
        functions = [function for function in functions if function["name"] == choice]
    form = _form(tokenizer)
    begin, end = ([control(CALLS_BEGIN)], [control(CALLS_END)]) if form != "tagged" else ([], [])

    def parts(pieces: Sequence[Piece], arguments: Any = None) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for piece in pieces:
            if piece.is_control:
                found.append({"id": tokenizer.token_id(piece.text)})
                continue
            for i, text in enumerate(piece.text.split(ARGUMENTS)):
                found += [{"schema": arguments}] if i else []
                found += [{"text": text}] if text else []
        return found

    value = {
        "may_speak": choice == "auto",
        "begin": parts(begin),
        "calls": [parts(_call(form, function["name"]), function["parameters"]) for function in functions],
        "between": "" if form == "bare" else "\n",
        "end": parts(end),
        # the template of V3 closes a single call only with the next answer: the model does not say it
        "may_lack_end": tokenizer.dialect.name == "v3",
    }
    return Structure("tools", value)


def _call(form: str, name: str) -> list[Piece]:
    call = ToolCall(name=name, arguments=ARGUMENTS)
    if form == "tagged":
        body = json.dumps({"name": name}, ensure_ascii=False)[:-1] + f', "arguments": {ARGUMENTS}}}'
        return [control(TAG_BEGIN), Piece(f"\n{body}\n"), control(TAG_END)]
    return fenced_call(call) if form == "fenced" else bare_call(call)


def _form(tokenizer: Tokenizer) -> str:
    """As tool_calls.py names them."""
    form = {"v3": "fenced", "r1": "fenced", "v3.1": "bare", "jinja": "tagged"}.get(tokenizer.dialect.name)
    needs = (TAG_BEGIN, TAG_END) if form == "tagged" else (CALLS_BEGIN, CALLS_END)
    if form is None or any(tokenizer.find(name) is None for name in needs):
        raise ValueError(
            f"the calls of the {tokenizer.dialect.name} template have no marks of their own, so they cannot be "
            "enforced; ask without strict, or for an answer by a schema"
        )
    return form


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    """Name and parameters, an object in any case."""
    function = tool.get("function", tool)
    name, parameters = function.get("name"), function.get("parameters") or {}
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise ValueError(f"a tool has the name {name!r}; give it 1 to 64 of the letters, digits and _ . - of ASCII")
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise ValueError(f"the parameters of tool {name!r} are no schema of an object; give them the type 'object'")
    return {"name": name, "parameters": {"type": "object", **parameters}}
