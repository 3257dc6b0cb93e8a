"""A conversation in the terminal: thinking dimmed, the answer bright, both as they are drawn.

Ctrl-C while it thinks asks for the answer now; a second one, or one at any other time, ends the program.
"""

from __future__ import annotations

import signal
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.markup import escape

from abyssal.checkpoint.load import Weights
from abyssal.checkpoint.own_thinking import Effort
from abyssal.engine.disk_cache import DiskCache
from abyssal.engine.speculation import Speculate
from abyssal.lm import LM, load
from abyssal.machine import leave_busy_cores
from abyssal.progress import bytes_bar
from abyssal.tokens.bpe import END_THINK, THINK
from abyssal.tokens.chat import ThinkingMode, opens_thinking, render
from abyssal.types import Conversation, Message, RequestError, SamplingParams, ThinkingLimits

FEW_DRAFTS = 64  # so few steps are timed mostly while everything is cold
ROOM = 256  # tokens for an answer, beside those for its thinking where they are limited


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How answers are drawn. `best_of`: so many for each that is given, and the majority decides."""

    params: SamplingParams
    thinking: ThinkingMode = "auto"
    limits: ThinkingLimits | None = None
    best_of: int = 1


def talk(
    directory: Path,
    *,
    params: SamplingParams,
    max_tokens: int | None = None,
    thinking: ThinkingMode,
    prompt: str | None,
    console: Console,
    dtype: str | None = None,
    weights: Weights = "compute",
    raw: bool = False,
    disk_cache: DiskCache | None = None,
    effort: Effort | None = None,
    budget: int | None = None,
    min_thinking: int = 0,
    best_of: int = 1,
    speculate: Speculate | None = None,
    stats: bool = False,
) -> None:
    """Answer `prompt` and return, or read questions until an empty line or the end of input. /new starts over.

    With `raw`, `prompt` is continued as it stands, and control tokens that it spells are control tokens.
    `max_tokens` None: ROOM, and what the thinking may take. `stats`: in the end, what drafts and caches
    did.
    """
    if raw and prompt is None:
        raise ValueError("--raw continues a text, not a conversation; give the text with --prompt")
    if raw and best_of > 1:
        raise ValueError(f"--raw continues a text; --best-of {best_of} chooses among answers: leave one of them out")
    if best_of < 1:
        raise ValueError(f"--best-of {best_of} leaves nothing to choose from; give 1 or more")
    leave_busy_cores()
    with bytes_bar(f"loading {directory}", console) as on_bytes:
        lm = load(
            directory, dtype=dtype, weights=weights, disk_cache=disk_cache, speculate=speculate, on_bytes=on_bytes
        )
    if params.structure is not None:
        lm.grammars.control(params.structure)  # what makes no sense is said before a question is asked
    limits = lm.limits(effort=effort, budget=budget, min_thinking=min_thinking)
    params = replace(params, max_tokens=answer_room(max_tokens, limits))
    if effort is not None:
        known = lm.effort(effort)
        tell(f"effort {effort}: {known.budget:,} tokens of thinking; {known.why}")
    manner = Manner(params=params, thinking=thinking, limits=limits, best_of=best_of)
    try:
        converse(lm, manner, directory=directory, prompt=prompt, raw=raw, console=console)
    finally:
        if stats:
            for line in (drafting(lm), caching(lm)):
                console.print(f"[dim]{escape(line)}[/dim]", highlight=False)


def drafting(lm: LM) -> str:
    """One line about what drafts brought so far."""
    stats = lm.engine.draft_stats
    if stats is None or not stats.n_drafted:
        return "no drafts were made"
    right = ", ".join(f"{share:.0%}" for share in stats.acceptance)
    gain = f"{stats.speed_up:.2f} times the speed without" if stats.speed_up is not None else "not measured yet"
    if stats.n_drafted < FEW_DRAFTS:
        gain = "too few to say what they brought"
    return (
        f"drafts by {stats.drafter}: {stats.n_accepted} of {stats.n_drafted} were right (by place: {right}); "
        f"{stats.tokens_per_step:.2f} tokens a step, {gain}; now {stats.k} a step"
    )


def caching(lm: LM) -> str:
    """One line about what did not have to be computed."""
    stats, disk = lm.engine.prefix_stats, lm.engine.disk_stats
    line = f"{stats.n_found} of {stats.n_tokens} tokens of prompts were found in the cache"
    if disk is None:
        return line
    return f"{line}, {stats.n_found_on_disk} of them on disk" + (f"; {disk.fault}" if disk.fault else "")


def converse(lm: LM, manner: Manner, *, directory: Path, prompt: str | None, raw: bool, console: Console) -> None:
    """Answer the prompt, or whatever is asked."""
    if raw and prompt is not None:
        ids = lm.prompt_ids(prompt, raw=True)
        spoken(lm, ids, manner, in_thought=opens_thinking(ids, lm.tokenizer), console=console)
        return
    if prompt is not None:
        answer(lm, [Message(role="user", content=prompt)], manner, console=console)
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
        own = replace(manner, params=replace(manner.params, seed=manner.params.seed + turn))
        try:  # a question too long for the context ends this turn, not the conversation
            said = answer(lm, asked, own, console=console)
        except (ValueError, RequestError) as error:
            console.print(f"[red]{escape(str(error))}[/red]")
            continue
        conversation = [*asked, said]


def answer_room(max_tokens: int | None, limits: ThinkingLimits | None) -> int:
    """Tokens for thinking and answer together. What would leave no room for the answer is refused."""
    thinking = 0 if limits is None else max(limits.at_least, limits.budget or 0)
    if max_tokens is None:
        return ROOM + thinking
    if thinking + 2 >= max_tokens > 0 and thinking:  # the two marks
        raise ValueError(
            f"{thinking} tokens of thinking leave no room for an answer in --max-tokens {max_tokens}; give at least "
            f"{thinking + 3} or leave it out"
        )
    return max_tokens


def answer(lm: LM, conversation: Conversation, manner: Manner, *, console: Console) -> Message:
    """Draw one answer and print it token by token; or draw several and print the one that is kept."""
    if manner.best_of > 1:
        return chosen(lm, conversation, manner, console=console)
    prompt = render(conversation, lm.tokenizer, add_generation_prompt=True, thinking=manner.thinking).ids
    ids, stop = spoken(lm, prompt, manner, in_thought=opens_thinking(prompt, lm.tokenizer), console=console)
    return lm.message(ids, prompt, stop=stop)


def chosen(lm: LM, conversation: Conversation, manner: Manner, *, console: Console) -> Message:
    best = lm.best(conversation, manner.best_of, params=manner.params, thinking=manner.thinking, limits=manner.limits)
    if best.message.thinking:
        console.print(best.message.thinking, style="dim", markup=False, highlight=False)
    console.print(best.message.content, style="bold", markup=False, highlight=False)
    n_same = best.worth[best.chosen]
    said = "none came to its end" if n_same is None else f"{n_same:.0f} of {manner.best_of} answers say so"
    tell(f"{said}; {best.n_tokens:,} tokens")
    return best.message


def tell(line: str) -> None:
    """About the answer, not of it: stdout is for answers."""
    print(line, file=sys.stderr)


class Hurry:
    """Inside the block the first Ctrl-C during thinking is a wish, `wanted`, and not the end of the program."""

    def __init__(self, *, in_thought: bool) -> None:
        self.in_thought, self.wanted = in_thought, False
        self._is_main = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handler

    def __enter__(self) -> Hurry:
        if self._is_main:
            self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_main:
            signal.signal(signal.SIGINT, self._before)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self.wanted or not self.in_thought:
            raise KeyboardInterrupt
        self.wanted = True


def spoken(
    lm: LM, prompt: list[int], manner: Manner, *, in_thought: bool, console: Console
) -> tuple[list[int], str | None]:
    """The ids drawn after a prompt, printed as they come, and the stop string that ended them."""
    ids: list[int] = []
    requests: list[int] = []
    text = lm.text(prompt, manner.params)
    with Hurry(in_thought=in_thought) as hurry:

        def show(piece: str) -> None:
            if piece:
                style = "dim" if hurry.in_thought else "bold"
                console.print(piece, style=style, end="", markup=False, highlight=False)

        for token in lm.stream(prompt, manner.params, limits=manner.limits, on_start=requests.append):
            ids.append(token)
            show(text.feed(token))
            if token == lm.tokenizer.find(END_THINK) and hurry.in_thought:
                hurry.in_thought = False
                console.print()
            elif token == lm.tokenizer.find(THINK) and len(ids) == 1:
                hurry.in_thought = True
            elif hurry.wanted and token not in lm.tokenizer.control_ids:
                lm.engine.answer_now(requests[0])
        show(text.end())
    console.print()
    is_whole = text.stop is not None or not lm.tokenizer.end_ids.isdisjoint(ids[-1:])
    if manner.params.structure is not None and not is_whole:
        said = f"cut at {manner.params.max_tokens} tokens: a whole answer begins so; give more with --max-tokens"
        console.print(f"[dim]{said}[/dim]", highlight=False)
    return ids, text.stop
