"""Stage `eval`: every checkpoint on the same held-out problems, on a family no stage ever trained on, and with its
thinking cut."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from abyssal.checkpoint.own_thinking import measured_lengths, write_lengths
from abyssal.data.problems import NEVER_TRAINED, ProblemSource, problem_at
from abyssal.evals.budget import budget_curve
from abyssal.evals.passk import bootstrap_difference
from abyssal.evals.tasks import EvalConfig, Result, engine_gap, evaluate
from abyssal.model.transformer import Transformer
from abyssal.record import Recorder, plain
from abyssal.reward.verifiers import Verifiers
from abyssal.stages.rl import ProblemStream
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Problem

FIRST_MEASURED = 1_000_000  # not the held-out problems that RL looks at
GAP_PROBLEMS = 64  # one answer each, to compare engine and trainer on


def measure(
    stage_dir: Path,
    *,
    config: EvalConfig,
    source: ProblemSource,
    stream: ProblemStream,
    load: Callable[[str, str], Transformer],
    checkpoint: Callable[[str], Path],
    names: list[str],
    tokenizer: Tokenizer,
    verifiers: Verifiers,
    seed: int,
    recorder: Recorder,
) -> dict[str, Any]:
    """Leaves results.json and traces.json; a checkpoint that is already in results.json is not measured again.

    `load` takes a checkpoint's name and a compute type, `checkpoint` a name: beside its weights it leaves how long the
    model thought where it was right, for the efforts of a chat.
    """
    # a list of the user's own is asked once through: the same problem twice would only narrow the intervals
    n_problems = min(config.problems, len(stream.own_held_out) or config.problems)
    problems = [stream.at(FIRST_MEASURED + i, "held_out") for i in range(n_problems)]
    strangers = [] if stream.own else never_trained(source, config, seed)
    partial_path, traces_path = stage_dir / "results.json", stage_dir / "traces.json"
    results: dict[str, Any] = json.loads(partial_path.read_text()) if partial_path.is_file() else {"checkpoints": {}}
    traces: list[dict[str, Any]] = (
        json.loads(traces_path.read_text()) if traces_path.is_file() else blank_traces(problems, config)
    )
    cut_short = [name for name in config.budget_checkpoints if config.budgets and name in names]
    n_steps = len(names) + len(cut_short)
    for k, name in enumerate(names):
        if name not in results["checkpoints"]:
            model = load(name, "float32")
            result = evaluate(model, tokenizer, problems, config=config, verifiers=verifiers, seed=seed)
            if lengths := measured_lengths(result.right_lengths):
                write_lengths(checkpoint(name), lengths)
            families = dict(result.family)
            if strangers:
                unseen = evaluate(model, tokenizer, strangers, config=config, verifiers=verifiers, seed=seed)
                families |= {family: row | {"held_out": True} for family, row in unseen.family.items()}
            results["checkpoints"][name] = {
                "overall": result.overall,
                "family": families,
                "per_problem": plain_all(result.per_problem),
                "engine_gap": {
                    dtype: engine_gap(load(name, dtype), tokenizer, problems[:GAP_PROBLEMS], config=config, seed=seed)
                    for dtype in ("float32", "bfloat16")
                },
            }
            add_traces(traces, name, result)
            add_gains(results["checkpoints"], over="base", key="gain")
            add_gains(results["checkpoints"], over="student_base", key="gain_over_student_base")
            write_json(traces_path, traces)
            write_json(partial_path, results)
        recorder.step(
            k, n_steps, {"checkpoint": name, "accuracy": results["checkpoints"][name]["overall"]["accuracy"]}
        )
    for k, name in enumerate(cut_short, start=len(names)):
        curves = results.setdefault("budget", {})
        if name not in curves:
            curves[name] = budget_curve(
                load(name, "float32"), tokenizer, problems, config=config, verifiers=verifiers, seed=seed
            )
            write_json(partial_path, results)
        recorder.step(k, n_steps, {"checkpoint": name, "budgets": config.budgets})
    return results


def never_trained(source: ProblemSource, config: EvalConfig, seed: int) -> list[Problem]:
    families = {family: 1.0 for family in NEVER_TRAINED}
    unseen = replace(source, families=families, levels_of={}, instruction_share=0.0)
    return [problem_at(unseen, seed, i, "held_out") for i in range(config.never_trained_problems)]


def blank_traces(problems: list[Problem], config: EvalConfig) -> list[dict[str, Any]]:
    return [
        {"problem": p.prompt, "answer": p.answer, "family": p.family, "by_checkpoint": {}}
        for p in problems[: config.traces]
    ]


def add_traces(traces: list[dict[str, Any]], name: str, result: Result) -> None:
    for trace, (rollout, grade) in zip(traces, result.first_answers, strict=False):
        trace["by_checkpoint"][name] = {
            "thinking": rollout.message.thinking,
            "content": rollout.message.content,
            "correct": grade.accuracy == 1.0,
        }


def add_gains(checkpoints: dict[str, Any], *, over: str, key: str) -> None:
    """Each checkpoint (of the student, over its base) against another on the same problems, with a paired interval."""
    base = checkpoints.get(over)
    for name, entry in checkpoints.items():
        if over == "student_base" and not name.startswith("student"):
            continue
        if base is None or entry is base:
            continue
        pairs = [
            (a, b)
            for a, b in zip(entry["per_problem"], base["per_problem"], strict=True)
            if a is not None and b is not None
        ]
        gain = bootstrap_difference([a for a, _ in pairs], [b for _, b in pairs])
        entry["overall"][key] = {"value": gain.value, "low": gain.low, "high": gain.high}


def write_json(path: Path, content: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(plain_all(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def plain_all(value: Any) -> Any:
    """NaN has no place in JSON: null says that there was nothing to average."""
    if isinstance(value, dict):
        return {key: plain_all(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain_all(item) for item in value]
    return plain(value)
