"""Each dialect against text written out by hand, and against its template through transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import chat_templates
import pytest
import tokenizers
from deepseek_files import v3_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.tokens.bpe import CONTROL_TOKENS, END_THINK, THINK, TOOL_TOKENS, train_bpe
from abyssal.tokens.chat import opens_thinking, parse, render
from abyssal.tokens.dialects import V31, ChatMl, Own, Published
from abyssal.tokens.pieces import Dialect
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Conversation, Message, ToolCall

TEXTS = ["what is two by three? so six, then.\n\n{}"] * 9
CHATML = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
B, E, U, A = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
CALLS, CALLS_END, CALL, CALL_END, OUTS, OUTS_END, OUT, OUT_END, SEP = TOOL_TOKENS
ADD = ToolCall(name="add", arguments='{"a": 2}')
MUL = ToolCall(name="mul", arguments='{"b": [1, "x"]}')
FENCED_ADD = f'{CALL}function{SEP}add\n```json\n{{"a": 2}}\n```{CALL_END}'
FENCED_MUL = f'{CALL}function{SEP}mul\n```json\n{{"b": [1, "x"]}}\n```{CALL_END}'


def system(content: str) -> Message:
    return Message(role="system", content=content)


def user(content: str) -> Message:
    return Message(role="user", content=content)


def assistant(content: str, thinking: str | None = None, calls: tuple[ToolCall, ...] = ()) -> Message:
    return Message(role="assistant", content=content, thinking=thinking, tool_calls=calls)


def tool(content: str) -> Message:
    return Message(role="tool", content=content)


def speaking(template: str | None, *names: str, without: tuple[str, ...] = (), **config: Any) -> Tokenizer:
    """A small byte-level vocabulary with DeepSeek's marks but those `without`, more names, and a chat template."""
    backend = train_bpe(TEXTS, vocab_size=300)
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in without]
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    backend.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in names])
    return Tokenizer(backend, config={"chat_template": template, **config} if template else config)


THOUGHTLESS = (THINK, END_THINK)
DEEPSEEK = (U, A, *TOOL_TOKENS, THINK, END_THINK)


@pytest.fixture(scope="module")
def spoken() -> dict[str, Tokenizer]:
    """By dialect: recognised by what a template of the same effect does, where there is a template."""
    return {
        "own": speaking(None),
        "own chatml": speaking(None, *CHATML.values(), without=(U, A), eos_token="<|im_end|>"),
        "v3": speaking(None, without=THOUGHTLESS),
        "r1": speaking(chat_templates.R1_OPENED),
        "r1 unopened": speaking(chat_templates.R1_CLOSED),
        "v3.1": speaking(chat_templates.V31),
        "chatml": speaking(chat_templates.SMOLLM2, *CHATML.values(), without=DEEPSEEK, **CHATML),
    }


def test_a_dialect_is_known_by_what_its_template_writes(spoken: dict[str, Tokenizer]):
    want: dict[str, Dialect] = {
        "own": Own(), "own chatml": ChatMl(own=True), "v3": Published(version="v3"),
        "r1": Published(version="r1", opens=True), "r1 unopened": Published(version="r1"), "v3.1": V31(),
        "chatml": ChatMl(default_system="You are a small helper."),
    }  # fmt: skip
    assert {name: tokenizer.dialect for name, tokenizer in spoken.items()} == want


def test_one_other_blank_makes_it_another_template():
    other = chat_templates.R1_OPENED.replace("'<｜User｜>' + m.content", "'<｜User｜>' + m.content + ' '")
    assert speaking(other).dialect.name == "jinja"
    missing = speaking(chat_templates.V31, without=(OUT,))  # a mark the vocabulary lacks is text there
    assert missing.dialect.name == "jinja"


# (dialect, conversation, options, text): DeepSeek's from what is published about them, by hand

