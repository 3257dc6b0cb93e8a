"""The chat template, the only one: a conversation to ids and back.

    <bos>system<｜User｜>question<｜Assistant｜><think>thinking</think>answer<eos><｜User｜>...

A foreign vocabulary with ChatML's marks keeps its own: <|im_start|>user, a line break, question<|im_end|>, and so on.

Owns where control tokens stand. They are inserted here as ids; text is encoded piece by piece and cannot spell one. The
Jinja form for other libraries has to work on one string, so there typed control strings do become control tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from abyssal.tokens.bpe import ASSISTANT, CHATML_END, CHATML_START, END_THINK, THINK, USER
from abyssal.types import Conversation, Message

if TYPE_CHECKING:
    from abyssal.tokens.tokenizer import Tokenizer

KeepThinking = Literal["last", "none", "all"]
ThinkingMode = Literal["auto", "on", "off"]


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
) -> Rendered:
    """A conversation as ids.

    `keep_thinking="last"` keeps the thinking of an assistant turn only while nothing follows it. `thinking` shapes the
    generation prompt: "auto" leaves it to the model, "on" opens <think> for it, "off" closes it at once.
    """
    if keep_thinking not in get_args(KeepThinking):
        raise ValueError(f"keep_thinking={keep_thinking!r}; use one of {get_args(KeepThinking)}")
    if thinking not in get_args(ThinkingMode):
        raise ValueError(f"thinking={thinking!r}; use one of {get_args(ThinkingMode)}")
    if not conversation:
        raise ValueError("the conversation is empty; give it at least one message")
    system = "\n\n".join(message.content for message in conversation if message.role == "system")
    turns = [message for message in conversation if message.role != "system"]

    ids = opening(system, tokenizer)
    mask = [0] * len(ids)
    for i, turn in enumerate(turns):
        is_last = i == len(turns) - 1 and not add_generation_prompt
        keep = keep_thinking == "all" or (keep_thinking == "last" and is_last)
        if turn.role == "user":
            piece = asked(turn.content, tokenizer)
            ids += piece
            mask += [0] * len(piece)
        elif turn.role == "assistant":
            piece = answer_ids(turn if keep else Message(role="assistant", content=turn.content), tokenizer)
            mark, gap = assistant_mark(tokenizer), [] if is_last else after_answer(tokenizer)
            ids += [*mark, *piece, *gap]
            mask += [0] * len(mark) + [1] * len(piece) + [0] * len(gap)
        else:
            raise ValueError(f"a message has the role {turn.role!r}; the template knows system, user and assistant")
    if add_generation_prompt:
        prompt = assistant_mark(tokenizer)
        if thinking != "auto":
            prompt.append(tokenizer.think_id if thinking == "on" else tokenizer.end_think_id)
        ids += prompt
        mask += [0] * len(prompt)
    return Rendered(ids, mask)


def opening(system: str, tokenizer: Tokenizer) -> list[int]:
    """What stands before the first turn."""
    if tokenizer.is_chatml:
        return chatml_turn("system", system, tokenizer) if system else []
    return [tokenizer.bos_id, *tokenizer.encode(system)]


def asked(question: str, tokenizer: Tokenizer) -> list[int]:
    """A user's turn."""
    if tokenizer.is_chatml:
        return chatml_turn("user", question, tokenizer)
    return [tokenizer.user_id, *tokenizer.encode(question)]


def assistant_mark(tokenizer: Tokenizer) -> list[int]:
    """What the assistant's turn opens with, before it says anything."""
    if tokenizer.is_chatml:
        return [tokenizer.token_id(CHATML_START), *tokenizer.encode("assistant\n")]
    return [tokenizer.assistant_id]


def after_answer(tokenizer: Tokenizer) -> list[int]:
    """What stands between an answer's end token and the next turn."""
    return tokenizer.encode("\n") if tokenizer.is_chatml else []


def chatml_turn(role: str, content: str, tokenizer: Tokenizer) -> list[int]:
    body = tokenizer.encode(f"{role}\n{content}")
    return [tokenizer.token_id(CHATML_START), *body, tokenizer.token_id(CHATML_END), *tokenizer.encode("\n")]


