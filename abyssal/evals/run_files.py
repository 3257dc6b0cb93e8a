"""Read what a run has left so far: metrics, samples, results, traces, recipe. Missing files are simply not there yet.

Owns the order in which stages and checkpoints are told. Does not own how they are written (record.py, evals/tasks.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abyssal.record import seconds_of_work

STAGES = (
    "tokenize", "pretrain", "extend", "zero", "cold_start", "reason", "reject", "align",
    "distil", "student_rl", "on_policy", "eval",
)  # fmt: skip
CHECKPOINTS = ("base", "zero", "dev1", "dev2", "dev3", "r1", "student_base", "student", "student_rl", "student_opd")


@dataclass(frozen=True, kw_only=True)
class StageFiles:
    """One stage: its steps in order, its samples, and done.json once it is through."""

    name: str
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    done: dict[str, Any] | None = None

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) wherever `key` was measured."""
        return [
            (float(entry.get("step", place)), float(entry[key]))
            for place, entry in enumerate(self.metrics)
            if isinstance(entry.get(key), int | float)
        ]

    def total(self, key: str) -> float | None:
        """What done.json says of the whole stage, else the sum over its steps; None if neither knows."""
        if self.done is not None and isinstance(self.done.get(key), int | float):
            return float(self.done[key])
        points = self.series(key)
        return sum(value for _, value in points) if points else None

    def worked_s(self) -> float:
        """Seconds of its steps without the measuring inside them."""
        return seconds_of_work(entry for entry in self.metrics if isinstance(entry.get("time_s"), int | float))


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """A run directory as far as it has come."""

    name: str
    recipe: str = ""
    written_at: float = 0.0  # seconds since 1970, of the newest file read
    stages: list[StageFiles] = field(default_factory=list)
    checkpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    traces: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)  # what became of the documents; runs before it have none
    needles: dict[str, Any] = field(default_factory=dict)  # extend/needle.json
    budget: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # checkpoint -> points of its curve

    def overall(self, checkpoint: str) -> dict[str, Any]:
        return _dict(self.checkpoints.get(checkpoint, {}).get("overall"))


def read_run(run_dir: Path) -> RunFiles:
    """Everything the report shows. Only a directory that is not there at all is an error."""
    if not run_dir.is_dir():
        raise FileNotFoundError(f"no run at {run_dir}; give the folder that `abyssal run` wrote to")
    names = {path.parent.relative_to(run_dir).as_posix() for path in run_dir.glob("*/metrics.jsonl")}
    names |= {path.parent.relative_to(run_dir).as_posix() for path in run_dir.glob("*/*/metrics.jsonl")}
    names |= {path.parent.name for path in run_dir.glob("*/done.json")}
    recipe = run_dir / "recipe.toml"
    results = _dict(_json(run_dir / "eval" / "results.json"))
    checkpoints = {str(name): _dict(entry) for name, entry in _dict(results.get("checkpoints")).items()}
    traces = _json(run_dir / "eval" / "traces.json")
    files = [recipe, *run_dir.glob("*/*.json*"), *run_dir.glob("*/*/metrics.jsonl")]
    return RunFiles(
        name=run_dir.resolve().name,
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.exists() else "",
        written_at=max((path.stat().st_mtime for path in files if path.exists()), default=0.0),
        stages=[_stage(run_dir / name, name) for name in in_order(names, STAGES)],
        checkpoints={name: checkpoints[name] for name in in_order(checkpoints, CHECKPOINTS)},
        needles=_dict(_json(run_dir / "extend" / "needle.json")),
        traces=_dicts(traces),
        budget={str(name): _dicts(points) for name, points in _dict(results.get("budget")).items()},
        data=_dict(_json(run_dir / "tokenize" / "data_report.json")),
    )


def in_order(names: set[str] | dict[str, Any], order: tuple[str, ...]) -> list[str]:
    """Those of `order` first, each followed by its own branches (distil, distil/rl_only), then strangers by name."""

    def key(name: str) -> tuple[int, str]:
        head = name.split("/")[0]
        return (order.index(head) if head in order else len(order), name)

    return sorted(names, key=key)


def _stage(stage_dir: Path, name: str) -> StageFiles:
    done = _json(stage_dir / "done.json")
    return StageFiles(
        name=name,
        metrics=_json_lines(stage_dir / "metrics.jsonl"),
        samples=_json_lines(stage_dir / "samples.jsonl"),
        done=_dict(done) if done is not None else None,
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (FileNotFoundError, ValueError):  # not there yet, or being written
        return None


def _json_lines(path: Path) -> list[dict[str, Any]]:
    entries = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):  # not splitlines: U+2028 inside a sample is no end of line
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a run under way
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
