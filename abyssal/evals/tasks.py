"""Evaluate a checkpoint on held-out problems: avg@k with intervals, cons@k, length, thinking, languages. (R1 section 3)

Letters: P problems, K answers per problem.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from abyssal.data.pack import Example, pack_isolated
from abyssal.engine.engine import Engine
from abyssal.engine.vocabulary import Vocabulary
from abyssal.evals.grade import Grade, error_reasons, grade, summary
from abyssal.evals.held_out_rows import held_out_metrics
from abyssal.evals.passk import bootstrap_mean, cons_at_k
from abyssal.evals.run_files import CHECKPOINTS
from abyssal.model.transformer import Transformer, count_parameters
from abyssal.reward.majority import answer_key
from abyssal.reward.verifiers import Verifiers
from abyssal.rollout import agreement, sample_answers
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Problem, Rollout, SamplingParams


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    problems: int = 300
    answers: int = 4  # k
    temperature: float = 1.0  # every checkpoint as it is; R1 reports 0.6 / 0.95
    top_p: float = 1.0
    max_tokens: int = 128
    traces: int = 6  # problems shown side by side in the report
    never_trained_problems: int = 60  # of the family kept out of training
    budgets: tuple[int, ...] = ()  # tokens of thinking after which </think> is forced; none: not measured
    budget_checkpoints: tuple[str, ...] = ("r1",)  # those whose thinking is cut
    budget_answers: int = 2  # k under a budget
    landing: str = ""  # last words of thinking that is cut; a model that never read them may do better without

    def __post_init__(self) -> None:
        SamplingParams(temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens)  # checks
        if self.budget_answers < 1:
            raise ValueError(f"budget_answers={self.budget_answers} must be at least 1")
        if unknown := [name for name in self.budget_checkpoints if name not in CHECKPOINTS]:
            raise ValueError(f"budget_checkpoints: no {unknown[0]!r}; choose among {', '.join(CHECKPOINTS)}")
        for budget in self.budgets:
            if not 0 <= budget <= self.max_tokens - 3:  # <think>, </think> and at least one token of answer
                raise ValueError(
                    f"budgets: {budget} tokens of thinking leave no room for an answer in max_tokens="
                    f"{self.max_tokens}; give 0 to {self.max_tokens - 3}"
                )


@dataclass(frozen=True)
class Result:
    """`per_problem` is each problem's mean accuracy, for paired differences between checkpoints."""

    overall: dict[str, Any]
    family: dict[str, dict[str, Any]]
    per_problem: list[float]
    first_answers: list[tuple[Rollout, Grade]]
    right_lengths: list[int]  # tokens of thinking of the answers that thought and were right


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    problems: list[Problem],
    *,
    config: EvalConfig,
    verifiers: Verifiers,
    seed: int,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Result:
    """K answers to each problem through the engine; all checkpoints meet the same problems with the same noise."""
    engine = Engine(
        model,
        eos_ids=sorted(tokenizer.end_ids),
        max_batch=256,
        vocab_size=tokenizer.vocab_size,
        vocabulary=Vocabulary.of(tokenizer),
    )
    params = SamplingParams(temperature=config.temperature, top_p=config.top_p, max_tokens=config.max_tokens)
    batch = max(1, 512 // config.answers)
    rollouts: list[Rollout] = []
    for start in range(0, len(problems), batch):
        rollouts += sample_answers(
            engine,
            tokenizer,
            problems[start : start + batch],
            answers_per_problem=config.answers,
            params=params,
            seed=seed + start,
        )
        on_batch(min(start + batch, len(problems)))
    grades = grade(rollouts, verifiers, tokenizer)
    k = config.answers
    total, active = count_parameters(model)
    per_problem = [mean_accuracy(grades[i : i + k]) for i in range(0, len(grades), k)]
    overall = (
        numbers(rollouts, grades, k=k)
        | {"k": k, "active_params": active, "total_params": total}
        | drafting(model, tokenizer, rollouts[: 64 * k : k])
    )
    families = sorted({problem.family for problem in problems})
    by_family = {}
    for family in families:
        chosen = [i for i, r in enumerate(rollouts) if r.problem.family == family]
        by_family[family] = numbers([rollouts[i] for i in chosen], [grades[i] for i in chosen], k=k)
    first_answers = list(zip(rollouts[::k], grades[::k], strict=True))
    return Result(overall, by_family, per_problem, first_answers, right_lengths(rollouts, grades))


def engine_gap(
    model: Transformer, tokenizer: Tokenizer, problems: list[Problem], *, config: EvalConfig, seed: int
) -> dict[str, float]:
    """How far the engine's log-probs are from the trainer's, in the model's compute type, over one answer to each.

    `largest` and `mean` are on the engine's experts (router replay), `free_*` with the trainer choosing for itself.
    """
    engine = Engine(model, eos_ids=sorted(tokenizer.end_ids), max_batch=64, vocab_size=tokenizer.vocab_size)
    params = SamplingParams(temperature=config.temperature, top_p=config.top_p, max_tokens=config.max_tokens)
    rollouts = sample_answers(engine, tokenizer, problems, answers_per_problem=1, params=params, seed=seed)
    replay = model.config.feed_forward == "moe"
    gap = agreement(model, [r.completion for r in rollouts], replay=replay, vocab_size=tokenizer.vocab_size)
    return {
        "largest": gap.max,
        "mean": gap.mean,
        "free_largest": gap.free_max,
        "free_mean": gap.free_mean,
        "flip_share": gap.flip_share,
        "n_tokens": gap.n_tokens,
    }


def numbers(rollouts: list[Rollout], grades: list[Grade], *, k: int) -> dict[str, Any]:
    """The row of a table: means, and a bootstrap over problems for the accuracy.

    Undecided answers count nowhere but in `verifier_errors`; a problem of nothing else is left out of `n_problems`.
    """
    groups = [range(i, i + k) for i in range(0, len(grades), k)]
    decided = [kept for group in groups if (kept := [i for i in group if grades[i].accuracy is not None])]
    if not decided:
        raise ValueError(f"the verifier decided none of {len(grades)} answers: {next(iter(error_reasons(grades)))}")
    accuracy_PK = [[grades[i].accuracy or 0.0 for i in group] for group in decided]
    answers_PK = [[voted(rollouts[i]) for i in group] for group in decided]
    interval = bootstrap_mean([sum(row) / len(row) for row in accuracy_PK])
    return summary(grades) | {
        "accuracy": interval.value,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "n_problems": len(decided),
        "cons_at_k": cons_at_k(answers_PK, accuracy_PK),
    }


def voted(rollout: Rollout) -> str | None:
    """What an answer says in a vote; one that was cut off says nothing."""
    return answer_key(rollout.message.content) if rollout.completion.finish_reason == "stop" else None


def n_thought(rollout: Rollout) -> int:
    """Tokens between <think> and </think>, or the end where it was not closed."""
    report = rollout.completion.thinking
    return 0 if report is None else report.n_tokens


def right_lengths(rollouts: list[Rollout], grades: list[Grade]) -> list[int]:
    return [n_thought(r) for r, g in zip(rollouts, grades, strict=True) if g.accuracy == 1.0 and n_thought(r) > 0]


def mean_accuracy(grades: list[Grade]) -> float:
    """Over the decided ones; NaN when there is none."""
    decided = [g.accuracy for g in grades if g.accuracy is not None]
    return sum(decided) / len(decided) if decided else float("nan")


def drafting(model: Transformer, tokenizer: Tokenizer, rollouts: list[Rollout]) -> dict[str, float]:
    """How often the MTP module's guess for the second token is the model's own, on the model's own answers."""
    if not len(model.mtp):
        return {}
    examples = [
        Example(
            [*r.completion.prompt_ids, *r.completion.ids],
            [0] * len(r.completion.prompt_ids) + [1] * len(r.completion.ids),
        )
        for r in rollouts
    ]
    packed = pack_isolated(examples, row_len=max(256, max(len(e.ids) for e in examples)), pad_id=tokenizer.pad_id)
    device = model.embed_tokens.weight.device
    with torch.inference_mode():
        metrics = held_out_metrics(
            model,
            packed.ids_BT.to(device),
            packed.mask_BT.to(device),
            packed.segment_BT.to(device),
            positions_BT=packed.position_BT.to(device),
        )
    return {
        "mtp_acceptance": metrics["mtp_acceptance"],
        "max_violation": max(metrics["held_out_max_violation"], default=0.0)
        if "held_out_max_violation" in metrics
        else 0.0,
    }