def answer_ids(answer: Message, tokenizer: Tokenizer) -> list[int]:
    """What the assistant itself writes: thinking between its marks, content, end token. `parse` undoes it."""
    ids = []
    if answer.thinking is not None:
        ids += [tokenizer.think_id, *tokenizer.encode(answer.thinking), tokenizer.end_think_id]
    return [*ids, *tokenizer.encode(answer.content), tokenizer.eos_id]


def parse(ids: list[int], tokenizer: Tokenizer, *, thinking_open: bool = False) -> Message:
    """The ids of an answer as a message.

    Thinking counts only where an answer opens with it; a control token anywhere else stays in the text, spelled out, so
    that a reward can see it. Thinking that was never closed is all thinking, with content "". `thinking_open` says that
    the prompt ended in <think>.
    """
    if tokenizer.eos_id in ids:
        ids = ids[: ids.index(tokenizer.eos_id)]
    if not thinking_open:
        if not ids or ids[0] != tokenizer.find(THINK):
            return Message(role="assistant", content=tokenizer.decode(ids))
        ids = ids[1:]
    end = ids.index(tokenizer.end_think_id) if tokenizer.end_think_id in ids else len(ids)
    return Message(role="assistant", thinking=tokenizer.decode(ids[:end]), content=tokenizer.decode(ids[end + 1 :]))


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


def chat_template(*, chatml: bool = False) -> str:
    """`render` as Jinja, for the libraries that load the directory: the same ids for text without control strings.

    Takes `thinking` ("auto", "on", "off", or a boolean) and `keep_thinking`. An earlier answer loses what stands
    before </think> in it, since clients send back what they were shown.
    """
    system = "messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\\n\\n')"
    if chatml:
        open_system, close_system = f"'{CHATML_START}system\\n' + ", f" + '{CHATML_END}\\n'"
        begin = f"{{%- set said = {system} -%}}{{%- if said -%}}"
        begin += f"{{{{- {open_system}said{close_system} -}}}}{{%- endif -%}}"
        user, user_end, assistant = f"{CHATML_START}user\\n", f" + '{CHATML_END}\\n'", f"{CHATML_START}assistant\\n"
        after = "{%- if not loop.last or add_generation_prompt -%}{{- '\\n' -}}{%- endif -%}"
    else:
        begin, user, user_end, assistant, after = f"{{{{- bos_token + ({system}) -}}}}", USER, "", ASSISTANT, ""
    return "".join(
        (
            "{%- set keep = keep_thinking | default('last') -%}",
            "{%- set mode = thinking | default('auto') -%}",
            begin,
            "{%- for m in messages if m['role'] != 'system' -%}",
            "{%- if m['role'] == 'user' -%}",
            "{{- '" + user + "' + m['content']" + user_end + " -}}",
            "{%- elif m['role'] == 'assistant' -%}",
            "{{- '" + assistant + "' -}}",
            "{%- if keep == 'all' or (keep == 'last' and loop.last and not add_generation_prompt) -%}",
            "{%- set thought = m['thinking'] if m['thinking'] is string else m['reasoning_content'] -%}",
            "{%- if thought is string -%}{{- '" + THINK + "' + thought + '" + END_THINK + "' -}}{%- endif -%}",
            "{{- m['content'] + eos_token -}}",
            "{%- else -%}",
            "{{- m['content'].split('" + END_THINK + "')[-1] + eos_token -}}",
            "{%- endif -%}",
            after,
            "{%- else -%}",
            "{{- raise_exception('the template knows the roles system, user and assistant, not ' + m['role']) -}}",
            "{%- endif -%}",
            "{%- endfor -%}",
            "{%- if add_generation_prompt -%}",
            "{{- '" + assistant + "' -}}",
            "{%- if mode == 'on' or mode is sameas true -%}{{- '" + THINK + "' -}}",
            "{%- elif mode == 'off' or mode is sameas false -%}{{- '" + END_THINK + "' -}}{%- endif -%}",
            "{%- endif -%}",
        )
    )
