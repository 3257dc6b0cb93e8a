"""`abyssal plan --search`: the cheapest layouts that fit, and why those beside the best fall out."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from abyssal.commands.plan_tables import cost_text
from abyssal.evals.page_tables import table_of
from abyssal.plan.in_words import bytes_text, hours_text, percent_text, seconds_text
from abyssal.plan.machine_file import MachineSpec
from abyssal.plan.search_layouts import Search, said, search_layouts
from abyssal.plan.training import TrainingPlan
from abyssal.progress import steps_bar
from abyssal.stages.plan_recipe import with_given
from abyssal.stages.planned_work import base_config
from abyssal.stages.recipe import Recipe

TITLES = ("layout", "a step", "MFU", "bubble", "device-h", "cost", "memory", "")


@dataclass(frozen=True, kw_only=True)
class SearchAnswer:
    """For the recipe's pretraining. `asked` is the layout that the recipe has, None where its sizes do not divide."""

    search: Search
    asked: TrainingPlan | None
    tokens: int


def search_answer(recipe: Recipe, machine: MachineSpec, asked: TrainingPlan | None, console: Console) -> SearchAnswer:
    config = recipe.pretrain
    with steps_bar("layouts", console) as on_step:
        search = search_layouts(
            base_config(recipe), machine=with_given(recipe, machine), base=recipe.parallel, row_len=config.row_len,
            batch_rows=config.rows, optimizer=config.optimizer, on_tried=on_step,
        )  # fmt: skip
    return SearchAnswer(search=search, asked=asked, tokens=config.all_rows * config.row_len)


def rows_of(answer: SearchAnswer) -> list[list[str]]:
    """The best few, and the recipe's own beside them."""
    found = [(said(one.plan.layout), one.plan) for one in answer.search.best if one.plan is not None]
    if answer.asked is not None:
        found.append((f"the recipe’s: {said(answer.asked.layout)}", answer.asked))
    rows = []
    for name, plan in found:
        cost = plan.for_tokens(answer.tokens)
        rows.append(
            [
                name,
                seconds_text(plan.step_seconds),
                percent_text(plan.mfu),
                percent_text(plan.step.bubble_seconds / plan.step_seconds),
                hours_text(cost.device_hours),
                cost_text(cost.cost_usd),
                bytes_text(plan.peak_memory_bytes),
                "fits" if plan.fits else "does not fit",
            ]
        )
    return rows


def print_search(answer: SearchAnswer, console: Console) -> None:
    search = answer.search
    console.print(f"\n[bold]layouts[/bold]: {headline(search)}", highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for title in TITLES:
        table.add_column(title, justify="left" if title in ("layout", "") else "right", no_wrap=title != "layout")
    for k, row in enumerate(rows_of(answer)):
        table.add_row(*row, style="bold" if k == 0 else "")
    console.print(table)
    console.print("\nbeside the best", style="bold")
    beside = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    for one in search.fell_out:
        beside.add_row(Text(f"  {one.change}"), Text(one.why, style="dim"))
    console.print(beside)


def headline(search: Search) -> str:
    tried = f"{search.n_tried:,} tried, {search.n_fitting:,} fit"
    return tried if search.fits else f"{tried}; none does, here is what needs the least memory"


def search_section(answer: SearchAnswer) -> Markup:
    search = answer.search
    beside = table_of(
        ["changed from the best", ""],
        [[one.change, Markup('<td class="source">{}</td>').format(one.why)] for one in search.fell_out],
    )
    return Markup(
        '<p class="note">{}. Searched: the ways to cut the model, what ZeRO shares out, recomputation, schedule, rows '
        "of a micro-batch. The first is no worse than any layout one change away.</p>{}<h3>Why its neighbours fall out"
        "</h3>{}"
    ).format(headline(search), table_of(TITLES, [in_two_lines(row) for row in rows_of(answer)]), beside)


def in_two_lines(row: list[str]) -> list[str | Markup]:
    """How the model is cut, and in small print the rest."""
    cut, zero, rest = row[0].partition(" zero=")
    return [Markup("{} <small>{}</small>").format(cut, (zero + rest).strip()), *row[1:]]
