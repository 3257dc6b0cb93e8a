"""pass@1 against thinking budget: what an answer is worth when its thinking is cut. (budget forcing, s1 section 3.2)

An answer that has thought b tokens without closing is cut there, </think> is put behind it, and the model goes on with
its answer. The noise of a token is a function of seed and position, so the first b tokens of a free answer are what
would have been drawn under the budget: free answers are drawn once, and each budget continues those it cuts.

An answer that closes its thinking within the budget, or never opened it, stays as it is. Budget 0 leaves
<think></think>, so that only what was thought differs between budgets, not how the answer is asked for.
Letters: P problems, K answers per problem.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from abyssal.engine.engine import Engine
from abyssal.engine.sampler import derive_seed
from abyssal.evals.grade import Grade, grade, mean
from abyssal.evals.passk import bootstrap_mean
from abyssal.evals.tasks import EvalConfig, mean_accuracy
from abyssal.model.transformer import Transformer
from abyssal.reward.verifiers import Verifiers
from abyssal.rollout import sample_answers
from abyssal.tokens.bpe import THINK
from abyssal.tokens.chat import parse
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Completion, Problem, Rollout, SamplingParams


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
    engine = Engine(
        model, eos_ids=sorted(tokenizer.end_ids), max_batch=256, record_experts=False, vocab_size=tokenizer.vocab_size
    )
    params = SamplingParams(temperature=config.temperature, top_p=config.top_p, max_tokens=config.max_tokens)
    k = config.budget_answers
    free: list[Rollout] = []
    batch = max(1, 512 // k)
    for start in range(0, len(problems), batch):
        some = problems[start : start + batch]
        free += sample_answers(engine, tokenizer, some, answers_per_problem=k, params=params, seed=seed + start)
    curve = []
    for budget in config.budgets:
        rollouts, n_cut = within(budget, free, engine, tokenizer, params=params, seed=seed)
        grades = grade(rollouts, verifiers, tokenizer)
        curve.append(point(budget, rollouts, grades, tokenizer, k=k) | {"cut_share": n_cut / len(rollouts)})
    return curve


def within(
    budget: int, free: list[Rollout], engine: Engine, tokenizer: Tokenizer, *, params: SamplingParams, seed: int
) -> tuple[list[Rollout], int]:
    """The same answers with at most `budget` tokens of thinking each, and how many were cut.

    `max_tokens` holds for thinking and answer together, cut or not.
    """
    prefixes = {i: prefix for i, r in enumerate(free) if (prefix := cut(r.completion.ids, budget, tokenizer))}
    prompts = [[*free[i].completion.prompt_ids, *prefix] for i, prefix in prefixes.items()]
    rest = [
        replace(params, seed=derive_seed(seed, i), max_tokens=params.max_tokens - len(prefix))
        for i, prefix in prefixes.items()
    ]
    rollouts = list(free)
    for (i, prefix), completion in zip(prefixes.items(), engine.generate(prompts, rest), strict=True):
        rollouts[i] = forced(free[i], prefix, completion.checked(), tokenizer)
    return rollouts, len(prefixes)


def cut(ids: list[int], budget: int, tokenizer: Tokenizer) -> list[int] | None:
    """<think>, `budget` tokens of thinking, </think>; None for an answer that keeps within the budget by itself."""
    if not ids or ids[0] != tokenizer.find(THINK):
        return None
    thought = ids[1:]
    ends = [thought.index(mark) for mark in (tokenizer.end_think_id, tokenizer.eos_id) if mark in thought]
    if min(ends, default=len(thought)) <= budget:
        return None
    return [tokenizer.think_id, *thought[:budget], tokenizer.end_think_id]


def forced(free: Rollout, prefix: list[int], completion: Completion, tokenizer: Tokenizer) -> Rollout:
    """The cut answer as one answer to the first prompt; what was not drawn has no log-prob."""
    ids = [*prefix, *completion.ids]
    logps = [*free.completion.logps[: len(prefix) - 1], float("nan"), *completion.logps]
    whole = replace(completion, prompt_ids=free.completion.prompt_ids, ids=ids, logps=logps, experts=None)
    return Rollout(problem=free.problem, completion=whole, message=parse(ids, tokenizer))


def point(
    budget: int, rollouts: list[Rollout], grades: list[Grade], tokenizer: Tokenizer, *, k: int
) -> dict[str, Any]:
    """One point of the curve; problems that the verifier could not decide are left out."""
    means = [mean_accuracy(grades[i : i + k]) for i in range(0, len(grades), k)]
    decided = [value for value in means if not math.isnan(value)]
    interval = bootstrap_mean(decided)
    return {
        "budget": budget,
        "accuracy": interval.value,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "n_problems": len(decided),
        "thinking_tokens": mean([n_thought(r.completion.ids, tokenizer) for r in rollouts]),
        "truncated_share": mean([float(g.truncated) for g in grades]),
    }


def n_thought(ids: list[int], tokenizer: Tokenizer) -> int:
    """Tokens between <think> and </think>, or the end where it was not closed."""
    if not ids or ids[0] != tokenizer.find(THINK):
        return 0
    return (ids.index(tokenizer.end_think_id) if tokenizer.end_think_id in ids else len(ids)) - 1
