"""Thinking under a budget: where it is cut, what stands there then, and what the model says after it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import thinking_model

from abyssal.engine.engine import Engine
from abyssal.evals.budget import Answers, budget_curve, eval_engine, point, within
from abyssal.evals.grade import grade
from abyssal.evals.tasks import EvalConfig, n_thought
from abyssal.model.transformer import Transformer
from abyssal.reward.verifiers import Verifiers
from abyssal.rollout import as_rollout
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Completion, Problem, Rollout, SamplingParams, ThinkingLimits

PROBLEMS = [Problem(prompt=f"one plus {word}", answer="3", key=word, verifier="exact") for word in ("two", "three")]
PARAMS = SamplingParams(max_tokens=20)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe(["one plus two is three", "name a colour: red"] * 20, vocab_size=320))


def thinker(tokenizer: Tokenizer, *, closes: bool = False) -> Transformer:
    """A model that opens every answer with <think>, and never closes it unless it `closes` now and then."""
    never = [] if closes else [tokenizer.end_think_id]
    return thinking_model(opens_behind=tokenizer.assistant_id, think=tokenizer.think_id, never=never,
                          vocab_size=tokenizer.vocab_size, max_position_embeddings=64)


def free_answers(engine: Engine, tokenizer: Tokenizer, *, n: int) -> tuple[list[Rollout], list[SamplingParams]]:
    each = [replace(PARAMS, seed=i) for i in range(n)]
    prompt = [tokenizer.bos_id, 50, tokenizer.assistant_id]
    completions = engine.generate([prompt] * n, each)
    return [as_rollout(PROBLEMS[0], c, tokenizer) for c in completions], each


def test_only_what_thinks_too_long_is_drawn_again_and_up_to_there_it_is_the_same(tokenizer):
    model = thinker(tokenizer, closes=True)
    with torch.no_grad():  # often enough for this test
        model.lm_head.weight[tokenizer.end_think_id, 2] = 0.6
    engine = eval_engine(model, tokenizer)
    free, each = free_answers(engine, tokenizer, n=24)
    lengths = [n_thought(r) for r in free]
    assert len(set(lengths)) > 5
    closed = [n for n, r in zip(lengths, free, strict=True) if tokenizer.end_think_id in r.completion.ids]
    some = max(n for n in closed if n < 15)  # closes by itself exactly where a landing would have to begin
    for budget, landing in ((0, ()), (some, ()), (some + 2, (70, 71)), (1, (70, 71))):
        limits = ThinkingLimits(budget=budget, landing=landing, stop_loops=False)
        rollouts, n_cut = within(limits, free, engine, tokenizer, params=each)
        at = budget - len(landing) if len(landing) <= budget else budget
        for length, before, after in zip(lengths, free, rollouts, strict=True):
            if length < at or (length == at == budget and tokenizer.end_think_id in before.completion.ids):
                assert after.completion.ids == before.completion.ids
            else:
                ids = after.completion.ids
                assert n_thought(after) == budget and after.completion.thinking.closed_by == "budget"
                assert ids[: 1 + at] == before.completion.ids[: 1 + at]
                assert ids[1 + at : 2 + budget] == [*landing[: budget - at], tokenizer.end_think_id]
        assert n_cut == sum(a.completion.ids != b.completion.ids for a, b in zip(free, rollouts, strict=True)) > 0
    whole = within(ThinkingLimits(budget=30, stop_loops=False), free, engine, tokenizer, params=each)
    assert whole == (free, 0)  # a budget beyond the thinking is the free answer


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


def answers(tokenizer: Tokenizer, said: list[str]) -> Answers:
    """Of two problems, four answers each."""
    rollouts = []
    for i, text in enumerate(said):
        ids = tokenizer.encode(text) + [tokenizer.eos_id]
        completion = Completion(prompt_ids=[1], ids=ids, logps=[0.0] * len(ids), finish_reason="stop")
        rollouts.append(as_rollout(replace(PROBLEMS[i // 4], verifier="answer"), completion, tokenizer))
    return Answers(8, rollouts, 2)


def test_a_majority_of_more_answers_costs_their_tokens(tokenizer):
    said = ["3", "5", "3", "03", "4", "4", "3", "4"]  # right, wrong, right, right; wrong, wrong, right, wrong
    with Verifiers() as verifiers:
        given = answers(tokenizer, said)
        grades = grade(given.rollouts, verifiers, tokenizer)
    one, two, four = (point(given, grades, k=4, best_of=n) for n in (1, 2, 4))
    assert one["accuracy"] == 0.5
    # pairs: (3, 5) is a tie of which half is right, (3, 03) agrees; (4, 4) agrees and is wrong, (3, 4) is a tie
    assert two["accuracy"] == pytest.approx((0.75 + 0.25) / 2)
    assert four["accuracy"] == 0.5 and (four["ci_low"], four["ci_high"]) == (0.0, 1.0)
    assert two["tokens"] == 2 * one["tokens"] and four["tokens"] == 4 * one["tokens"]
    assert one["cut_share"] == 0.25 and one["budget"] == 8 and four["best_of"] == 4


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
