"""Strict tool calls: whatever the model wants, what calls a tool is a call of it, in the form that its model speaks."""

from __future__ import annotations

import json
from typing import Any

import chat_templates
import numpy as np
import pytest
from jsonschema import validate
from small_models import small_model
from test_dialects import THOUGHTLESS, speaking

from abyssal import LM, Message, SamplingParams, Structure
from abyssal.engine.grammar import Grammars
from abyssal.tokens.chat import parse, render
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.tokens.tool_structure import tool_structure
from abyssal.types import ToolCall

ADD: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "to": {"enum": ["x", "</tool_call>"]}},
    "required": ["a", "to"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": ADD}},
    {"name": "now", "parameters": {"properties": {}, "additionalProperties": False}},
]
SCHEMAS = {"add": ADD, "now": {"type": "object", "maxProperties": 0}}
TOKENIZERS = {
    "v3": speaking(None, without=THOUGHTLESS),
    "r1": speaking(chat_templates.R1_OPENED),
    "v3.1": speaking(chat_templates.V31),
    "tagged": speaking(chat_templates.QWEN, "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>",
                       eos_token="<|im_end|>"),
}  # fmt: skip

GRAMMARS = {tokenizer: Grammars(tokenizer) for tokenizer in TOKENIZERS.values()}


def drawn(tokenizer: Tokenizer, structure: Structure, seed: int) -> list[int] | None:
    """What a model draws that wants to call, to end and to speak in marks; None where it found no end."""
    control = GRAMMARS[tokenizer].control(structure)
    rng = np.random.default_rng(seed)
    logits_V = rng.normal(size=tokenizer.vocab_size) * 3
    logits_V[list(tokenizer.control_ids)] += 5
    ids: list[int] = []
    while len(ids) < 150:
        allowed_V = np.ones(tokenizer.vocab_size, dtype=bool)
        if not (forced := control.forced()):
            control.mask(allowed_V)
            logits = np.where(allowed_V, logits_V / 2 + rng.gumbel(size=tokenizer.vocab_size), -np.inf)
            forced = [int(logits.argmax())]
        ids.append(forced[0])
        control.drawn(forced[0])
        if forced[0] in tokenizer.end_ids:
            return ids
    return None


@pytest.mark.parametrize("name", TOKENIZERS)
def test_calls_are_read_back_and_fit(name: str):
    tokenizer = TOKENIZERS[name]
    structure = tool_structure(TOOLS, tokenizer, choice="required")
    answers = [ids for seed in range(20) if (ids := drawn(tokenizer, structure, seed)) is not None]
    messages = [parse(ids, tokenizer) for ids in answers]
    assert len(messages) >= 5
    for message in messages:
        assert message.tool_calls and not message.content
        for call in message.tool_calls:
            validate(json.loads(call.arguments), SCHEMAS[call.name])
    assert {call.name for message in messages for call in message.tool_calls} == {"add", "now"}
    if name in ("r1", "v3.1"):  # in the others the end may come behind each call, and this model wants it
        assert max(len(message.tool_calls) for message in messages) > 1


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_the_model_would_write_by_itself_is_allowed(name: str):
    """One call and two, behind a text and alone, as its own template writes them."""
    tokenizer = TOKENIZERS[name]
    structure = tool_structure(TOOLS, tokenizer)
    two = (ToolCall(name="add", arguments='{"a": 3, "to": "x"}'), ToolCall(name="now", arguments="{}"))
    for content, calls in (("", two[:1]), ("", two), ("" if name == "v3" else "Let me see.", two), ("No.", ())):
        asked = Message(role="user", content="?")
        said = Message(role="assistant", content=content, tool_calls=calls)
        rendered = render([asked, said], tokenizer, keep_thinking="none")
        ids = [token for token, learned in zip(*rendered, strict=True) if learned]
        following = GRAMMARS[tokenizer].control(structure)
        for token in ids:
            allowed_V = np.ones(tokenizer.vocab_size, dtype=bool)
            following.mask(allowed_V)
            assert allowed_V[token], (name, tokenizer.decode(ids), tokenizer.decode([token]))
            following.drawn(token)
            if token in tokenizer.end_ids:
                break
        assert following.is_whole


def test_a_choice_of_one_calls_that_one():
    tokenizer = TOKENIZERS["v3.1"]
    structure = tool_structure(TOOLS, tokenizer, choice="now")
    ids = next(ids for seed in range(9) if (ids := drawn(tokenizer, structure, seed)) is not None)
    assert {call.name for call in parse(ids, tokenizer).tool_calls} == {"now"}


def test_left_to_the_model_it_speaks_or_calls():
    tokenizer = TOKENIZERS["v3.1"]
    structure = tool_structure(TOOLS, tokenizer)
    messages = [parse(ids, tokenizer) for s in range(30) if (ids := drawn(tokenizer, structure, s)) is not None]
    assert {bool(message.tool_calls) for message in messages} == {True, False}
    for message in messages:
        for call in message.tool_calls:
            validate(json.loads(call.arguments), SCHEMAS[call.name])
        assert "<｜tool" not in message.content


def test_chat_calls_strictly():
    tokenizer = TOKENIZERS["v3.1"]
    lm = LM(small_model("gqa_dense", vocab_size=tokenizer.vocab_size, max_position_embeddings=1200), tokenizer)
    question = [Message(role="user", content="one plus two?")]
    params = SamplingParams(max_tokens=150, temperature=1.5, logit_bias={tokenizer.eos_id: 5.0})
    said = lm.chat(question, params, tools=TOOLS, strict=True, tool_choice="add")
    assert [call.name for call in said.tool_calls][:1] == ["add"]
    validate(json.loads(said.tool_calls[0].arguments), ADD)
    with pytest.raises(ValueError, match="a structure of their own; leave structure= or strict= out"):
        lm.chat(question, params, tools=TOOLS, strict=True, structure=Structure("json"))


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([], "auto", "0 tools, 0 names; give 1 to 64"),
        ([TOOLS[0], TOOLS[0]], "auto", "2 tools, 1 names"),
        (TOOLS, "sub", r"tool choice 'sub' is none of the tools; use 'auto', 'required' or one of \['add', 'now'\]"),
        ([{"name": "a\nb"}], "auto", r"has the name 'a\\nb'"),
        ([{"name": "a", "parameters": {"type": "array"}}], "auto", "parameters of tool 'a' are no schema of an object"),
    ],
)
def test_tools_that_make_no_sense_are_one_line(tools: list[dict[str, Any]], choice: str, message: str):
    with pytest.raises(ValueError, match=message):
        tool_structure(tools, TOKENIZERS["v3.1"], choice=choice)


def test_tools_share_one_measure_of_work_and_what_has_no_marks_is_refused():
    tokenizer = TOKENIZERS["v3.1"]
    wide = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(100)}}
    many = [{"name": f"f{i}", "parameters": wide} for i in range(5)]
    assert GRAMMARS[tokenizer].control(tool_structure(many[:1], tokenizer))
    with pytest.raises(ValueError, match="too much work"):
        GRAMMARS[tokenizer].control(tool_structure(many, tokenizer))
    with pytest.raises(ValueError, match="'not', which cannot be enforced"):
        GRAMMARS[tokenizer].control(tool_structure([{"name": "a", "parameters": {"not": {}}}], tokenizer))
    with pytest.raises(ValueError, match="the calls of the own template have no marks of their own"):
        tool_structure(TOOLS, speaking(None))
