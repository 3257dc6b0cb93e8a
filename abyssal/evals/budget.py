"""Accuracy against tokens: what answers are worth when their thinking is cut, and when several are asked for one.

The budget is the engine's own (engine/thinking.py), as in a chat. Free answers are drawn once. The noise of a token is
a function of seed and position, so under a budget an answer is the free one up to where its thinking has to land, and
is drawn again only where it does. An answer that closes its thinking in time, or never opened it, stays as it is.
Budget 0 leaves <think></think>, so that only what was thought differs between budgets, not how the answer is asked for.

Of n answers the majority counts (reward/majority.py); they cost their tokens together.
Letters: P problems, K answers per problem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from abyssal.engine.engine import Engine
from abyssal.engine.sampler import derive_seed
from abyssal.engine.vocabulary import Vocabulary
from abyssal.evals.grade import Grade, grade, mean
from abyssal.evals.passk import bootstrap_mean, consensus_per_problem
from abyssal.evals.tasks import EvalConfig, n_thought, voted
from abyssal.model.transformer import Transformer
from abyssal.reward.verifiers import Verifiers
from abyssal.rollout import as_rollout, sample_answers
from abyssal.tokens.chat import landing_ids
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Problem, Rollout, SamplingParams, ThinkingLimits

Budget = int | None  # None: no limit


class Answers(NamedTuple):
    """K answers to each problem under one budget, side by side, and how many of all were cut."""

    budget: Budget
    rollouts: list[Rollout]
    n_cut: int


def budget_curve(
    model: Transformer,
    tokenizer: Tokenizer,
    problems: list[Problem],
    *,
    config: EvalConfig,
    verifiers: Verifiers,
    seed: int,
) -> list[dict[str, Any]]:
    """For each of `config.budgets` the accuracy with its interval, the share of answers cut, the tokens thought."""
    params = SamplingParams(temperature=config.temperature, top_p=config.top_p, max_tokens=config.max_tokens)
    k = config.budget_answers
    _, *limited = answers_within(
        eval_engine(model, tokenizer),
        tokenizer,
        problems,
        budgets=config.budgets,
        k=k,
        params=params,
        landing=landing_ids(tokenizer, config.landing),
        seed=seed,
    )
    return [point(answers, grade(answers.rollouts, verifiers, tokenizer), k=k) for answers in limited]


def eval_engine(model: Transformer, tokenizer: Tokenizer) -> Engine:
    return Engine(
        model,
        eos_ids=sorted(tokenizer.end_ids),
        max_batch=256,
        record_experts=False,
        vocab_size=tokenizer.vocab_size,
        vocabulary=Vocabulary.of(tokenizer),
    )


def answers_within(
    engine: Engine,
    tokenizer: Tokenizer,
    problems: list[Problem],
    *,
    budgets: Sequence[int],
    k: int,
    params: SamplingParams,
    landing: tuple[int, ...],
    seed: int,
    on_problems: Callable[[int], None] = lambda n_done: None,
) -> list[Answers]:
    """K answers to each problem without a limit, then within each budget, in the order of the budgets.

    `params.max_tokens` holds for thinking and answer together, cut or not.
    """
    free = Answers(None, [], 0)
    limited = [Answers(budget, [], 0) for budget in budgets]
    batch = max(1, 512 // k)
    for start in range(0, len(problems), batch):
        some = problems[start : start + batch]
        drawn = sample_answers(engine, tokenizer, some, answers_per_problem=k, params=params, seed=seed + start)
        free.rollouts.extend(drawn)
        each = [replace(params, seed=derive_seed(seed + start, i // k, i % k)) for i in range(len(drawn))]
        for i, budget in enumerate(budgets):
            limits = ThinkingLimits(budget=budget, landing=landing, stop_loops=False)
            rollouts, n_cut = within(limits, drawn, engine, tokenizer, params=each)
            limited[i].rollouts.extend(rollouts)
            limited[i] = limited[i]._replace(n_cut=limited[i].n_cut + n_cut)
        on_problems(min(start + batch, len(problems)))
    return [free, *limited]


def within(
    limits: ThinkingLimits, free: list[Rollout], engine: Engine, tokenizer: Tokenizer, *, params: list[SamplingParams]
) -> tuple[list[Rollout], int]:
    """The same answers under a budget, and how many are others for it. `params` are what each was drawn with."""
    assert limits.budget is not None
    room = limits.budget - (len(limits.landing) if len(limits.landing) <= limits.budget else 0)
    touched = [i for i, r in enumerate(free) if r.message.thinking is not None and n_thought(r) >= room]
    prompts = [free[i].completion.prompt_ids for i in touched]
    rollouts = list(free)
    completions = engine.generate(prompts, [params[i] for i in touched], thinking=limits)
    for i, completion in zip(touched, completions, strict=True):
        rollouts[i] = as_rollout(free[i].problem, completion.checked(), tokenizer)
    return rollouts, sum(rollouts[i].completion.ids != free[i].completion.ids for i in touched)


def point(answers: Answers, grades: list[Grade], *, k: int, best_of: int = 1) -> dict[str, Any]:
    """One point of the curve: of `best_of` answers the majority counts. `tokens` are what a question cost.

    Answers that the verifier could not decide are left out, and problems of nothing else.
    """
    rollouts, values = answers.rollouts, []
    for start in range(0, len(grades), k):
        groups = [range(i, i + best_of) for i in range(start, start + k - best_of + 1, best_of)]
        decided = [kept for group in groups if (kept := [i for i in group if grades[i].accuracy is not None])]
        if decided:
            keys = [[voted(rollouts[i]) for i in group] for group in decided]
            right = [[grades[i].accuracy or 0.0 for i in group] for group in decided]
            # one answer is its own majority, however little it is one
            shares = consensus_per_problem(keys, right) if best_of > 1 else [value for (value,) in right]
            values.append(mean(shares))
    interval = bootstrap_mean(values)
    return {
        "budget": answers.budget,
        "best_of": best_of,
        "accuracy": interval.value,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "n_problems": len(values),
        "tokens": best_of * mean([len(r.completion.ids) for r in rollouts]),
        "thinking_tokens": mean([n_thought(r) for r in rollouts]),
        "cut_share": answers.n_cut / len(rollouts),
        "truncated_share": mean([float(g.truncated) for g in grades]),
    }

