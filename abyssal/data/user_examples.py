"""A user's own examples: conversations for SFT and problems for RL, one JSON object a line.

Owns checking them at the door. Does not own the template (tokens/chat.py) or the problems we make (problems.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

from abyssal.data.jsonl import read_jsonl
from abyssal.tokens.chat import split_thinking
from abyssal.types import Conversation, Language, Message, Problem

ROLES = ("system", "user", "assistant")
MESSAGE_KEYS = ("role", "content", "thinking", "reasoning_content")
PROBLEM_KEYS = ("prompt", "answer", "language", "verifier", "family", "level", "key", "metadata")


def read_conversations(path: str | os.PathLike[str]) -> list[Conversation]:
    """{"messages": [{"role", "content"[, "thinking" or "reasoning_content"]}, ...]} on each line.

    An assistant's content may also open with <think>...</think>. Other keys beside "messages" are left alone.
    """
    conversations = [_conversation(record, where) for where, record in read_jsonl(Path(path))]
    if not conversations:
        raise ValueError(f'{path} holds no conversation; write {{"messages": [...]}} on each line')
    return conversations


def read_user_problems(path: str | os.PathLike[str], *, distinct: bool = False) -> list[Problem]:
    """{"prompt", "answer"[, "language", "verifier", "family", "level", "key", "metadata"]} on each line.

    `distinct`: the same key twice is an error, as where a problem asked twice would narrow an interval by nothing.
    """
    problems, lines = [], dict[str, str]()
    for where, record in read_jsonl(Path(path)):
        problem = _problem(record, where)
        if distinct and (earlier := lines.get(problem.key)):
            raise ValueError(f"{where}: {problem.key[:80]!r} stands already at {earlier}; take one of them out")
        lines[problem.key] = where
        problems.append(problem)
    if not problems:
        raise ValueError(f'{path} holds no problem; write {{"prompt": "...", "answer": "..."}} on each line')
    return problems


def _conversation(record: dict[str, Any], where: str) -> Conversation:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where}: no "messages"; write {{"messages": [{{"role": ..., "content": ...}}, ...]}}')
    conversation = [_message(message, f"{where}: message {i}") for i, message in enumerate(messages, start=1)]
    if conversation[-1].role != "assistant":
        raise ValueError(f"{where}: the last message is the {conversation[-1].role}'s; end with the assistant's answer")
    return conversation


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f'{where}: not an object; write {{"role": ..., "content": ...}}')
    _no_other_keys(message, MESSAGE_KEYS, where, "it would not be trained on: take it out")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}: role {role!r}; use one of {', '.join(ROLES)}")
    content = _text(message, "content", where)
    given = [_text(message, key, where) for key in ("thinking", "reasoning_content") if message.get(key) is not None]
    if given and role != "assistant":
        raise ValueError(f"{where}: thinking in a {role} message; only the assistant thinks")
    if len(set(given)) > 1:
        raise ValueError(f"{where}: thinking and reasoning_content differ; keep one of them")
    if role != "assistant":
        return Message(role=role, content=content)
    try:
        inside, rest = split_thinking(content)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if inside is not None and given:
        raise ValueError(f"{where}: thinking both inside the content and beside it; keep one of them")
    return Message(role=role, content=rest, thinking=given[0] if given else inside)


def _problem(record: dict[str, Any], where: str) -> Problem:
    _no_other_keys(record, PROBLEM_KEYS, where, 'correct it, or move it into "metadata"')
    answer = record.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        record = record | {"answer": str(answer)}
    language = record.get("language", "en")
    if language not in get_args(Language):
        raise ValueError(f"{where}: language {language!r}; use one of {', '.join(get_args(Language))}")
    verifier = _text(record, "verifier", where) if "verifier" in record else "answer"
    if verifier not in ("exact", "answer", "instruction") and not all(verifier.partition(":")):
        raise ValueError(f"{where}: verifier {verifier!r}; use exact, answer, instruction or module:function")
    level = record.get("level", 0)
    if not isinstance(level, int) or isinstance(level, bool):
        raise ValueError(f"{where}: level {level!r}; write a whole number")
    metadata = record.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{where}: metadata is {type(metadata).__name__}; write an object {{...}}")
    prompt = _text(record, "prompt", where)
    if not prompt.strip():
        raise ValueError(f"{where}: the prompt is empty; write the question")
    return Problem(
        prompt=prompt,
        answer=_text(record, "answer", where),
        family=_text(record, "family", where) if "family" in record else "user",
        level=level,
        language=language,
        key=_text(record, "key", where) if "key" in record else prompt,
        verifier=verifier,
        metadata=metadata,
    )


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f'{where}: "{key}" is {"missing" if value is None else type(value).__name__}; write a string')
    return value.encode("utf-8", "replace").decode()  # JSON can escape half a character, which no bytes can hold


def _no_other_keys(record: dict[str, Any], known: tuple[str, ...], where: str, remedy: str) -> None:
    if other := sorted(set(record) - set(known)):
        raise ValueError(f"{where}: unknown key {other[0]!r}; {remedy} (known: {', '.join(known)})")
