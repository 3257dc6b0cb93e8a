"""Thinking under a budget: where it is cut, what stands there then, and what the model says after it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import small_model

from abyssal.engine.engine import Engine
from abyssal.evals.budget import budget_curve, cut, n_thought, within
from abyssal.evals.tasks import EvalConfig
from abyssal.model.transformer import Transformer
from abyssal.reward.verifiers import Verifiers
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.chat import parse
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Completion, Problem, Rollout, SamplingParams

PROBLEMS = [Problem(prompt=f"one plus {word}", answer="3", key=word, verifier="exact") for word in ("two", "three")]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe(["one plus two is three", "name a colour: red"] * 20, vocab_size=320))


def thinker(tokenizer: Tokenizer) -> Transformer:
    """A model that opens every answer with <think>: the last token of a prompt lights a feature that it alone has."""
    model = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=64)
    with torch.no_grad():
        model.embed_tokens.weight[:, 1] = 0.0
        model.embed_tokens.weight[tokenizer.assistant_id, 1] = 20.0
        model.lm_head.weight[tokenizer.think_id, 1] = 3.0
    return model


def rollout(tokenizer: Tokenizer, ids: list[int], prompt: list[int]) -> Rollout:
    completion = Completion(prompt_ids=prompt, ids=ids, logps=[-0.5] * len(ids), finish_reason="stop")
    return Rollout(problem=PROBLEMS[0], completion=completion, message=parse(ids, tokenizer))


def greedy_after(model: Transformer, ids: list[int], n: int, eos_id: int) -> list[int]:
    """The plain way: the whole context again for every token."""
    said: list[int] = []
    while len(said) < n and eos_id not in said:
        with torch.inference_mode():
            said.append(int(model.logits(model.hidden(torch.tensor([ids + said])))[0, -1].argmax()))
    return said


def test_thinking_is_cut_only_where_it_is_longer_than_the_budget(tokenizer):
    t, end, eos = tokenizer.think_id, tokenizer.end_think_id, tokenizer.eos_id
    closed = [t, 31, 32, 33, end, 40, eos]
    assert cut(closed, 2, tokenizer) == [t, 31, 32, end]
    assert cut(closed, 0, tokenizer) == [t, end]
    assert cut(closed, 3, tokenizer) is None  # closed by itself, in time
    assert cut([t, 31, 32, 33], 2, tokenizer) == [t, 31, 32, end]  # never closed
    assert cut([t, 31, 32, eos], 2, tokenizer) is None  # ended in the middle of a thought, in time
    assert cut([40, eos], 0, tokenizer) is None  # answered at once
    assert [n_thought(ids, tokenizer) for ids in (closed, [t, 31, 32], [40, eos])] == [3, 2, 0]


def test_the_forced_sequence_is_what_the_model_says_after_the_mark(tokenizer):
    model, prompt = thinker(tokenizer), [tokenizer.bos_id, 50, tokenizer.assistant_id]
    t, end = tokenizer.think_id, tokenizer.end_think_id
    free = [rollout(tokenizer, [t, 31, 32, 33, 34, end, 40], prompt), rollout(tokenizer, [41, 42], prompt)]
    engine = Engine(model, eos_ids=[tokenizer.eos_id])
    rollouts, n_cut = within(2, free, engine, tokenizer, params=GREEDY, seed=0)
    want = [t, 31, 32, end]
    want += greedy_after(model, prompt + want, GREEDY.max_tokens - len(want), tokenizer.eos_id)
    assert rollouts[0].completion.ids == want and len(want) > 4
    assert rollouts[0].completion.prompt_ids == prompt and len(rollouts[0].completion.logps) == len(want)
    assert rollouts[0].message.thinking == tokenizer.decode([31, 32])
    assert rollouts[1] is free[1] and n_cut == 1


def test_a_curve_has_a_point_a_budget_and_is_the_same_each_time(tokenizer):
    config = EvalConfig(problems=2, max_tokens=12, budgets=(0, 3, 9), budget_answers=2)
    with Verifiers() as verifiers:
        curves = [
            budget_curve(thinker(tokenizer), tokenizer, PROBLEMS, config=config, verifiers=verifiers, seed=4)
            for _ in range(2)
        ]
    assert curves[0] == curves[1]
    assert [point["budget"] for point in curves[0]] == [0, 3, 9]
    assert [point["thinking_tokens"] for point in curves[0]] == [0.0, 3.0, 9.0]  # this model never closes by itself
    assert all(point["cut_share"] == 1.0 for point in curves[0])
    assert all(point["ci_low"] <= point["accuracy"] <= point["ci_high"] for point in curves[0])


def test_a_budget_beyond_the_thinking_is_the_free_answer(tokenizer):
    prompt = [tokenizer.bos_id, tokenizer.assistant_id]
    free = [rollout(tokenizer, [tokenizer.think_id, 31, tokenizer.end_think_id, 40], prompt)]
    engine = Engine(thinker(tokenizer), eos_ids=[tokenizer.eos_id])
    assert within(1, free, engine, tokenizer, params=GREEDY, seed=0) == (free, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": (0, 126)}, "126 tokens of thinking leave no room for an answer in max_tokens=128; give 0 to 125"),
        ({"budgets": (-1,)}, "-1 tokens of thinking"),
        ({"budget_answers": 0}, "budget_answers=0"),
        ({"budget_checkpoints": ("r2",)}, "no 'r2'; choose among base, zero"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(EvalConfig(), **changes)
