"""What a dialect makes of a conversation: control tokens by name and text between them. Owns no dialect and no ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from abyssal.tokens.bpe import BOS, EOS
from abyssal.types import Conversation, Message, ToolCall

KeepThinking = Literal["last", "none", "all"]
ThinkingMode = Literal["auto", "on", "off"]


class Piece(NamedTuple):
    """A control token by its name, or text, which cannot become one. `learned`: the assistant says it."""

    text: str
    is_control: bool = False
    learned: bool = False


class Read(NamedTuple):
    """What an answer says beside its thinking."""

    content: str
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Request:
    """A conversation, how it is to be rendered, and what the vocabulary calls its begin and end."""

    conversation: Conversation
    add_generation_prompt: bool = False
    keep_thinking: KeepThinking = "last"
    thinking: ThinkingMode = "auto"
    tools: Sequence[dict[str, Any]] = ()
    bos: str = BOS
    eos: str = EOS
    can_think: bool = True  # the vocabulary has the thinking marks
    turns: list[Message] = field(init=False)

    def __post_init__(self) -> None:
        turns = [message for message in self.conversation if message.role != "system"]
        object.__setattr__(self, "turns", turns)

    @property
    def system(self) -> str:
        """All system messages as one, where a template has a single place for them."""
        return "\n\n".join(message.content for message in self.conversation if message.role == "system")

    def thought(self, i: int) -> str | None:
        """The thinking of turn `i` that is to be shown."""
        is_last = i == len(self.turns) - 1 and not self.add_generation_prompt
        keeps = self.keep_thinking == "all" or (self.keep_thinking == "last" and is_last)
        return self.turns[i].thinking if keeps else None


class Dialect(Protocol):
    """How conversations are written for one family of models."""

    @property
    def name(self) -> str: ...

    @property
    def ends(self) -> tuple[str, ...]:
        """What ends an answer beside the end token."""

    @property
    def switches(self) -> bool:
        """Whether the caller decides about thinking."""

    @property
    def after_think(self) -> str:
        """What the template writes between <think> and the thinking."""

    def pieces(self, request: Request) -> list[Piece]: ...

    def read(self, answer: list[Piece]) -> Read | None:
        """The tool calls of an answer, behind its thinking; None where it makes none, or spoils them."""


def control(name: str, *, learned: bool = False) -> Piece:
    return Piece(name, is_control=True, learned=learned)


def said(text: str) -> Piece:
    """What the assistant says."""
    return Piece(text, learned=True)
