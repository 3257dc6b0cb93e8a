"""Which dialect a tokenizer speaks, read from its files.

A chat template is known by what it does: it is run on conversations of every kind, and the dialect that writes the same
of each is the one. So a copy with other blanks is the same dialect, and one that differs in a single turn is none of
ours: it is run as it stands. Without a template the vocabulary's marks decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from abyssal.tokens.bpe import BOS, CHATML_END, CHATML_START, EOS, THINK, USER
from abyssal.tokens.dialects import V31, ChatMl, Own, Published
from abyssal.tokens.jinja_template import JinjaDialect
from abyssal.tokens.our_templates import own_template, v3_template
from abyssal.tokens.pieces import Dialect, Request
from abyssal.types import Message, ToolCall

SYSTEM = Message(role="system", content="Be brief.")
ASKED = Message(role="user", content="Two by three?")
SAID = Message(role="assistant", content="Six.")
CALLS = tuple(ToolCall(name=f"multiply_{k}", arguments='{"a": 2, "b": 3}') for k in range(3))
OUTPUT = Message(role="tool", content="6")
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}


def calling(*calls: ToolCall) -> Message:
    return Message(role="assistant", content="", tool_calls=calls)


PROBES = tuple(
    Request(conversation=conversation, add_generation_prompt=prompt)
    for prompt in (False, True)
    for conversation in (
        [ASKED],
        [SYSTEM, ASKED],
        [ASKED, SAID, ASKED],
        [SYSTEM, ASKED, SAID, SYSTEM, ASKED, SAID],
        [ASKED, calling(CALLS[0]), OUTPUT],
        [ASKED, calling(*CALLS), OUTPUT, OUTPUT, SAID],
        [ASKED, calling(CALLS[0]), OUTPUT, calling(*CALLS[:2]), OUTPUT, SAID, ASKED, SAID],
    )
)
SWITCHED = tuple(Request(conversation=[ASKED], add_generation_prompt=True, thinking=mode) for mode in ("on", "off"))
WITH_TOOLS = Request(conversation=[ASKED], add_generation_prompt=True, tools=[TOOL])
PLAIN = PROBES[len(PROBES) // 2]  # the question alone, with a prompt


OURS: tuple[Dialect, ...] = (Own(), ChatMl(own=True), Published(version="v3"))  # spoken without a template in the files


def dialect_of(template: str | None, *, special: dict[str, str], control: Sequence[str]) -> Dialect | None:
    """`special` are the tokens with a role (bos_token ...), `control` all control tokens; None without a template."""
    names = set(control)
    if template is None:
        return marked(names)
    if template in (mine := {template_of(dialect): dialect for dialect in OURS}):
        return mine[template]
    stranger = JinjaDialect(template, special=special, control=control)
    if not stranger.works(PLAIN):
        return stranger
    requests = [*PROBES, *SWITCHED, WITH_TOOLS]
    texts = [outcome.text for outcome in stranger.outcomes(requests)]
    made = dict(zip(map(id, requests), texts, strict=True))
    bos, eos = special.get("bos_token", BOS), special.get("eos_token", EOS)

    def writes(dialect: Dialect, request: Request) -> str | None:
        try:
            pieces = dialect.pieces(replace(request, bos=bos, eos=eos, can_think=THINK in names))
        except ValueError:
            return None
        unknown = any(piece.is_control and piece.text not in names for piece in pieces)
        return None if unknown else "".join(piece.text for piece in pieces)

    def is_same(dialect: Dialect) -> bool:
        if any(writes(dialect, request) != made[id(request)] for request in PROBES):
            return False
        if made[id(WITH_TOOLS)] != made[id(PLAIN)]:
            return False
        # a template without a switch for thinking writes the same either way
        wanted = [writes(dialect, request) if dialect.switches else made[id(PLAIN)] for request in SWITCHED]
        return wanted == [made[id(request)] for request in SWITCHED]

    known: list[Dialect] = [Own(), ChatMl(own=True), Published(version="v3"), Published(version="r1")]
    known += [Published(version="r1", opens=True), V31(), ChatMl(default_system=default_system(made[id(PLAIN)]))]
    found = next((dialect for dialect in known if is_same(dialect)), None)
    if found is not None:
        stranger.close()
    return found or stranger


def default_system(text: str | None) -> str | None:
    """What a ChatML template puts before a conversation that has no system message."""
    begin, end = f"{CHATML_START}system\n", f"{CHATML_END}\n{CHATML_START}user\n"
    return text[len(begin) : text.index(end)] if text and text.startswith(begin) and end in text else None


def marked(names: set[str]) -> Dialect | None:
    """The dialect that a vocabulary's marks stand for."""
    if USER in names:
        return Own() if THINK in names else Published(version="v3")
    return ChatMl(own=True) if {CHATML_START, CHATML_END} <= names else None


def template_of(dialect: Dialect | None) -> str | None:
    """A dialect of OURS as Jinja, for other libraries."""
    if dialect is None:
        return None
    templates = (own_template(), own_template(chatml=True), v3_template())
    return templates[OURS.index(dialect)]
