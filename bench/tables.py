"""Write the README's tables again from committed results: python bench/tables.py [RUN_DIR]

With a run directory, its evaluation, metrics and recipe are first copied to bench/results/<run>/, so that every number
in the README has its log in the repository.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ablation_table import ablation_lines

from abyssal.commands.plan_tables import published_rows
from abyssal.plan.every_published import every_published
from abyssal.record import read_steps, seconds_of_work

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
STAGES = (
    "tokenize", "pretrain", "zero", "cold_start", "reason", "reject", "align",
    "distil", "student_rl", "on_policy", "eval",
)  # fmt: skip
# the student's arms: checkpoint -> what it learned from, and the stages whose steps it took
ARMS = {
    "student_base": ("text and problems alone", ("distil/base",)),
    "student": ("SFT on r1's traces", ("distil/traces", "distil")),
    "student_rl": ("RL by rules", ("student_rl",)),
    "student_opd": ("r1's distribution on its own answers", ("on_policy",)),
}
KEPT = ("recipe.toml", "report.html", "eval/results.json", "eval/traces.json")


def keep(run_dir: Path) -> None:
    """Copy what the tables and a reader need: recipe, evaluation, metrics and done.json of every stage."""
    target = RESULTS / run_dir.name
    shutil.rmtree(target, ignore_errors=True)
    logs = ("metrics.jsonl", "samples.jsonl", "done.json", "log.txt")
    metrics = [path.relative_to(run_dir).as_posix() for name in logs for path in run_dir.rglob(name)]
    for name in (*KEPT, *metrics):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run_dir / name, target / name)


def run_table(run: str) -> list[str]:
    source = RESULTS / run
    checkpoints = json.loads((source / "eval" / "results.json").read_text(encoding="utf-8"))["checkpoints"]
    titles = (
        "checkpoint", "right", "95 % interval", "thinks", "length", "right / length when it thinks", "mixed languages",
        "MTP guess kept", "parameters",
    )  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, entry in checkpoints.items():
        row = entry["overall"]
        thinking = (
            f"{share(row['accuracy_thinking'])} / {row['length_thinking']:.0f}" if "length_thinking" in row else "–"
        )
        lines.append(
            f"| `{name}` | {share(row['accuracy'])} | {share(row['ci_low'])} to {share(row['ci_high'])} "
            f"| {share(row['think_share'])} | {row['length']:.0f} tokens | {thinking} "
            f"| {share(row.get('mixed_share'))} "
            f"| {share(row.get('mtp_acceptance'))} "
            f"| {millions(row['total_params'])}, active {millions(row['active_params'])} |"
        )
    first = next(iter(checkpoints.values()))["overall"]
    unseen = ", ".join(f"`{name}` {share(e['family']['backward']['accuracy'])}" for name, e in checkpoints.items())
    lines += [
        "",
        f"{first['n_problems']} problems, {first['k']} answers each at temperature 1, interval by bootstrap over "
        f"problems. {times(source)}",
        "",
        f"The family that no stage trains on (chains from right to left; chance is 20 %): {unseen}.",
    ]
    return lines


def times(source: Path) -> str:
    seconds = {stage: stage_seconds(source, stage) for stage in STAGES if (source / stage).is_dir()}
    threads = json.loads((source / "pretrain" / "done.json").read_text(encoding="utf-8"))["threads"]
    cores = "one core" if threads == 1 else f"{threads} cores"
    each = ", ".join(f"{stage} {value / 60:.1f}" for stage, value in seconds.items())
    return f"Without set-up the way took {sum(seconds.values()) / 60:.0f} minutes ({each}) on {cores}."


def stage_seconds(source: Path, stage: str) -> float:
    """Over all of a stage's parts and sessions; each step records its own time."""
    return sum(
        json.loads(line)["time_s"]
        for path in (source / stage).rglob("metrics.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    )


def arms_table() -> list[str]:
    """The student's arms of runs/laptop_full.toml in equal seconds."""
    source = RESULTS / "laptop_full"
    checkpoints = json.loads((source / "eval" / "results.json").read_text(encoding="utf-8"))["checkpoints"]
    lines = ["| student | learned from | steps | seconds of work | right | 95 % interval |", "|---" * 6 + "|"]
    for name, (learned_from, stages) in ARMS.items():
        if name not in checkpoints:
            continue
        row, steps = checkpoints[name]["overall"], [read_steps(source / stage / "metrics.jsonl") for stage in stages]
        lines.append(
            f"| `{name}` | {learned_from} | {len(steps[-1]):,} | {sum(map(seconds_of_work, steps)):.0f} "
            f"| {share(row['accuracy'])} | {share(row['ci_low'])} to {share(row['ci_high'])} |"
        )
    return lines


def budget_table() -> list[str]:
    """pass@1 of runs/laptop_full.toml with the thinking cut after so many tokens."""
    results = json.loads((RESULTS / "laptop_full" / "eval" / "results.json").read_text(encoding="utf-8"))
    curves = results.get("budget", {})
    budgets = sorted({point["budget"] for curve in curves.values() for point in curve})
    lines = [f"| tokens of thinking | {' | '.join(map(str, budgets))} |", "|---" * (len(budgets) + 1) + "|"]
    for name, curve in curves.items():
        at = {point["budget"]: point for point in curve}
        cells = [
            f"{share(at[b]['accuracy'])} ({100 * at[b]['ci_low']:.0f}–{100 * at[b]['ci_high']:.0f})" if b in at else "–"
            for b in budgets
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


def bench_table() -> list[str]:
    """The last line of each measurement; a later one of the same kind replaces an earlier one."""
    titles = (
        "what",
        "size",
        "precision",
        "threads",
        "Abyssal tokens/s",
        "transformers tokens/s",
        "ratio",
        "range of pairs",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in _latest("train_step", "dtype", "size"):
        lines.append(_speeds("training step, 16 x 256", row))
    return lines


def engine_table() -> list[str]:
    """The last line of each measurement of the engine."""
    rows = _latest("engine", "dtype", "size", "what", "ours", "batch")
    if not rows:
        return ["Not measured yet."]
    rows.sort(key=lambda row: (row["dtype"] != "float32", int(row["size"][:-1]), row["what"] != "tokens", row["batch"]))
    titles = ("what", "size", "precision", "threads", "Abyssal", "transformers", "ratio", "range of pairs")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        if row["what"] == "tokens":
            how = "" if row["ours"] == "plain" else f", {row['ours']}"
            lines.append(_speeds(f"{row['batch']} request{'s' * (row['batch'] > 1)}{how}, tokens/s", row))
            continue
        ours, theirs = (statistics.median(row[f"{who}_ms"]) for who in ("ours", "theirs"))
        lines.append(
            f"| first token of {row['prompt_len']}, {row['ours']}, ms | {row['size']} | {row['dtype']} "
            f"| {row['threads']} | {ours:,.1f} | {theirs:,.1f} | **{row['ratio']:.2f}** "
            f"| {row['ratio_min']:.2f} to {row['ratio_max']:.2f} |"
        )
    return lines


def plan_table() -> list[str]:
    """The last line of each run that was planned and then measured."""
    rows = _latest("plan", "run")
    if not rows:
        return ["Not measured yet."]
    lines = ["| run | planned, measured | off | planned, measured peak | off |", "|---|---|---:|---|---:|"]
    for row in rows:
        figures = []
        for what, unit, name in (("seconds", 1e-3, "ms"), ("peak_bytes", 1e6, "MB")):
            planned, measured = row[f"planned_{what}"], row[f"measured_{what}"]
            off = f"{100 * planned / measured - 100:+.1f} %"
            figures.append(f"{planned / unit:,.0f}, {measured / unit:,.0f} {name} | {off}")
        lines.append(f"| {row['run']} | {' | '.join(figures)} |")
    return lines


def _latest(name: str, *keys: str) -> list[dict[str, Any]]:
    """Of lines that agree in these, the last."""
    path = RESULTS / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def _speeds(what: str, row: dict[str, Any]) -> str:
    return (
        f"| {what} | {row['size']} | {row['dtype']} | {row['threads']} | {max(row['ours_tokens_per_s']):,.0f} "
        f"| {max(row['theirs_tokens_per_s']):,.0f} | **{row['ratio']:.2f}** "
        f"| {row['ratio_min']:.2f} to {row['ratio_max']:.2f} |"
    )


def llama_cpp_table() -> list[str]:
    """The last line of each precision and number of requests."""
    rows = _latest("llama_cpp", "model", "precision", "batch")
    if not rows:
        return ["Not measured yet."]
    titles = ("requests", "model", "precision", "threads", "Abyssal", "llama.cpp", "ratio", "range of pairs")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    named = [row | {"size": row["model"], "dtype": row["precision"]} for row in rows]
    return lines + [_speeds(f"{row['batch']}, tokens/s", row) for row in named]


def grpo_table() -> list[str]:
    """The last line of each size, precision and thread count."""
    path = RESULTS / "grpo.jsonl"
    if not path.is_file():
        return ["Not measured yet."]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    titles = ("GRPO step", "precision", "threads", "Abyssal samples/s", "TRL samples/s", "ratio", "range of pairs")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in {(row["size"], row["dtype"], row["threads"]): row for row in rows}.values():
        lines.append(
            f"| {row['size']}, {row['problems']} x {row['answers']} answers of {row['new_tokens']} tokens "
            f"| {row['dtype']} | {row['threads']}, {row['clock']} time | {max(row['ours_samples_per_s']):.1f} "
            f"| {max(row['theirs_samples_per_s']):.1f} | **{row['ratio']:.2f}** "
            f"| {row['ratio_min']:.2f} to {row['ratio_max']:.2f} |"
        )
    return lines


def load_table() -> list[str]:
    """The last line of each shape: the fastest run and the highest peaks."""
    path = RESULTS / "load.jsonl"
    if not path.is_file():
        return ["Not measured yet."]
    titles = ("BF16 checkpoint", "shards", "who", "loaded", "and every weight read", "peak", "of its own", "allowed")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in {row["preset"]: row for row in rows}.values():
        for who in ("abyssal", "transformers"):
            loaded, read = (min(run[key] for run in row["runs"][who]) for key in ("seconds", "seconds_with_touch"))
            peak, own = (max(run[key] for run in row["runs"][who]) / 1e9 for key in ("peak", "peak_own"))
            lines.append(
                f"| `{row['preset']}`, {row['bytes'] / 1e9:.1f} GB | {row['shard'] / 1e9:.1f} GB | {who} "
                f"| {loaded:.0f} s | {read:.0f} s | {peak:.1f} GB | {own:.1f} GB | {row['at_most'] / 1e9:.1f} GB |"
            )
    return lines


def quantize_table() -> list[str]:
    """The last line of each way to keep each checkpoint's weights."""
    path = RESULTS / "quantize.jsonl"
    if not path.is_file():
        return ["Not measured yet."]
    titles = ("checkpoint", "weights", "products", "perplexity", "against BF16", "in memory", "tokens/s at batch 1")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = {(row["checkpoint"], row["arm"]): row for row in rows}
    arms = ("FP32", "BF16", "FP8", "int8", "int4", "int4, scaled")
    checkpoints = dict.fromkeys(row["checkpoint"] for row in rows)
    for checkpoint, arm in ((c, a) for c in checkpoints for a in arms if (c, a) in last):
        row = last[checkpoint, arm]
        change = 100 * (row["perplexity"] / last[checkpoint, "BF16"]["perplexity"] - 1)
        lines.append(
            f"| `{checkpoint}` | {arm} | {row['computes_in']} | {row['perplexity']:.2f} "
            f"| {'–' if arm == 'BF16' else f'{change:+.1f} %'} | {row['weight_bytes'] / 1e6:.1f} MB "
            f"| {row['tokens_per_s']:.1f} |"
        )
    return lines


def published_table() -> list[str]:
    """Planned anew: `abyssal plan --published` prints the same."""
    titles = ("what", "published", "planned", "deviation", "published in, and what the plan was given")
    lines = [f"| {' | '.join(titles)} |", "|---|---:|---:|---:|---|"]
    return lines + [f"| {' | '.join(row)} |" for row in published_rows(every_published())]


def ablation_tables() -> list[str]:
    return ablation_lines(RESULTS / "ablations")


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def millions(count: int) -> str:
    return f"{count / 1e6:.2f}M"


TABLES = {
    "laptop": partial(run_table, "laptop"),
    "laptop_full": partial(run_table, "laptop_full"),
    "arms": arms_table,
    "budget": budget_table,
    "bench": bench_table,
    "engine": engine_table,
    "llama_cpp": llama_cpp_table,
    "plan": plan_table,
    "grpo": grpo_table,
    "load": load_table,
    "quantize": quantize_table,
    "ablations": ablation_tables,
    "published": published_table,
}


def main() -> None:
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]))
    write_tables(tuple(TABLES))


def write_tables(names: Sequence[str]) -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name in names:
        if f"<!-- table: {name} -->" not in text:
            continue
        table = "\n".join(TABLES[name]())
        before, rest = text.split(f"<!-- table: {name} -->\n")
        text = f"{before}<!-- table: {name} -->\n{table}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