LINE = [user("2*3?"), assistant("6"), user("why?")]
CALLED = [user("2+?"), assistant("", calls=(ADD,)), tool("4")]
TWICE = [user("go"), assistant("", calls=(ADD, MUL)), tool("4"), tool("5"), assistant("9")]
CASES: list[tuple[str, Conversation, dict[str, Any], str]] = [
    ("v3", [system("Be brief."), *LINE, system("Be kind.")], {}, f"{B}Be brief.\n\nBe kind.{U}2*3?{A}6{E}{U}why?"),
    ("v3", LINE, {"add_generation_prompt": True}, f"{B}{U}2*3?{A}6{E}{U}why?{A}"),
    ("v3", LINE[:1], {"add_generation_prompt": True, "thinking": "off"}, f"{B}{U}2*3?{A}"),
    ("v3", CALLED, {}, f"{B}{U}2+?{A}{CALLS}{FENCED_ADD}{OUTS}{OUT}4{OUT_END}{OUTS_END}"),
    (
        "v3", TWICE, {},
        f"{B}{U}go{A}{CALLS}{FENCED_ADD}\n{FENCED_MUL}{CALLS_END}{E}"
        f"{OUTS}{OUT}4{OUT_END}\n{OUT}5{OUT_END}{OUTS_END}9{E}",
    ),
    ("r1", LINE, {"add_generation_prompt": True}, f"{B}{U}2*3?{A}6{E}{U}why?{A}{THINK}\n"),
    ("r1 unopened", LINE, {"add_generation_prompt": True}, f"{B}{U}2*3?{A}6{E}{U}why?{A}"),
    ("r1 unopened", LINE[:1], {"add_generation_prompt": True, "thinking": "on"}, f"{B}{U}2*3?{A}{THINK}\n"),
    (
        "r1", LINE[:1], {"add_generation_prompt": True, "thinking": "off"},
        f"{B}{U}2*3?{A}{THINK}\n\n{END_THINK}\n\n",
    ),
    (
        "r1", [user("a"), assistant("b", "t1"), user("c"), assistant("d", "t2\n")], {},
        f"{B}{U}a{A}b{E}{U}c{A}{THINK}\nt2\n{END_THINK}d{E}",
    ),
    ("r1", CALLED, {}, f"{B}{U}2+?{A}{CALLS}{FENCED_ADD}{CALLS_END}{E}{OUTS}{OUT}4{OUT_END}{OUTS_END}"),
    (
        "r1", TWICE, {},
        f"{B}{U}go{A}{CALLS}{FENCED_ADD}\n{FENCED_MUL}{CALLS_END}{E}"
        f"{OUTS}{OUT}4{OUT_END}{OUT}5{OUT_END}{OUTS_END}9{E}",
    ),
    (
        "r1", [user("go"), assistant("Wait.", calls=(ADD,))], {},
        f"{B}{U}go{A}Wait.{CALLS}{FENCED_ADD}{CALLS_END}{E}",
    ),
    ("v3.1", LINE, {"add_generation_prompt": True}, f"{B}{U}2*3?{A}{END_THINK}6{E}{U}why?{A}{END_THINK}"),
    ("v3.1", LINE[:1], {"add_generation_prompt": True, "thinking": "on"}, f"{B}{U}2*3?{A}{THINK}"),
    ("v3.1", LINE[:1], {"add_generation_prompt": True, "thinking": "off"}, f"{B}{U}2*3?{A}{END_THINK}"),
    (
        "v3.1", [user("a"), assistant("b", "t1"), user("c"), assistant("d", "t2")], {},
        f"{B}{U}a{A}{END_THINK}b{E}{U}c{A}{THINK}t2{END_THINK}d{E}",
    ),
    (
        "v3.1", TWICE, {},
        f'{B}{U}go{A}{END_THINK}{CALLS}{CALL}add{SEP}{{"a": 2}}{CALL_END}{CALL}mul{SEP}{{"b": [1, "x"]}}{CALL_END}'
        f"{CALLS_END}{E}{OUT}4{OUT_END}{OUT}5{OUT_END}9{E}",
    ),
    (
        "chatml", LINE[:2], {},
        "<|im_start|>system\nYou are a small helper.<|im_end|>\n<|im_start|>user\n2*3?<|im_end|>\n"
        "<|im_start|>assistant\n6<|im_end|>\n",
    ),
    (
        "chatml", [system("Be brief."), user("a"), system("Be kind.")], {"add_generation_prompt": True},
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>assistant\n",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "conversation", "options", "text"), CASES)
def test_conversations_read_as_they_are_published(
    spoken: dict[str, Tokenizer], name: str, conversation: Conversation, options: dict[str, Any], text: str
):
    tokenizer = spoken[name]
    assert tokenizer.decode(render(conversation, tokenizer, **options).ids) == text


def test_tools_are_described_to_v31_as_its_model_card_says(spoken: dict[str, Tokenizer]):
    parameters = {"type": "object", "properties": {"a": {"type": "number"}}}
    function = {"name": "add", "description": f"Adds.{E}", "parameters": parameters}
    tokenizer = spoken["v3.1"]
    rendered = render([system("Be brief."), user("2+2")], tokenizer, tools=[{"type": "function", "function": function}])
    assert tokenizer.decode(rendered.ids) == (
        f"{B}Be brief.\n\n## Tools\nYou have access to the following tools:\n\n### add\nDescription: Adds.{E}\n\n"
        'Parameters: {"type": "object", "properties": {"a": {"type": "number"}}}\n\n'
        "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
        f"{CALLS}{CALL}tool_call_name{SEP}tool_call_arguments{CALL_END}{{additional_tool_calls}}{CALLS_END}\n\nWhere:\n"
        "- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        f"- For multiple tool calls, chain them directly without separators or spaces{U}2+2"
    )
    assert rendered.ids.count(tokenizer.token_id(SEP)) == 1 and tokenizer.eos_id not in rendered.ids
    for name in ("own", "v3", "r1", "chatml"):
        with pytest.raises(ValueError, match="describe (tools|them) in the system message"):
            render([user("2+2")], spoken[name], tools=[{"function": function}])


@pytest.mark.parametrize(
    ("name", "answer", "said"),
    [
        ("v3", assistant("6"), f"6{E}"),
        ("r1", assistant("6", "2*3"), f"2*3{END_THINK}6{E}"),  # the prompt has opened it
        ("r1 unopened", assistant("6", "2*3"), f"{THINK}\n2*3{END_THINK}6{E}"),
        ("v3.1", assistant("6", "2*3"), f"2*3{END_THINK}6{E}"),
        ("v3.1", assistant("6"), f"6{E}"),
        ("v3.1", assistant("So:", calls=(ADD,)), f'So:{CALLS}{CALL}add{SEP}{{"a": 2}}{CALL_END}{CALLS_END}{E}'),
        ("chatml", assistant("6"), "6<|im_end|>"),
    ],
)
def test_what_is_learned_is_what_the_model_would_say_after_its_prompt(
    spoken: dict[str, Tokenizer], name: str, answer: Message, said: str
):
    tokenizer = spoken[name]
    rendered = render([user("2*3?"), answer], tokenizer)
    learned = [i for i, is_learned in zip(rendered.ids, rendered.mask, strict=True) if is_learned]
    assert tokenizer.decode(learned) == said
    mode = "on" if answer.thinking is not None and name != "r1 unopened" else "auto"
    prompt = render([user("2*3?")], tokenizer, add_generation_prompt=True, thinking=mode).ids
    assert rendered.ids[: len(prompt) + len(learned)] == prompt + learned
    assert parse(learned, tokenizer, thinking_open=opens_thinking(prompt, tokenizer)) == answer


# tool calls there and back

arguments = st.dictionaries(st.text(max_size=6), st.one_of(st.integers(), st.text(max_size=9), st.lists(st.none())))
calls = st.builds(
    lambda name, values: ToolCall(name=name, arguments=json.dumps(values, ensure_ascii=False)),
    st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1, max_size=9).filter(str.strip)
    | st.sampled_from(CONTROL_TOKENS),
    arguments,
)


@settings(max_examples=20)
@given(made=st.lists(calls, min_size=2, max_size=3), content=st.sampled_from(["", f"a{CALLS}", "b"]))
@pytest.mark.parametrize("name", ["v3", "r1", "v3.1"])
def test_tool_calls_come_back_whatever_they_say(
    spoken: dict[str, Tokenizer], name: str, made: list[ToolCall], content: str
):
    tokenizer = spoken[name]
    answer = assistant("" if name == "v3" else content, calls=tuple(made[:2] if name == "v3" else made))
    rendered = render([user("go"), answer], tokenizer)
    learned = [i for i, is_learned in zip(rendered.ids, rendered.mask, strict=True) if is_learned]
    assert parse(learned, tokenizer) == answer


@pytest.mark.parametrize(
    "spoiled",
    [
        f"{CALLS}", f"{CALLS}{CALLS_END}", f"{CALLS}{CALL}add", f"{CALLS}{CALL}add{CALL_END}{CALLS_END}",
        f"{CALLS}{CALL}add{SEP}{{\"a\": 2{CALL_END}{CALLS_END}", f"{CALLS}{CALL}add{SEP}[1]{CALL_END}{CALLS_END}",
        f"{CALLS}{CALL}{SEP}{{}}{CALL_END}{CALLS_END}", f"{CALLS}{CALL}a{SEP}{{}}{CALL_END}{CALLS_END}and more",
        f"{CALL}add{SEP}{{}}{CALL_END}", f"{CALLS}{CALL}add{SEP}{'[' * 5000}{CALL_END}", f"{SEP}{CALLS_END}x{THINK}",
        f"{CALLS}{CALL}a{SEP}{{}}{CALL_END}{CALL}b{SEP}{{{CALL_END}{CALLS_END}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["r1", "v3.1"])
def test_spoiled_calls_stay_in_the_text(spoken: dict[str, Tokenizer], name: str, spoiled: str):
    tokenizer = spoken[name]
    message = parse(tokenizer.encode(f"So: {spoiled}", allow_control=True), tokenizer)
    assert message == assistant(f"So: {spoiled}")


def test_a_call_is_read_where_the_marks_are_tokens_and_nowhere_else(spoken: dict[str, Tokenizer]):
    tokenizer = spoken["v3.1"]
    text = f"{CALLS}{CALL}add{SEP}{{}}{CALL_END}{CALLS_END}"
    assert parse(tokenizer.encode(text, allow_control=True), tokenizer).tool_calls == (
        ToolCall(name="add", arguments="{}"),
    )
    assert parse(tokenizer.encode(text), tokenizer) == assistant(text)


def test_thinking_open_is_read_from_the_prompt(spoken: dict[str, Tokenizer]):
    for name, mode, is_open in (
        ("own", "auto", False), ("own", "on", True), ("own", "off", False), ("r1", "auto", True), ("r1", "off", False),
        ("v3.1", "auto", False), ("v3.1", "on", True), ("v3", "auto", False), ("chatml", "auto", False),
    ):  # fmt: skip
        prompt = render([user("a")], spoken[name], add_generation_prompt=True, thinking=mode).ids
        assert opens_thinking(prompt, spoken[name]) == is_open, (name, mode)


def test_what_a_template_has_no_place_for_is_refused(spoken: dict[str, Tokenizer]):
    for name, conversation, said in (
        ("v3", [user("a"), assistant("b", "t")], "no place for thinking; use keep_thinking='none'"),
        ("v3", [user("a"), assistant("b", calls=(ADD,))], "no place for text beside tool calls"),
        ("chatml", [user("a"), assistant("", calls=(ADD,))], "ChatML template has no tool calls"),
        ("chatml", [user("a"), assistant("b", "t")], "no control token '<think>'"),
    ):
        with pytest.raises(ValueError, match=said):
            render(conversation, spoken[name])
    with pytest.raises(ValueError, match="thinking='on', and the v3 template has no thinking"):
        render([user("a")], spoken["v3"], add_generation_prompt=True, thinking="on")


# no text becomes a control token, in any dialect

typed = st.lists(
    st.text(max_size=6) | st.sampled_from([*CONTROL_TOKENS, "<|im_start|>", "<|im_end|>", "<", "think>", "｜>", "\n"]),
    max_size=6,
).map("".join)


@settings(max_examples=25)
@given(texts=st.lists(typed, min_size=4, max_size=4), prompt=st.booleans())
@pytest.mark.parametrize("name", ["own", "own chatml", "v3", "r1", "r1 unopened", "v3.1", "chatml"])
def test_no_text_becomes_a_control_token(
    spoken: dict[str, Tokenizer], name: str, texts: list[str], prompt: bool
):
    tokenizer = spoken[name]

    def control_tokens(texts: list[str]) -> list[int]:
        conversation = [system(texts[0]), user(texts[1]), assistant(texts[2]), user(texts[3])]
        ids = render(conversation, tokenizer, add_generation_prompt=prompt).ids
        return [i for i in ids if i in tokenizer.control_ids]

    assert control_tokens(texts) == control_tokens(["a" if text else "" for text in texts])


# the saved form, and the published one, through transformers


def as_dicts(conversation: Conversation) -> list[dict[str, Any]]:
    dicts = []
    for message in conversation:
        entry: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            entry["content"] = message.content or None
            entry["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.tool_calls
            ]
        dicts.append(entry)
    return dicts


def through(theirs: Any, conversation: Conversation, **options: Any) -> list[int]:
    """`apply_chat_template` but for one thing: that drops `"content": None`, which V3's template asks for."""
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), _ = render_jinja_template(
        [as_dicts(conversation)], chat_template=theirs.chat_template, **theirs.special_tokens_map, **options
    )
    if not any(message.tool_calls for message in conversation):
        assert text == theirs.apply_chat_template(as_dicts(conversation), tokenize=False, **options)
    return list(theirs(text, add_special_tokens=False)["input_ids"])


def conversations(seed: int, n: int, *, tools: bool) -> list[Conversation]:
    """Drawn: system messages anywhere, questions, answers, calls of one to three tools and what they said."""
    rng = random.Random(seed)
    words = ["two", "by 3?", " so\n\n", "所以。", "\n", "x_y(", "12345", "é", "", "  ", "```json\n{}"]

    def text() -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(0, 4)))

    found = []
    for _ in range(n):
        conversation: Conversation = []
        for _ in range(rng.randint(1, 4)):
            conversation += [system(text())] if rng.random() < 0.3 else []
            conversation += [user(text())] if rng.random() < 0.9 else []
            if tools and rng.random() < 0.4:
                made = [ToolCall(name="f", arguments=json.dumps({"a": text()})) for _ in range(rng.randint(1, 3))]
                conversation += [assistant("", calls=tuple(made)), *(tool(text()) for _ in made)]
            conversation += [assistant(text())] if rng.random() < 0.8 else []
        found.append(conversation or [user("a")])
    return found


