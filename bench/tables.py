"""Write the README's tables again from committed results: python bench/tables.py [RUN_DIR]

With a run directory, its evaluation, metrics and recipe are first copied to bench/results/<run>/, so that every number in
the README has its log in the repository.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
KEPT = ("recipe.toml", "eval/results.json", "eval/traces.json")


def keep(run_dir: Path) -> None:
    """Copy what the tables and a reader need: recipe, evaluation, metrics and done.json of every stage."""
    target = RESULTS / run_dir.name
    shutil.rmtree(target, ignore_errors=True)
    metrics = [p.relative_to(run_dir).as_posix() for name in ("metrics.jsonl", "done.json", "log.txt") for p in run_dir.rglob(name)]
    for name in (*KEPT, *metrics):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run_dir / name, target / name)


def laptop_table() -> list[str]:
    source = RESULTS / "laptop"
    checkpoints = json.loads((source / "eval" / "results.json").read_text(encoding="utf-8"))["checkpoints"]
    lines = ["| checkpoint | right | 95 % interval | thinks | length | mixed languages | MTP guess kept | parameters (active) |",
             "|---|---|---|---|---|---|---|---|"]
    for name, entry in checkpoints.items():
        row = entry["overall"]
        lines.append(
            f"| `{name}` | {share(row['accuracy'])} | {share(row['ci_low'])} to {share(row['ci_high'])} "
            f"| {share(row['think_share'])} | {row['length']:.0f} tokens | {share(row.get('mixed_share'))} "
            f"| {share(row.get('mtp_acceptance'))} | {millions(row['total_params'])} ({millions(row['active_params'])}) |")
    seconds = {p.parent.name: json.loads(p.read_text())["seconds"] for p in source.glob("*/done.json")
               if "seconds" in json.loads(p.read_text())}
    first = next(iter(checkpoints.values()))["overall"]
    lines += ["", f"{first['n_problems']} problems, {first['k']} answers each at temperature 1, interval by bootstrap over problems. "
              f"The way took {sum(seconds.values()) / 60:.0f} minutes: "
              + ", ".join(f"{stage} {value / 60:.1f}" for stage, value in ordered(seconds)) + "."]
    return lines


def ordered(seconds: dict[str, float]) -> list[tuple[str, float]]:
    order = ("tokenize", "pretrain", "zero", "cold_start", "reason", "reject", "align", "distil", "eval", "report")
    return [(stage, seconds[stage]) for stage in order if stage in seconds]


def bench_table() -> list[str]:
    """The last run of each benchmark."""
    lines = ["| what | size | precision | threads | Abyssal tokens/s | transformers tokens/s | ratio |", "|---|---|---|---|---|---|---|"]
    for name in ("train_step", "generate"):
        path = RESULTS / f"{name}.jsonl"
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines()[-1:]:
                lines += bench_rows(name, json.loads(line))
    return lines


def bench_rows(name: str, run: dict) -> list[str]:
    rows = []
    for row in run["rows"]:
        what = "training step" if name == "train_step" else f"generation, batch {row['batch']}"
        rows.append(f"| {what} | {row['size']} | {run['dtype']} | {run['threads']} | {row['ours']:,.0f} | {row['theirs']:,.0f} | {row['ratio']:.2f} |")
    return rows


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def millions(count: int) -> str:
    return f"{count / 1e6:.2f}M"


def main() -> None:
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]))
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, make in (("laptop", laptop_table), ("bench", bench_table)):
        table = "\n".join(make())
        text = re.sub(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
