"""A dialect that is none of ours: the Jinja template in a model's own files, run as it stands.

The template sees a message as letters of a private alphabet (opaque.py): it can put it anywhere, trim it and write it
as JSON, and whatever a message spells, no control token comes of it. A template that reads what is said, to change it
or to leave it out, is refused in one line. It runs in a process of its own (template_process.py).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from os.path import commonprefix
from typing import NamedTuple

from abyssal.tokens.bpe import END_THINK, THINK
from abyssal.tokens.opaque import Letters, is_hidden
from abyssal.tokens.pieces import Piece, Read, Request, control, said
from abyssal.tokens.template_context import Style, as_json, context_of, texts_of
from abyssal.tokens.template_process import Outcome, TemplateProcess
from abyssal.tokens.tool_calls import read_tagged
from abyssal.types import Message

MAX_TEMPLATE_CHARS = 1 << 18  # the longest published ones have a twentieth
ITS = "the chat template in the model's files"
PROBE = [
    Message(role="user", content='Is 2 > 1?\nSay "Yes", please.'),
    Message(role="assistant", content="Yes, It is."),
    Message(role="user", content=" Why,  then? "),
]


class Span(NamedTuple):
    """Where the assistant speaks. `opened`: what a prompt for it would end in and this text has not: <think>, say."""

    start: int
    end: int
    opened: str
    thought: str | None  # to be written at its start, where the template writes none


class Probed(NamedTuple):
    """What a template did with a conversation of which everything is known."""

    error: str | None
    end: str | None  # the token behind an answer


class JinjaDialect:
    """`special` are the named tokens that templates may use (bos_token ...); `control` all that a vocabulary has."""

    name = "jinja"
    switches = True
    after_think = ""

    def __init__(self, template: str, *, special: dict[str, str], control: Sequence[str], cpu_s: float = 1.0) -> None:
        self.special = special
        self._process = TemplateProcess(template, cpu_s=cpu_s)
        names = sorted((name for name in control if name and not any(map(is_hidden, name))), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._refused: str | None = None
        if len(template) > MAX_TEMPLATE_CHARS:
            self._refused = f"it has {len(template)} characters"
        elif any(map(is_hidden, template)):
            self._refused = "it uses letters of Unicode's private planes"

    @property
    def ends(self) -> tuple[str, ...]:
        return (self._probed.end,) if self._probed.end is not None else ()

    def pieces(self, request: Request) -> list[Piece]:
        if self._probed.error is not None:
            raise ValueError(self._probed.error)
        letters = Letters(texts_of(request))
        text = self._arranged(request, letters)
        _nothing_left_out(request, text, letters)
        spans = [] if request.add_generation_prompt else self._learned(request, text, letters)
        return list(self._cut(text, spans, letters))

    def read(self, answer: list[Piece]) -> Read | None:
        return read_tagged(answer)

    def works(self, request: Request) -> bool:
        """Whether it writes this at all; if not it is not tried again."""
        (outcome,) = self.outcomes([request])
        if outcome.text is None:
            self._refused = outcome.error
        return outcome.text is not None

    def close(self) -> None:
        """End the process; a new one is started when it is needed again."""
        self._process.close()

    def outcomes(self, requests: list[Request], letters: Letters | None = None) -> list[Outcome]:
        """What the template makes of each. Without `letters` it sees everything as it is spelled."""
        if self._refused is not None:
            return [Outcome(None, self._refused)] * len(requests)
        found = self._rendered(requests, letters, "transformers")
        retried = [
            k for k, request in enumerate(requests)
            if found[k].text is None and not found[k].ended and any(turn.tool_calls for turn in request.turns)
        ]  # fmt: skip
        again = self._rendered([requests[k] for k in retried], letters, "openai") if retried else []
        for k, outcome in zip(retried, again, strict=True):
            found[k] = found[k] if outcome.text is None else outcome
        return found

    def _rendered(self, requests: list[Request], letters: Letters | None, style: Style) -> list[Outcome]:
        hide = letters.hide if letters is not None else lambda text: text
        jobs = [context_of(request, self.special, hide, style=style) for request in requests]
        n_chars = max(sum(map(len, texts_of(request))) for request in requests)
        return self._process.render(
            jobs, letters=letters.table if letters is not None else "", max_chars=(1 << 18) + 8 * n_chars
        )

    @functools.cached_property
    def _probed(self) -> Probed:
        letters = Letters(message.content for message in PROBE)
        whole = Request(conversation=PROBE, add_generation_prompt=True)
        (plain,) = self.outcomes([whole])
        if plain.text is None:
            return Probed(f"{ITS} does not work: {plain.error}; put another into tokenizer_config.json", None)
        hidden, answered = self.outcomes([whole, Request(conversation=PROBE[:2])], letters)
        if hidden.text is None or answered.text is None:
            why = hidden.error or answered.error
            return Probed(f"{ITS} does not work: {why}; put another into tokenizer_config.json", None)
        if letters.show(hidden.text) != plain.text:
            return Probed(f"{ITS} changes what messages say; put another into tokenizer_config.json", None)
        begin = answered.text.rfind(letters.hide(PROBE[1].content))
        end = self._control.search(answered.text, begin) if begin >= 0 else None
        return Probed(None, end[0] if end else None)

    def _arranged(self, request: Request, letters: Letters) -> str:
        """The conversation as one text, messages hidden in it."""
        (outcome,) = self.outcomes([request], letters)
        if outcome.text is None:
            raise ValueError(f"{ITS} refuses this conversation: {outcome.error}")
        if request.tools:
            (without,) = self.outcomes([replace(request, tools=())], letters)
            if without.text == outcome.text:
                raise ValueError(f"{ITS} describes no tools; describe them in the system message")
        asks = request.thinking == "on" or (request.thinking == "off" and request.can_think)
        if request.add_generation_prompt and asks:
            (without,) = self.outcomes([replace(request, thinking="auto")], letters)
            if without.text == outcome.text:
                raise ValueError(f"thinking={request.thinking!r}, and {ITS} has no switch for it; use 'auto'")
        return outcome.text

    def _learned(self, request: Request, text: str, letters: Letters) -> list[Span]:
        """Where the assistant speaks: from the end of the prompt for it to the token that ends an answer."""
        places = [i for i, message in enumerate(request.conversation) if message.role == "assistant"]
        if not places:
            return []
        if places[0] == 0:
            raise ValueError("the assistant speaks first, and nothing says where its part begins; begin with the user")
        if self._probed.end is None:
            raise ValueError(f"{ITS} ends answers with no token, so nobody could learn to end one; use another")
        before = [replace(request, conversation=request.conversation[:i]) for i in places]
        prompted = [replace(one, add_generation_prompt=True) for one in before]
        found = self.outcomes([*before, *prompted], letters)
        thoughts = [request.thought(i) for i, turn in enumerate(request.turns) if turn.role == "assistant"]
        spans = []
        for thought, bare, prompt in zip(thoughts, found[: len(places)], found[len(places) :], strict=True):
            if bare.text is None or prompt.text is None:
                raise ValueError(f"{ITS} refuses a part of this conversation: {bare.error or prompt.error}")
            start = len(commonprefix([prompt.text, text]))
            end = text.find(self._probed.end, start)
            if start < len(commonprefix([bare.text, prompt.text])) or end < 0:
                raise ValueError(f"{ITS} writes earlier turns anew when an answer follows; train on one turn at a time")
            start = next((m.start() for m in self._control.finditer(text) if m.start() < start < m.end()), start)
            left_out = thought is not None and not _stands_in(text, thought, letters)
            opened = prompt.text[start:] if THINK in prompt.text[start:] else ""
            spans.append(Span(start, end + len(self._probed.end), opened, thought if left_out else None))
        return spans

    def _cut(self, text: str, spans: list[Span], letters: Letters) -> Iterator[Piece]:
        """Control tokens where the template wrote them, and the text between, messages in their own letters again."""
        marks = [*self._control.finditer(text)]
        cuts = {0, len(text), *(place for mark in marks for place in mark.span())}
        ordered = sorted(cuts.union(*((span.start, span.end) for span in spans)))
        is_control = {mark.start() for mark in marks}
        thinking = {span.start: span for span in spans if span.thought is not None}
        for start, end in zip(ordered, ordered[1:], strict=False):
            if start in thinking:
                yield from self._thinking(thinking[start], letters)
            is_learned = any(span.start <= start < span.end for span in spans)
            yield Piece(letters.show(text[start:end]), start in is_control, is_learned)

    def _thinking(self, span: Span, letters: Letters) -> Iterator[Piece]:
        """What a model thinks before it answers, for templates that show no thinking since it is gone when they run."""
        assert span.thought is not None
        yield from self._cut(span.opened, [], letters) if span.opened else [control(THINK, learned=True)]
        yield from (said(span.thought), control(END_THINK, learned=True))


def _stands_in(text: str, part: str, letters: Letters) -> bool:
    core = part.strip()
    return letters.hide_all(core) in text or letters.hide_all(as_json(core)) in text


def _nothing_left_out(request: Request, text: str, letters: Letters) -> None:
    """Every message stands in the text, and the thinking that was asked for, unless it can be added (`_thinking`)."""
    i = 0
    for message in request.conversation:
        parts = [(f"what the {message.role} says", message.content)]
        parts += [("a tool call", call.name) for call in message.tool_calls]
        if message.role != "system":
            thought = request.thought(i)
            i += 1
            if thought is not None and (request.add_generation_prompt or not request.can_think):
                parts.append(("the thinking of an answer (keep_thinking='none' leaves it out)", thought))
        for what, part in parts:
            if not _stands_in(text, part, letters):
                raise ValueError(f"{ITS} leaves out {what}; put another into tokenizer_config.json")
