"""What is printed when the way is walked: the table of checkpoints, one answer worked out, and what to type next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_results(run_dir: Path, console: Console) -> None:
    """Nothing is printed for a run that was not evaluated yet."""
    path = run_dir / "eval" / "results.json"
    if not path.is_file():
        return
    checkpoints = json.loads(path.read_text(encoding="utf-8"))["checkpoints"]
    console.print(results_table(checkpoints))
    traces = json.loads((run_dir / "eval" / "traces.json").read_text(encoding="utf-8"))
    print_conversation(traces, console)
    name = "r1" if "r1" in checkpoints else next(iter(checkpoints))
    console.print(f"\nreport      {escape(str(run_dir / 'report.html'))}", highlight=False)
    console.print(f"talk to it  [bold]abyssal chat {escape(str(run_dir / name))}[/bold]", highlight=False)


def results_table(checkpoints: dict[str, Any]) -> Table:
    table = Table(title="held-out problems", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("checkpoint", "right", "95 %", "cons@k", "thinks", "length", "mixed", "cut off", "MTP kept"):
        table.add_column(column, justify="left" if column == "checkpoint" else "right")
    for name, entry in checkpoints.items():
        row = entry["overall"]
        table.add_row(
            name,
            percent(row["accuracy"]),
            f"{100 * row['ci_low']:.0f} to {100 * row['ci_high']:.0f} %",
            percent(row["cons_at_k"]),
            percent(row["think_share"]),
            f"{row['length']:.0f}",
            percent(row.get("mixed_share")),
            percent(row["truncated_share"]),
            percent(row.get("mtp_acceptance")),
        )
    return table


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def print_conversation(traces: list[dict[str, Any]], console: Console) -> None:
    """The first problem that r1 thought about and got right, or else the first one."""
    shown = [(t, t["by_checkpoint"]["r1"]) for t in traces if "r1" in t["by_checkpoint"]]
    if not shown:
        return
    good = [pair for pair in shown if pair[1]["correct"] and pair[1]["thinking"]]
    trace, said = (good or shown)[0]
    console.print(f"\n[bold cyan]>[/bold cyan] {escape(trace['problem'])}", highlight=False)
    if said["thinking"]:
        console.print(f"[dim]{escape(said['thinking'])}[/dim]", highlight=False)
    console.print(f"[bold]{escape(said['content'])}[/bold]", highlight=False)