@pytest.mark.parametrize("name", ["own", "own chatml", "v3", "r1", "r1 unopened", "v3.1", "chatml"])
def test_the_saved_template_says_the_same(spoken: dict[str, Tokenizer], name: str, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    tokenizer = spoken[name]
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert Tokenizer.load(tmp_path).dialect == tokenizer.dialect
    for conversation in conversations(1, 25, tools=name in ("v3", "r1", "r1 unopened", "v3.1")):
        for prompt in (False, True):
            ours = render(conversation, tokenizer, add_generation_prompt=prompt).ids
            assert through(theirs, conversation, add_generation_prompt=prompt) == ours, conversation
    if tokenizer.dialect.switches and name != "own chatml":
        for mode in ("on", "off"):
            ours = render([user("a")], tokenizer, add_generation_prompt=True, thinking=mode).ids
            assert through(theirs, [user("a")], add_generation_prompt=True, thinking=mode == "on") == ours


def test_the_published_v3_template_says_the_same():
    """The file of December 2024 with its vocabulary."""
    transformers = pytest.importorskip("transformers")
    tokenizer = v3_tokenizer()
    assert tokenizer.dialect == Published(version="v3")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, bos_token=B, eos_token=E, chat_template=tokenizer.template
    )
    for conversation in conversations(2, 80, tools=True):
        for prompt in (False, True):
            ours = render(conversation, tokenizer, add_generation_prompt=prompt).ids
            assert through(theirs, conversation, add_generation_prompt=prompt) == ours, conversation
    answer = assistant("", calls=(ADD, MUL))
    rendered = render([user("go"), answer], tokenizer)
    learned = [i for i, is_learned in zip(rendered.ids, rendered.mask, strict=True) if is_learned]
    assert parse(learned, tokenizer) == answer
