"""A conversation in the terminal: thinking dimmed, the answer bright, both as they are drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from abyssal.checkpoint.load import Weights
from abyssal.engine.disk_cache import DiskCache
from abyssal.lm import LM, load
from abyssal.machine import leave_busy_cores
from abyssal.progress import bytes_bar
from abyssal.tokens.bpe import END_THINK, THINK
from abyssal.tokens.chat import ThinkingMode, opens_thinking, parse, render
from abyssal.types import Conversation, Message, SamplingParams


def talk(
    directory: Path,
    *,
    params: SamplingParams,
    thinking: ThinkingMode,
    prompt: str | None,
    console: Console,
    dtype: str | None = None,
    weights: Weights = "compute",
    raw: bool = False,
    disk_cache: DiskCache | None = None,
) -> None:
    """Answer `prompt` and return, or read questions until an empty line or the end of input. /new starts over.

    With `raw`, `prompt` is continued as it stands, and control tokens that it spells are control tokens.
    """
    if raw and prompt is None:
        raise ValueError("--raw continues a text, not a conversation; give the text with --prompt")
    leave_busy_cores()
    with bytes_bar(f"loading {directory}", console) as on_bytes:
        lm = load(directory, dtype=dtype, weights=weights, disk_cache=disk_cache, on_bytes=on_bytes)
    if raw and prompt is not None:
        spoken(lm, lm.prompt_ids(prompt, raw=True), params=params, in_thought=False, console=console)
        return
    if prompt is not None:
        answer(lm, [Message(role="user", content=prompt)], params=params, thinking=thinking, console=console)
        return
    console.print(f"[dim]{escape(str(directory))}; an empty line ends, /new starts over[/dim]", highlight=False)
    conversation: Conversation = []
    turn = 0
    while True:
        try:
            text = console.input("[bold cyan]> [/bold cyan]").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not text:
            return
        if text == "/new":
            conversation = []
            continue
        asked = [*conversation, Message(role="user", content=text)]
        turn += 1
        try:  # a question too long for the context ends this turn, not the conversation
            said = answer(
                lm, asked, params=replace(params, seed=params.seed + turn), thinking=thinking, console=console
            )
        except ValueError as error:
            console.print(f"[red]{escape(str(error))}[/red]")
            continue
        conversation = [*asked, said]


def answer(
    lm: LM, conversation: Conversation, *, params: SamplingParams, thinking: ThinkingMode, console: Console
) -> Message:
    """Draw one answer and print it token by token."""
    prompt = render(conversation, lm.tokenizer, add_generation_prompt=True, thinking=thinking).ids
    thought = opens_thinking(prompt, lm.tokenizer)
    ids = spoken(lm, prompt, params=params, in_thought=thought, console=console)
    return parse(ids, lm.tokenizer, thinking_open=thought)


def spoken(lm: LM, prompt: list[int], *, params: SamplingParams, in_thought: bool, console: Console) -> list[int]:
    """The ids drawn after a prompt, printed as they come."""
    ids: list[int] = []
    piece: list[int] = []  # since the last control token
    printed = ""
    for token in lm.stream(prompt, params):
        ids.append(token)
        if token in lm.tokenizer.control_ids:
            if token == lm.tokenizer.find(END_THINK) and in_thought:
                console.print()
            in_thought = token == lm.tokenizer.find(THINK)
            piece, printed = [], ""
            continue
        piece.append(token)
        text = lm.tokenizer.decode(piece)
        if not text.endswith("\ufffd"):  # half a character: wait for the rest
            console.print(
                text[len(printed) :], style="dim" if in_thought else "bold", end="", markup=False, highlight=False
            )
            printed = text
    console.print()
    return ids
