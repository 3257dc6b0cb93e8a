"""What a stranger's chat template is given: messages and tools as the plain data that templates are written for.

All that a message or a caller says is hidden behind letters of its own (opaque.py); roles, the names that templates ask
for and the words they compare are not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Literal

from abyssal.tokens.pieces import Request
from abyssal.tokens.tool_calls import json_object

# of a tool's schema: keys that templates ask for, and values that they compare
SCHEMA_KEYS = frozenset(
    "type function name description parameters properties required items enum title default anyOf oneOf allOf const "
    "format minimum maximum additionalProperties strict return nullable $ref $defs".split()
)
SCHEMA_TYPES = frozenset("function object string integer number boolean array null".split())


# of tool calls. transformers: arguments as objects, no content where there is none. openai: a text, and null
Style = Literal["transformers", "openai"]


def context_of(
    request: Request, special: dict[str, str], hide: Callable[[str], str], *, style: Style = "transformers"
) -> dict[str, Any]:
    """The variables of one rendering."""
    turns = iter(range(len(request.turns)))
    called = {call.id: call.name for turn in request.turns for call in turn.tool_calls if call.id}
    messages = []
    for message in request.conversation:
        entry: dict[str, Any] = {"role": message.role, "content": hide(message.content)}
        thought = request.thought(next(turns)) if message.role != "system" else None
        if message.role == "assistant" and thought is not None:
            entry |= dict.fromkeys(("reasoning_content", "thinking"), hide(thought))
        if message.tool_calls:
            calls = [
                {"type": "function", "id": hide(call.id), "function": {
                    "name": hide(call.name), "arguments": _arguments(call.arguments, hide, style=style),
                }}
                for call in message.tool_calls
            ]  # fmt: skip
            entry["tool_calls"] = calls
            if not message.content:
                del entry["content"]
                entry |= {"content": None} if style == "openai" else {}
        if message.tool_call_id is not None:
            entry["tool_call_id"] = hide(message.tool_call_id)
            if message.tool_call_id in called:
                entry["name"] = hide(called[message.tool_call_id])
        messages.append(entry)
    thinks = request.thinking == "on"
    switch = {} if request.thinking == "auto" else {"thinking": thinks, "enable_thinking": thinks}
    return {
        "messages": messages,
        "tools": [_schema(tool, hide) for tool in request.tools] or None,
        "documents": None,
        "add_generation_prompt": request.add_generation_prompt,
        **special,
        **switch,
    }


def texts_of(request: Request) -> Iterator[str]:
    """All that may be hidden."""
    for message in request.conversation:
        yield from (message.content, message.thinking or "", message.tool_call_id or "")
        for call in message.tool_calls:
            yield from (call.name, call.id, call.arguments, *_strings(json_object(call.arguments)))
    yield from _strings(list(request.tools))


def _arguments(arguments: str, hide: Callable[[str], str], *, style: Style) -> Any:
    found = json_object(arguments) if style == "transformers" else None
    return hide(arguments) if found is None else _hidden(found, hide)


def _hidden(value: Any, hide: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, list):
        return [_hidden(part, hide) for part in value]
    if isinstance(value, dict):
        return {hide(str(key)): _hidden(part, hide) for key, part in value.items()}
    return value


def _schema(value: Any, hide: Callable[[str], str]) -> Any:
    if isinstance(value, list | tuple):
        return [_schema(part, hide) for part in value]
    if isinstance(value, dict):
        return {
            (key if key in SCHEMA_KEYS else hide(str(key))): (
                part if key == "type" and isinstance(part, str) and part in SCHEMA_TYPES else _schema(part, hide)
            )
            for key, part in value.items()
        }
    return _hidden(value, hide)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield str(key)
            yield from _strings(part)


def as_json(text: str) -> str:
    """As it stands inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
