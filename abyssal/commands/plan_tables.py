"""A plan on the terminal: stages in a table, then where the longest one's step and the fullest rank's memory go.

Owns what is printed and in which order. Does not own the numbers (plan/, stages/plan_recipe.py) nor the page
(plan_page.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from abyssal.plan.in_words import bytes_text, count_text, hours_text, percent_text, seconds_text, usd_text
from abyssal.plan.published import Published
from abyssal.plan.stage_plan import RecipePlan, StagePlan

NOTHING = "–"
WIDE = 100  # characters of a terminal that has room for every column
BAR = 28  # characters of a part that is the whole
COLOURS = ("blue", "dark_orange3", "green4", "magenta", "red", "bright_black")


def print_plan(plan: RecipePlan, console: Console) -> None:
    console.print(Text.assemble((plan.name, "bold"), f" on {plan.machine}"), highlight=False)
    console.print(f"[dim]{plan.machine_note}[/dim]", highlight=False, soft_wrap=True)
    console.print()
    console.print(stage_table(plan, width=console.width))
    longest, fullest = plan.longest, plan.fullest
    print_parts(f"a step of {longest.stage}", longest.step_seconds_by_part, seconds_text, console)
    rank = max(range(len(fullest.rank_bytes)), key=lambda r: fullest.rank_bytes[r])
    of = f" rank {rank} of {len(fullest.rank_bytes)}" if len(fullest.rank_bytes) > 1 else " the device"
    room = bytes_text(fullest.memory_limit_bytes)
    print_parts(
        f"memory of {fullest.stage},{of}", fullest.memory_bytes_by_part[rank], bytes_text, console, f" of {room}"
    )
    console.print()
    for label, stage in {"bottleneck": longest, "memory": fullest}.items():
        said = f"{stage.bottleneck}; {stage.advice}" if label == "bottleneck" else verdict(stage)
        told = Text.assemble((label, "bold"), f" ({stage.stage}): {said.rstrip('; ')}")
        console.print(told, highlight=False, soft_wrap=True)
    notes = [f"given, not planned: {plan.given_are}"] if plan.given_device_hours else []
    notes += [f"assumed: {line}" for line in dict.fromkeys(line for stage in plan.stages for line in stage.assumed)]
    for note in notes:
        console.print(Text(note, style="dim"), soft_wrap=True)


def stage_table(plan: RecipePlan, *, width: int) -> Table:
    """Columns that a narrow terminal has no room for are left out."""
    titles = ["stage", "steps", "tokens", "a step", "tokens/s", "MFU", "time", "device-h", "cost", "memory", ""]
    left_out = {"steps", "tokens/s"} if width < WIDE else set()
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for title in titles:
        if title not in left_out:
            table.add_column(title, justify="left" if title in ("stage", "") else "right", no_wrap=True)

    def row(cells: dict[str, str | Text], style: str = "") -> None:
        table.add_row(*(cells.get(title, "") for title in titles if title not in left_out), style=style)

    for stage in plan.stages:
        row(
            {
                "stage": stage.stage,
                "steps": f"{stage.n_steps:,.0f}",
                "tokens": count_text(stage.tokens),
                "a step": seconds_text(stage.step_seconds),
                "tokens/s": count_text(stage.tokens_per_second),
                "MFU": NOTHING if stage.mfu is None else percent_text(stage.mfu),
                "time": seconds_text(stage.seconds),
                "device-h": hours_text(stage.device_hours),
                "cost": cost_text(stage.cost_usd),
                "memory": bytes_text(stage.peak_memory_bytes),
                "": Text("fits", style="green") if stage.fits else Text("does not fit", style="bold red"),
            }
        )
    if plan.given_device_hours:
        row({"stage": "given", "device-h": hours_text(plan.given_device_hours), "cost": cost_text(plan.given_cost_usd)})
    if len(plan.stages) > 1 or plan.given_device_hours:
        whole = plan.whole
        hours, cost = hours_text(whole.device_hours), cost_text(whole.cost_usd)
        row({"stage": "all", "time": seconds_text(whole.seconds), "device-h": hours, "cost": cost}, style="bold")
    return table


def cost_text(cost_usd: float | None) -> str:
    return NOTHING if cost_usd is None else usd_text(cost_usd)


def print_parts(
    title: str, parts: Mapping[str, float], text: Callable[[float], str], console: Console, of: str = ""
) -> None:
    """Parts of a whole as lines with bars, the largest first; what is nothing is left out."""
    whole = sum(parts.values())
    console.print(f"\n[bold]{title}[/bold]: {text(whole)}{of}", highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_column()
    for k, (name, value) in enumerate(sorted(parts.items(), key=lambda part: -part[1])):
        if value > 0:
            share = value / whole
            bar = Text("█" * max(1, round(BAR * share)), style=COLOURS[k % len(COLOURS)])
            table.add_row(f"  {name}", text(value), bar.append(f" {percent_text(share)}", style="dim"))
    console.print(table)


def verdict(stage: StagePlan) -> str:
    peak, limit = bytes_text(stage.peak_memory_bytes), bytes_text(stage.memory_limit_bytes)
    if stage.fits:
        return f"it fits, {peak} of {limit} on the fullest device"
    return f"it does not fit: {peak} of {limit} on the fullest device; {stage.advice}"


def print_published(lines: Sequence[Published], console: Console) -> None:
    """Published, planned, deviation, and by number where it was published. Arithmetic must be exact; what was measured
    is shown with its miss."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for title in ("", "published", "planned", "deviation", ""):
        table.add_column(title, justify="right" if title else "left", no_wrap=bool(title))
    sources = list(dict.fromkeys(line.source for line in lines))
    for line in lines:
        name = Text(line.name)
        if line.inputs:
            name.append(f"; given: {line.inputs}", style="dim")
        number = Text(f"[{sources.index(line.source) + 1}]", style="dim")
        table.add_row(name, with_unit(line.published, line), with_unit(line.planned, line), deviation_of(line), number)
    console.print(table)
    for k, source in enumerate(sources, start=1):
        console.print(Text(f"[{k}] {source}", style="dim"), soft_wrap=True)


def published_rows(lines: Sequence[Published]) -> list[list[str]]:
    """What, published, planned, deviation, source and what was given: as the README has them."""
    return [
        [
            line.name,
            with_unit(line.published, line),
            with_unit(line.planned, line),
            deviation_of(line),
            f"{line.source}; given: {line.inputs}" if line.inputs else line.source,
        ]
        for line in lines
    ]


def with_unit(value: float, line: Published) -> str:
    """In the source's own unit and with its own figures."""
    number = f"{value:,.{line.digits}f}" if line.digits or abs(value) >= 1000 else f"{value:,.4g}"
    return f"${number}" if line.unit == "USD" else f"{number} {line.unit}".strip()


def deviation_of(line: Published) -> str:
    if line.kind == "arithmetic":
        return "exact" if line.is_exact else f"NOT exact: {100 * line.deviation:+.4f} %"
    return f"{100 * line.deviation:+.1f} %"
