"""The chat template, the only one: a conversation to ids and back, in the dialect that the tokenizer speaks.

    <bos>system<｜User｜>question<｜Assistant｜><think>thinking</think>answer<eos><｜User｜>...

Ours (dialects.py); a model of somebody else's keeps its own, one of those we know or the Jinja template in its files
(jinja_template.py). SFT, RL, evaluation and chat all render and parse here.

Owns how pieces become ids. Control tokens are inserted as ids; text is encoded apart from them and cannot spell one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from abyssal.tokens.bpe import END_THINK, THINK
from abyssal.tokens.pieces import KeepThinking, Piece, Read, Request, ThinkingMode
from abyssal.types import Conversation, Message

if TYPE_CHECKING:
    from abyssal.tokens.tokenizer import Tokenizer


LANDING = "\n\nTime is up; the answer follows.\n"  # the last words of thinking that is cut short


class Rendered(NamedTuple):
    """`mask` is 1 exactly where the assistant speaks, its end token included."""

    ids: list[int]
    mask: list[int]


def render(
    conversation: Conversation,
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = False,
    keep_thinking: KeepThinking = "last",
    thinking: ThinkingMode = "auto",
    tools: Sequence[dict[str, Any]] = (),
) -> Rendered:
    """A conversation as ids.

    `keep_thinking="last"` keeps the thinking of an assistant turn only while nothing follows it. `thinking` shapes the
    generation prompt: "auto" leaves it to the model or to the template's own default, "on" has the model think, "off"
    keeps it from thinking. `tools` are JSON schemas of functions, for the dialects that describe them themselves.
    """
    if keep_thinking not in get_args(KeepThinking):
        raise ValueError(f"keep_thinking={keep_thinking!r}; use one of {get_args(KeepThinking)}")
    if thinking not in get_args(ThinkingMode):
        raise ValueError(f"thinking={thinking!r}; use one of {get_args(ThinkingMode)}")
    if not conversation:
        raise ValueError("the conversation is empty; give it at least one message")
    request = Request(
        conversation=conversation,
        add_generation_prompt=add_generation_prompt,
        keep_thinking=keep_thinking,
        thinking=thinking,
        tools=tools,
        bos=tokenizer.bos_name,
        eos=tokenizer.eos_name,
        can_think=tokenizer.has_thinking,
    )
    return to_ids(tokenizer.dialect.pieces(request), tokenizer)


def to_ids(pieces: list[Piece], tokenizer: Tokenizer) -> Rendered:
    """Control tokens by name, and the text between two of them encoded as one."""
    ids: list[int] = []
    mask: list[int] = []
    start = 0
    for end, piece in enumerate([*pieces, None]):
        if piece is not None and not piece.is_control:
            continue
        before, behind = pieces[start - 1] if start else None, piece
        run = _fitted(pieces[start:end], before, behind, tokenizer)
        for new, learned in _run_ids(run, tokenizer, is_first=not ids):
            ids += new
            mask += [int(learned)] * len(new)
        if piece is not None:
            ids.append(tokenizer.token_id(piece.text))
            mask.append(int(piece.learned))
        start = end + 1
    return Rendered(ids, mask)


def _fitted(run: list[Piece], before: Piece | None, behind: Piece | None, tokenizer: Tokenizer) -> list[Piece]:
    """Without the blanks that a control token beside it takes for itself: some vocabularies have such."""
    fitted = list(run)
    if before is not None and before.text in tokenizer.takes_blanks_behind:
        for i, piece in enumerate(fitted):
            fitted[i] = piece._replace(text=piece.text.lstrip())
            if fitted[i].text:
                break
    if behind is not None and behind.text in tokenizer.takes_blanks_before:
        for i, piece in reversed([*enumerate(fitted)]):
            fitted[i] = piece._replace(text=piece.text.rstrip())
            if fitted[i].text:
                break
    return fitted


def _run_ids(run: list[Piece], tokenizer: Tokenizer, *, is_first: bool) -> list[tuple[list[int], bool]]:
    """The ids of text without control tokens, cut where the assistant begins or ends to speak.

    Ids before a cut are what they are without what follows, since a prompt has to be the beginning of its answer.
    """
    merged: list[Piece] = []
    for piece in run:
        if merged and merged[-1].learned == piece.learned:
            merged[-1] = piece._replace(text=merged[-1].text + piece.text)
        elif piece.text:
            merged.append(piece)
    out: list[tuple[list[int], bool]] = []
    text, done = "", list[int]()
    for piece in merged:
        text += piece.text
        whole = tokenizer.encode(text) if is_first else tokenizer.encode_after(text)
        new = whole[len(done) :] if whole[: len(done)] == done else tokenizer.encode_after(piece.text)
        done = [*done, *new]
        out.append((new, piece.learned))
    return out


def parse(ids: list[int], tokenizer: Tokenizer, *, thinking_open: bool = False) -> Message:
    """The ids of an answer as a message.

    Thinking counts only where an answer opens with it; a control token anywhere else stays in the text, spelled out, so
    that a reward can see it. Thinking that was never closed is all thinking, with content "". `thinking_open` says that
    the prompt ended inside thinking (`opens_thinking`). Tool calls are read in the tokenizer's dialect; what is none
    stays in the text too.
    """
    ends = tokenizer.end_ids
    ids = ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]
    thinking = None
    if not thinking_open and ids and ids[0] == tokenizer.find(THINK):
        ids, thinking_open = ids[1:], True
        opened = tokenizer.encode_after(tokenizer.dialect.after_think)
        ids = ids[len(opened) :] if ids[: len(opened)] == opened else ids
    if thinking_open:
        end = ids.index(tokenizer.end_think_id) if tokenizer.end_think_id in ids else len(ids)
        thinking, ids = tokenizer.decode(ids[:end]), ids[end + 1 :]
    found = None
    if not tokenizer.control_ids.isdisjoint(ids):
        found = tokenizer.dialect.read(spelled(ids, tokenizer))
    content, calls = found or Read(tokenizer.decode(ids))
    return Message(role="assistant", content=content, thinking=thinking, tool_calls=calls)


def spelled(ids: list[int], tokenizer: Tokenizer) -> list[Piece]:
    """Ids as control tokens and the text between them."""
    pieces: list[Piece] = []
    text: list[int] = []
    for token in [*ids, None]:
        if token is not None and token not in tokenizer.control_ids:
            text.append(token)
            continue
        if text:
            pieces.append(Piece(tokenizer.decode(text)))
            text = []
        if token is not None:
            pieces.append(Piece(tokenizer.decode([token]), is_control=True))
    return pieces


def opens_thinking(prompt_ids: list[int], tokenizer: Tokenizer) -> bool:
    """Whether a prompt ends inside thinking, so that an answer begins there."""
    marks = {tokenizer.find(THINK): True, tokenizer.find(END_THINK): False, tokenizer.eos_id: False}
    return next((marks[token] for token in reversed(prompt_ids) if token in marks), False)


def landing_of(tokenizer: Tokenizer) -> str:
    """The last words that a model can use. One of our own way has read no such thing, and loses its answer over it: r1
    of runs/laptop.toml, cut after 32 tokens, was right 25 % of the time without the words and 2 % with them."""
    return "" if not tokenizer.speaks or tokenizer.dialect.name == "own" else LANDING


def landing_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Last words as they stand behind whatever was thought."""
    return tuple(tokenizer.encode_after(text)) if text else ()


def split_thinking(text: str) -> tuple[str | None, str]:
    """An answer written as one string: "<think>2*3=6</think>6" -> ("2*3=6", "6"); no mark -> (None, text)."""
    opens, closes = text.count(THINK), text.count(END_THINK)
    if opens == closes == 0:
        return None, text
    body = text.lstrip()
    if opens != 1 or closes != 1 or not body.startswith(THINK):
        raise ValueError(f"{opens} {THINK} and {closes} {END_THINK} in one answer; open it with exactly one pair")
    thinking, content = body.removeprefix(THINK).split(END_THINK)
    return thinking, content
