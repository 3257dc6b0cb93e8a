"""Structure in the engine: among others, behind thinking, after preemption, and one that fails."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from jsonschema import validate
from small_models import small_model

from abyssal import LM, Message, SamplingParams, Structure
from abyssal.engine.engine import Engine
from abyssal.engine.grammar import Grammars
from abyssal.engine.vocabulary import Vocabulary
from abyssal.model.transformer import Transformer
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.chat import render
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Completion, ThinkingLimits

TOKENIZER = Tokenizer(train_bpe(['{"name": "Ann", "age": 31}', '{"a":[true,null]}'] * 9, vocab_size=330))
MODEL = small_model("mla_moe", vocab_size=TOKENIZER.vocab_size, max_position_embeddings=256)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PERSON = Structure("schema", SCHEMA)
THINK, END_THINK, EOS = TOKENIZER.think_id, TOKENIZER.end_think_id, TOKENIZER.eos_id
QUESTION = [Message(role="user", content="Who?")]
# a model that wants to end at once, to think, and to speak in control tokens
FIGHTS = {i: 8.0 for i in TOKENIZER.control_ids} | {TOKENIZER.encode('"')[0]: 4.0}


def engine(model: Transformer = MODEL, **options: Any) -> Engine:
    return Engine(
        model,
        eos_ids=TOKENIZER.end_ids,
        vocabulary=Vocabulary.of(TOKENIZER),
        grammars=Grammars(TOKENIZER),
        block_size=8,
        **options,
    )


def prompt(**options: Any) -> list[int]:
    return render(QUESTION, TOKENIZER, add_generation_prompt=True, **options).ids


def drawing(seed: int, **options: Any) -> SamplingParams:
    options = {"temperature": 2.0, "max_tokens": 120, "logit_bias": FIGHTS, "structure": PERSON} | options
    return SamplingParams(seed=seed, **options)


def content(completion: Completion) -> str:
    ids = [i for i in completion.ids if i != EOS]
    return TOKENIZER.decode(ids[ids.index(END_THINK) + 1 :] if END_THINK in ids else ids)


def test_an_answer_is_valid_whatever_the_model_wants():
    completions = engine().generate([prompt(thinking="off")] * 24, [drawing(seed) for seed in range(24)])
    assert {c.finish_reason for c in completions} == {"stop"}
    for c in completions:
        assert TOKENIZER.control_ids.intersection(c.ids) == {EOS}
        validate(json.loads(content(c)), SCHEMA)
    assert len({content(c) for c in completions}) > 12


def test_thinking_stays_free_and_an_answer_follows_it():
    """The prompt opened it, or the model may: an end in the middle of it is no answer."""
    completions = engine().generate(
        [prompt(thinking="on")] * 8 + [prompt()] * 8,
        [drawing(seed, max_tokens=200, logit_bias=FIGHTS | {THINK: 1.0}) for seed in range(16)],
    )
    for c in completions:
        assert c.finish_reason == "stop" and c.ids.count(EOS) == 1
        validate(json.loads(content(c)), SCHEMA)
    opened = completions[8:]
    assert {c.ids[0] == THINK for c in opened} == {True, False}
    thoughts = [c.ids[: c.ids.index(END_THINK)] for c in completions if END_THINK in c.ids]
    assert len(thoughts) >= 8 and max(map(len, thoughts)) > 3
    at_once = replace(PERSON, may_think=False)
    closed = engine().generate([prompt()] * 8, [drawing(seed, structure=at_once) for seed in range(8)])
    assert all(THINK not in c.ids and c.finish_reason == "stop" for c in closed)


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_budget_and_a_structure_hold_together(budget: int):
    limits = ThinkingLimits(budget=budget, landing=())
    quiet = FIGHTS | {END_THINK: -100.0}
    completions = engine().generate(
        [prompt(thinking="on")] * 4, [drawing(seed, logit_bias=quiet) for seed in range(4)], thinking=limits
    )
    for c in completions:
        assert c.ids.index(END_THINK) == budget and c.finish_reason == "stop"
        validate(json.loads(content(c)), SCHEMA)


def test_an_answer_is_the_same_alone_among_others_and_after_preemption():
    """In turns with requests that have none, which draw what they draw without it."""
    params = [drawing(seed, structure=PERSON if seed % 2 else None, max_tokens=60) for seed in range(6)]
    prompts = [prompt(thinking="off") + TOKENIZER.encode("a" * seed) for seed in range(6)]
    exact = {"invariant": True}
    together = engine(**exact).generate(prompts, params)
    alone = [engine(**exact).generate([p], [own])[0] for p, own in zip(prompts, params, strict=True)]
    tight = engine(n_blocks=24, **exact)
    tight_ones = tight.generate(prompts, params)
    for a, b, c in zip(together, alone, tight_ones, strict=True):
        assert a.ids == b.ids == c.ids and a.logps == b.logps == c.logps
    for c in together[1::2]:
        validate(json.loads(content(c)), SCHEMA)


@pytest.mark.parametrize("kind", ["mla_moe_query_latent", "gqa_dense"])
def test_drafts_change_nothing_and_forced_ids_are_among_them(kind: str):
    """By MTP and by prompt look-up; half of the requests think first."""
    model = small_model(kind, vocab_size=TOKENIZER.vocab_size, max_position_embeddings=256)
    forced = Structure("schema", SCHEMA | {"properties": {"name": {"const": "Ann, the first"}, "age": {"const": 31}}})
    params = [drawing(seed, structure=forced if seed % 2 else PERSON, temperature=0.7) for seed in range(6)]
    prompts = [prompt(thinking="on" if seed > 2 else "off") for seed in range(6)]
    plain = engine(model, invariant=True).generate(prompts, params)
    speculating = engine(model, invariant=True, speculate=1)
    assert [(c.ids, c.logps) for c in speculating.generate(prompts, params)] == [(c.ids, c.logps) for c in plain]
    for c, own in zip(plain, params, strict=True):
        if c.finish_reason == "stop" and own.structure is not None:
            validate(json.loads(content(c)), json.loads(own.structure.value))
    assert [c.finish_reason for c in plain].count("stop") >= 4
    stats = speculating.draft_stats
    assert stats is not None and stats.tokens_per_step > 1.05  # a random model guesses nothing right by itself


def test_log_probs_are_the_models_own():
    (c,) = engine().generate([prompt(thinking="off")], [drawing(3, logit_bias={})])
    ids = torch.tensor([c.prompt_ids + c.ids])
    with torch.inference_mode():
        logps_TV = MODEL.logits(MODEL.hidden(ids[:, :-1]))[0, -len(c.ids) :, : TOKENIZER.vocab_size].log_softmax(-1)
    assert c.logps == pytest.approx(logps_TV.gather(-1, torch.tensor(c.ids)[:, None])[:, 0].tolist(), abs=1e-4)


def test_one_that_cannot_be_followed_ends_alone():
    hard = Structure("regex", "(a?){2000}a{2000}")
    params = [drawing(0), drawing(1, structure=hard), drawing(2, structure=None)]
    one, failed, other = engine(invariant=True).generate([prompt(thinking="off")] * 3, params)
    assert failed.finish_reason == "error"
    assert "the structure of this answer cannot be followed further" in (failed.error or "")
    without = engine(invariant=True).generate([prompt(thinking="off")] * 2, [params[0], params[2]])
    assert [one.ids, other.ids] == [c.ids for c in without]


def test_what_max_tokens_cuts_is_the_beginning_of_a_whole_one():
    (cut,) = engine().generate([prompt(thinking="off")], [drawing(5, max_tokens=6)])
    (whole,) = engine().generate([prompt(thinking="off")], [drawing(5)])
    assert cut.finish_reason == "length" and cut.ids == whole.ids[:6]


def test_an_engine_that_knows_no_text_says_so():
    plain = Engine(MODEL, eos_ids=[EOS])
    with pytest.raises(ValueError, match="needs an engine that knows text; give it grammars"):
        plain.add(prompt(), drawing(0, logit_bias={}))
    recording = engine(record_sampling=True)
    with pytest.raises(ValueError, match="takes no control"):
        recording.add(prompt(), drawing(0, logit_bias={}))


def test_text_and_chat_take_a_structure():
    lm = LM(MODEL, TOKENIZER)
    fighting = SamplingParams(temperature=2.0, max_tokens=150, logit_bias=FIGHTS, seed=2)
    (text,) = lm.generate("A person:", fighting, structure=PERSON)
    assert text.finish_reason == "stop"
    validate(json.loads(text.text), SCHEMA)
    said = lm.chat(QUESTION, fighting, thinking="on", structure=PERSON)
    assert said.thinking
    validate(json.loads(said.content), SCHEMA)
    chosen = lm.chat(QUESTION, fighting, thinking="off", structure=Structure("choice", ["yes", "no"]))
    assert chosen.content in ("yes", "no")
    with pytest.raises(ValueError, match="'not', which cannot be enforced"):
        lm.chat(QUESTION, structure=Structure("schema", {"not": {}}))
    assert lm.engine.n_unfinished == 0
