"""Sampling traces from a checkpoint and keeping the good ones, with every refusal counted. (R1 sections 2.3.1, 2.3.3)

`cold_start` keeps readable right answers of R1-Zero, `reject` the best of dev2 beside general data, `distil` those of
R1. The kept conversations are written to traces.jsonl as `messages`, the form a user's own SFT data has.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from abyssal.data.user_examples import read_conversations
from abyssal.data.worked import in_one_language
from abyssal.engine.engine import Engine
from abyssal.evals.grade import Grade, error_reasons, grade, summary
from abyssal.record import Recorder
from abyssal.reward.verifiers import Verifiers
from abyssal.rollout import sample_answers
from abyssal.stages.rl import ProblemStream
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Conversation, Message, Problem, Rollout, SamplingParams

COUNTED = ("truncated_share", "verifier_errors", "undecided_")  # what a step of sampling tells of its grades


@dataclass(frozen=True, kw_only=True)
class TracesConfig:
    problems: int = 400
    answers: int = 4  # per problem
    keep_per_problem: int = 1
    temperature: float = 1.0
    max_tokens: int = 128
    one_language: bool = True  # refuse thinking that holds words of another language than the question's
    thinking: bool = True  # refuse answers without thinking
    rewrite: bool = False  # put mixed connectives into the question's language, as was done for R1's cold start
    least: int = 20  # kept traces below which the stage stops instead of training on next to nothing

    def __post_init__(self) -> None:
        SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens)  # raises where they make no sense


def sample_traces(
    stage_dir: Path,
    *,
    config: TracesConfig,
    engine: Engine,
    tokenizer: Tokenizer,
    stream: ProblemStream,
    first_problem: int,
    verifiers: Verifiers,
    seed: int,
    recorder: Recorder,
) -> list[Conversation]:
    """Kept conversations, from traces.jsonl when an earlier run has written it whole."""
    path = stage_dir / "traces.jsonl"
    if path.is_file():
        return read_conversations(path)
    params = SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens)
    kept: list[Conversation] = []
    counts: Counter[str] = Counter()
    n_rewritten = 0
    batch = max(1, 256 // config.answers)
    starts = range(0, config.problems, batch)
    for step, start in enumerate(starts):
        problems = [stream.at(first_problem + i) for i in range(start, min(start + batch, config.problems))]
        rollouts = sample_answers(
            engine, tokenizer, problems, answers_per_problem=config.answers, params=params, seed=seed + step
        )
        if config.rewrite:
            before, rollouts = rollouts, [rewritten(rollout) for rollout in rollouts]
            n_rewritten += sum(a is not b for a, b in zip(before, rollouts, strict=True))
        grades = grade(rollouts, verifiers, tokenizer)
        reasons = [refusal(rollout, g, config) for rollout, g in zip(rollouts, grades, strict=True)]
        for i in range(0, len(rollouts), config.answers):
            good = [rollouts[k] for k in range(i, i + config.answers) if reasons[k] is None]
            chosen = distinct(good)[: config.keep_per_problem]
            counts["one of several"] += len(good) - len(chosen)
            kept += [conversation_of(rollout.problem, rollout.message) for rollout in chosen]
        counts.update(reason for reason in reasons if reason is not None)
        for why, count in error_reasons(grades).items():
            recorder.log(f"the verifier could not decide {count} answers: {why}")
        recorder.step(
            step,
            len(starts),
            {
                "kept": len(kept),
                "sampled": (start + len(problems)) * config.answers,
                "tokens": sum(len(r.completion.ids) for r in rollouts),
                **{name: value for name, value in summary(grades).items() if name.startswith(COUNTED)},
            },
        )
    refused = ", ".join(f"{reason} {n}" for reason, n in counts.most_common() if n)
    recorder.log(
        f"kept {len(kept)} of {config.problems * config.answers} traces; refused: {refused or 'none'}; "
        f"rewritten into the question's language before that: {n_rewritten}"
    )
    if len(kept) < config.least:
        raise ValueError(
            f"only {len(kept)} of {config.problems * config.answers} traces passed ({refused}); the model is "
            f"too weak for this stage: train the stage before it longer, or lower `least`={config.least}"
        )
    write_conversations(path, kept)
    return kept


def rewritten(rollout: Rollout) -> Rollout:
    """The same trace with its words in the question's language; itself where nothing changes."""
    message = rollout.message
    if message.thinking is None:
        return rollout
    thinking = in_one_language(message.thinking, rollout.problem.language)
    return rollout if thinking == message.thinking else replace(rollout, message=replace(message, thinking=thinking))


def refusal(rollout: Rollout, g: Grade, config: TracesConfig) -> str | None:
    """Why a trace is not kept, or None. The first reason that holds is the one counted."""
    if g.truncated:
        return "cut off"
    if g.accuracy is None:
        return "undecided"
    if g.accuracy < 1:
        return "wrong"
    if g.well_formed < 1:
        return "malformed"
    if config.thinking and not g.thinks:
        return "no thinking"
    if config.one_language and g.mixed:
        return "mixed languages"
    return None


def distinct(rollouts: list[Rollout]) -> list[Rollout]:
    """Most worked out first, the same text once: the longer of two right traces shows more of its work."""
    unique = {(r.message.thinking, r.message.content): r for r in rollouts}
    return sorted(unique.values(), key=lambda r: (-len(r.completion.ids), r.message.thinking or ""))


def conversation_of(problem: Problem, answer: Message) -> Conversation:
    return [Message(role="user", content=problem.prompt), answer]


def write_conversations(path: Path, conversations: list[Conversation]) -> None:
    """One {"messages": [...]} a line; the file appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for conversation in conversations:
            messages: list[dict[str, Any]] = []
            for message in conversation:
                entry = {"role": message.role, "content": message.content}
                messages.append(entry if message.thinking is None else entry | {"thinking": message.thinking})
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
