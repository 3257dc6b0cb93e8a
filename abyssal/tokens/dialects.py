"""The dialects: how each family of models wants a conversation written.

    own       <bos>system<｜User｜>question<｜Assistant｜><think>thinking</think>answer<eos>
    v3        DeepSeek-V3 of December 2024: the same without thinking, with tools
    r1        DeepSeek-R1: thinking opens with a line break, or is opened for the model
    v3.1      DeepSeek-V3.1: every answer stands behind <think> or </think>
    chatml    <|im_start|>user, a line break, question<|im_end|>, a line break

Each writes what the published template writes, its slips included (a call of tools that comes later in a conversation
is not opened again, V3 closes a single call only with the next answer): the model has seen no other text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NoReturn

from abyssal.tokens.bpe import (
    ASSISTANT,
    CALLS_BEGIN,
    CALLS_END,
    CHATML_END,
    CHATML_START,
    END_THINK,
    OUTPUT_BEGIN,
    OUTPUT_END,
    OUTPUTS_BEGIN,
    OUTPUTS_END,
    THINK,
    USER,
)
from abyssal.tokens.pieces import Piece, Read, Request, control, said
from abyssal.tokens.tool_calls import bare_call, fenced_call, read_calls, tools_described
from abyssal.types import Message


@dataclass(frozen=True, kw_only=True)
class Own:
    """Ours. The model decides whether it thinks, or the prompt opens or closes the thinking for it."""

    name = "own"
    switches = True
    ends = ()
    after_think = ""

    def pieces(self, request: Request) -> list[Piece]:
        _no_tools(request, "our own")
        out = [control(request.bos), Piece(request.system)]
        for i, turn in enumerate(request.turns):
            if turn.role == "user":
                out += [control(USER), Piece(turn.content)]
            elif turn.role == "assistant":
                out += [control(ASSISTANT), *_thought(request.thought(i)), said(turn.content)]
                out.append(control(request.eos, learned=True))
            else:
                _no_role(turn)
        if request.add_generation_prompt:
            out += [control(ASSISTANT), *_decided(request)]
        return out

    def read(self, answer: list[Piece]) -> Read | None:
        return None


@dataclass(frozen=True, kw_only=True)
class Published:
    """DeepSeek-V3 of December 2024 and R1, which is V3's template mended and taught to think.

    `opens`: R1's prompt opens the thinking, as since February 2025. Its earlier answers have lost theirs.
    """

    version: Literal["v3", "r1"]
    opens: bool = False
    switches = False
    ends = ()

    @property
    def name(self) -> str:
        return self.version

    @property
    def after_think(self) -> str:
        return "\n" if self.version == "r1" else ""

    def pieces(self, request: Request) -> list[Piece]:
        if request.tools:
            raise ValueError(f"the {self.name} template describes no tools; describe them in the system message")
        out = [control(request.bos), Piece(request.system)]
        has_called = has_output = after_tool = False
        for i, turn in enumerate(request.turns):
            if turn.role == "user":
                after_tool = False
                out += [control(USER), Piece(turn.content)]
            elif turn.role == "tool":
                after_tool = True
                between = Piece("\n" if self.version == "v3" else "")
                out += [between] if has_output else [control(OUTPUTS_BEGIN)]
                out += [control(OUTPUT_BEGIN), Piece(turn.content), control(OUTPUT_END)]
                has_output = True
            elif turn.tool_calls:
                after_tool = False
                out += self._calls(turn, self._thinking(request, i), has_called=has_called, eos=request.eos)
                has_called = True
            else:
                out.append(control(OUTPUTS_END if after_tool else ASSISTANT))
                out += [*self._thinking(request, i), said(turn.content), control(request.eos, learned=True)]
                after_tool = False
        if after_tool:
            out.append(control(OUTPUTS_END))
        elif request.add_generation_prompt:
            out += [control(ASSISTANT), *self._prompted(request)]
        return out

    def read(self, answer: list[Piece]) -> Read | None:
        return read_calls(answer, fenced=True)

    def _calls(self, turn: Message, thinking: list[Piece], *, has_called: bool, eos: str) -> list[Piece]:
        end = [control(CALLS_END, learned=True), control(eos, learned=True)]
        content = [said(turn.content)] if turn.content else []
        if self.version == "v3" and content:
            raise ValueError("the v3 template has no place for text beside tool calls; take it out of the message")
        out: list[Piece] = []
        for k, call in enumerate(turn.tool_calls):
            is_first = not has_called and k == 0
            begin = [control(ASSISTANT), *thinking, *content, control(CALLS_BEGIN, learned=True)]
            out += [*(begin if is_first else [Piece("\n", learned=k > 0)]), *fenced_call(call)]
            out += end if self.version == "v3" and not is_first else []
        return out + (end if self.version == "r1" else [])

    def _thinking(self, request: Request, i: int) -> list[Piece]:
        thought = request.thought(i)
        if thought is None:
            return []
        if self.version == "v3":
            raise ValueError("the v3 template has no place for thinking; use keep_thinking='none'")
        opened = [control(THINK, learned=not self.opens), Piece("\n", learned=not self.opens)]
        return [*opened, said(thought), control(END_THINK, learned=True)]

    def _prompted(self, request: Request) -> list[Piece]:
        if self.version == "v3":
            if request.thinking == "on":
                raise ValueError("thinking='on', and the v3 template has no thinking; use 'auto'")
            return []
        if request.thinking == "off":  # R1 has no switch; an empty thought is what keeps it from thinking
            return [control(THINK), Piece("\n\n"), control(END_THINK), Piece("\n\n")]
        return [control(THINK), Piece("\n")] if self.opens or request.thinking == "on" else []


@dataclass(frozen=True, kw_only=True)
class V31:
    """DeepSeek-V3.1: the prompt decides whether the model thinks; unasked it does not. Past turns keep </think> alone.
    """

    name = "v3.1"
    switches = True
    ends = ()
    after_think = ""

    def pieces(self, request: Request) -> list[Piece]:
        out = [control(request.bos), Piece(request.system)]
        if request.tools:
            out += tools_described(request.tools)
        after_user = after_tool = False
        for i, turn in enumerate(request.turns):
            if turn.role == "user":
                after_user, after_tool = True, False
                out += [control(USER), Piece(turn.content)]
                continue
            if turn.role == "tool":
                after_tool = True
                out += [control(OUTPUT_BEGIN), Piece(turn.content), control(OUTPUT_END)]
            else:
                out += self._answer(request, i, opens=after_user)
                after_tool = False
            after_user = False
        if request.add_generation_prompt and after_user and not after_tool:
            out += [control(ASSISTANT), control(THINK if request.thinking == "on" else END_THINK)]
        return out

    def read(self, answer: list[Piece]) -> Read | None:
        return read_calls(answer, fenced=False)

    def _answer(self, request: Request, i: int, *, opens: bool) -> list[Piece]:
        turn, thought = request.turns[i], request.thought(i)
        out = [control(ASSISTANT)] if opens else []
        if thought is not None:
            out += [control(THINK, learned=not opens), said(thought), control(END_THINK, learned=True)]
        elif opens:
            out.append(control(END_THINK))
        out.append(said(turn.content))
        if turn.tool_calls:
            calls = [piece for call in turn.tool_calls for piece in bare_call(call)]
            out += [control(CALLS_BEGIN, learned=True), *calls, control(CALLS_END, learned=True)]
        return [*out, control(request.eos, learned=True)]


@dataclass(frozen=True, kw_only=True)
class ChatMl:
    """ChatML. `default_system` stands where a conversation begins with another role.

    `own` is how we train on vocabularies that have its marks: all system messages in one, nothing behind the last
    answer, which ends a document.
    """

    default_system: str | None = None
    own: bool = False
    name = "chatml"
    ends = (CHATML_END,)
    after_think = ""

    @property
    def switches(self) -> bool:
        return self.own

    def pieces(self, request: Request) -> list[Piece]:
        _no_tools(request, "ChatML")
        return self._own(request) if self.own else self._as_published(request)

    def read(self, answer: list[Piece]) -> Read | None:
        return None

    def _own(self, request: Request) -> list[Piece]:
        out = _chatml_turn("system", request.system) if request.system else []
        for i, turn in enumerate(request.turns):
            if turn.role == "user":
                out += _chatml_turn("user", turn.content)
            elif turn.role == "assistant":
                is_last = i == len(request.turns) - 1 and not request.add_generation_prompt
                out += _chatml_answer(turn.content, request.thought(i), end=request.eos)
                out += [] if is_last else [Piece("\n")]
            else:
                _no_role(turn)
        return out + self._prompt(request)

    def _as_published(self, request: Request) -> list[Piece]:
        out: list[Piece] = []
        if self.default_system is not None and request.conversation[0].role != "system":
            out += _chatml_turn("system", self.default_system)
        i = 0
        for message in request.conversation:
            if message.role == "assistant":
                out += [*_chatml_answer(message.content, request.thought(i), end=CHATML_END), Piece("\n")]
            else:
                out += _chatml_turn(message.role, message.content)
            i += message.role != "system"
        return out + self._prompt(request)

    def _prompt(self, request: Request) -> list[Piece]:
        if not request.add_generation_prompt:
            return []
        closed = request.thinking == "off" and not request.can_think  # nothing to close
        return [control(CHATML_START), Piece("assistant\n"), *([] if closed else _decided(request))]


def _chatml_turn(role: str, content: str) -> list[Piece]:
    return [control(CHATML_START), Piece(f"{role}\n{content}"), control(CHATML_END), Piece("\n")]


def _chatml_answer(content: str, thought: str | None, *, end: str) -> list[Piece]:
    mark = [control(CHATML_START), Piece("assistant\n")]
    return [*mark, *_thought(thought), said(content), control(end, learned=True)]


def _thought(thought: str | None) -> list[Piece]:
    if thought is None:
        return []
    return [control(THINK, learned=True), said(thought), control(END_THINK, learned=True)]


def _decided(request: Request) -> list[Piece]:
    """The end of a prompt that opens or closes the thinking for the model."""
    if request.thinking == "on" and not request.can_think:
        raise ValueError(f"thinking='on', and this vocabulary has no {THINK}; use 'auto'")
    return [] if request.thinking == "auto" else [control(THINK if request.thinking == "on" else END_THINK)]


def _no_role(turn: Message) -> NoReturn:
    raise ValueError(f"a message has the role {turn.role!r}; the template knows system, user and assistant")


def _no_tools(request: Request, whose: str) -> None:
    if request.tools or any(turn.tool_calls for turn in request.turns):
        raise ValueError(f"{whose} template has no tool calls; describe tools in the system message")
