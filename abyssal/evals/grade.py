"""One answer looked at from every side: right, well-formed, in the right language, cut off. Generates nothing.

Evaluation, RL and the filters of rejection sampling all read these grades, so that they cannot disagree.
Letters: P problems, G answers per problem.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from abyssal.reward.form import is_mixed, language_consistency, thinking_tags_ok, well_formed
from abyssal.reward.verifiers import Verifiers
from abyssal.reward.worker_process import kind_of
from abyssal.tokens.chat import opens_thinking
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Rollout


class Grade(NamedTuple):
    """`accuracy` is None when the verifier could not decide; `error` then says why. Lengths in tokens."""

    accuracy: float | None
    error: str | None
    well_formed: float
    language: float
    mixed: bool
    thinks: bool
    truncated: bool
    length: int


def grade(rollouts: list[Rollout], verifiers: Verifiers, tokenizer: Tokenizer) -> list[Grade]:
    """A truncated answer gave no answer: it is wrong, and counted as truncated."""
    cut_off = [rollout.completion.finish_reason != "stop" for rollout in rollouts]
    whole = [(r.problem, r.message) for r, truncated in zip(rollouts, cut_off, strict=True) if not truncated]
    scores = iter(verifiers.accuracies(whole))
    grades = []
    for rollout, truncated in zip(rollouts, cut_off, strict=True):
        problem, message, completion = rollout.problem, rollout.message, rollout.completion
        tags_ok = not tokenizer.has_thinking or thinking_tags_ok(
            completion.ids,
            think_id=tokenizer.think_id,
            end_think_id=tokenizer.end_think_id,
            thinking_open=opens_thinking(completion.prompt_ids, tokenizer),
        )
        accuracy, error = (0.0, None) if truncated else next(scores)
        form = well_formed(problem, message, tags_ok=tags_ok and not truncated).value
        language = language_consistency(problem, message).value
        assert form is not None and language is not None
        grades.append(
            Grade(
                accuracy=accuracy,
                error=error,
                well_formed=form,
                language=language,
                mixed=is_mixed(problem, message),
                thinks=message.thinking is not None,
                truncated=truncated,
                length=len(completion.ids),
            )
        )
    return grades


def summary(grades: list[Grade]) -> dict[str, float]:
    """Means over answers; `accuracy` over decided ones, `*_thinking` and `mixed_share` over those that think.

    `undecided_<kind>` counts the answers that no verifier could decide for that kind of reason.
    """
    thinking = [g for g in grades if g.thinks]
    decided = [g.accuracy for g in grades if g.accuracy is not None]
    out = {
        "accuracy": mean(decided),
        "format": mean([g.well_formed for g in grades]),
        "language": mean([g.language for g in grades]),
        "think_share": mean([float(g.thinks) for g in grades]),
        "length": mean([g.length for g in grades]),
        "truncated_share": mean([float(g.truncated) for g in grades]),
        "verifier_errors": float(len(grades) - len(decided)),
    }
    for kind, count in Counter(kind_of(g.error) for g in grades if g.error is not None).items():
        out[f"undecided_{kind}"] = float(count)
    if thinking:
        out["length_thinking"] = mean([g.length for g in thinking])
        out["accuracy_thinking"] = mean([g.accuracy for g in thinking if g.accuracy is not None])
        out["mixed_share"] = mean([float(g.mixed) for g in thinking])
    return out


def error_reasons(grades: list[Grade]) -> dict[str, int]:
    """Why verifiers could not decide, most frequent first."""
    return dict(Counter(g.error for g in grades if g.error is not None).most_common())


def mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values) if values else float("nan")
