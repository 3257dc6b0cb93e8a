"""Tool calls as models spell them, written and read back.

    fenced   <calls><call>function<sep>NAME newline ```json newline {...} newline ```</call></calls>     DeepSeek-V3, R1
    bare     <calls><call>NAME<sep>{...}</call></calls>                                                  DeepSeek-V3.1
    tagged   <tool_call> newline {"name": NAME, "arguments": {...}} newline </tool_call>                 Qwen, Hermes

Read from control tokens, never from text that spells them. What a model spoils is no call and no error: it stays in
the text, where everybody can see it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from abyssal.tokens.bpe import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, TOOL_SEP
from abyssal.tokens.pieces import Piece, Read, control, said
from abyssal.types import ToolCall

TAG_BEGIN, TAG_END = "<tool_call>", "</tool_call>"
FENCED = re.compile(r"([^\n]+)\n```json\n(.*)\n```\s*", re.DOTALL)
FORMAT_V31 = (  # from DeepSeek-V3.1's model card; the template leaves it to the caller
    "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n", CALLS_BEGIN, CALL_BEGIN, "tool_call_name",
    TOOL_SEP, "tool_call_arguments", CALL_END, "{additional_tool_calls}", CALLS_END,
    "\n\nWhere:\n- `tool_call_name` must be an exact match to one of the available tools\n"
    "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
    "- For multiple tool calls, chain them directly without separators or spaces",
)  # fmt: skip


def fenced_call(call: ToolCall) -> list[Piece]:
    body = f"{call.name}\n```json\n{call.arguments}\n```"
    return _in_tokens(said("function"), said(body))


def bare_call(call: ToolCall) -> list[Piece]:
    return _in_tokens(said(call.name), said(call.arguments))


def tools_described(tools: Sequence[dict[str, Any]]) -> list[Piece]:
    """The part of the system text that tells DeepSeek-V3.1 what it can call, and how."""
    text = "\n\n## Tools\nYou have access to the following tools:\n\n"
    for tool in tools:
        function = tool.get("function", tool)
        try:
            parameters = json.dumps(function.get("parameters", {}), ensure_ascii=False)
            text += f"### {function['name']}\nDescription: {function.get('description', '')}\n\n"
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"a tool is no JSON schema of a function ({error!r}); give it a name") from None
        text += f"Parameters: {parameters}\n\n"
    marks = (CALLS_BEGIN, CALL_BEGIN, TOOL_SEP, CALL_END, CALLS_END)
    return [Piece(text), *(Piece(part, is_control=part in marks) for part in FORMAT_V31)]


def read_calls(answer: list[Piece], *, fenced: bool) -> Read | None:
    """Calls between DeepSeek's marks, to the end of the answer."""
    begin = next((i for i, piece in enumerate(answer) if piece == control(CALLS_BEGIN)), None)
    if begin is None:
        return None
    calls = []
    rest = [piece for piece in answer[begin + 1 :] if piece.is_control or piece.text.strip()]
    if rest[-1:] == [control(CALLS_END)]:
        rest.pop()  # the published V3 template itself forgets it behind a single call
    while rest:
        end = rest.index(control(CALL_END)) if control(CALL_END) in rest else len(rest)
        call = _call(rest[:end], fenced=fenced) if end < len(rest) else None
        if call is None:
            return None
        calls.append(call)
        rest = rest[end + 1 :]
    return Read("".join(piece.text for piece in answer[:begin]), tuple(calls)) if calls else None


def read_tagged(answer: list[Piece]) -> Read | None:
    """JSON objects between <tool_call> and </tool_call>, to the end of the answer."""
    begin = next((i for i, piece in enumerate(answer) if piece == control(TAG_BEGIN)), None)
    if begin is None:
        return None
    calls = []
    rest = [piece for piece in answer[begin:] if piece.is_control or piece.text.strip()]
    for k in range(0, len(rest), 3):
        one = rest[k : k + 3]
        if len(one) < 3 or one[0] != control(TAG_BEGIN) or one[1].is_control or one[2] != control(TAG_END):
            return None
        found = json_object(one[1].text)
        name, arguments = (found or {}).get("name"), (found or {}).get("arguments")
        if not isinstance(name, str) or not name or not isinstance(arguments, dict):
            return None
        calls.append(ToolCall(name=name, arguments=json.dumps(arguments, ensure_ascii=False)))
    content = "".join(piece.text for piece in answer[:begin])
    return Read(content.removesuffix("\n"), tuple(calls))


def _in_tokens(before: Piece, behind: Piece) -> list[Piece]:
    begin, sep, end = (control(name, learned=True) for name in (CALL_BEGIN, TOOL_SEP, CALL_END))
    return [begin, before, sep, behind, end]


def _call(pieces: list[Piece], *, fenced: bool) -> ToolCall | None:
    """One call without its last mark."""
    match pieces:
        case [Piece(first, True), Piece(kind, False), Piece(sep, True), Piece(body, False)] if (
            first == CALL_BEGIN and sep == TOOL_SEP
        ):
            name, arguments = kind, body
        case _:
            return None
    if fenced:
        found = FENCED.fullmatch(body)
        if found is None or kind != "function":
            return None
        name, arguments = found[1], found[2]
    if "\n" in name or json_object(arguments) is None:
        return None
    return ToolCall(name=name, arguments=arguments)


def json_object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
