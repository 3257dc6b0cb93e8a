"""`abyssal plan --card 24GB --ram 128GB`: what can be trained, distilled and served on a machine, in words and one
picture.

Owns the words' order on the terminal and the page. Does not own the answers (plan/possible.py) nor the picture
(plan/draw_possible.py).
"""

from __future__ import annotations

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from abyssal.evals.page_tables import table_of
from abyssal.plan.draw_possible import draw_possible
from abyssal.plan.in_words import count_text
from abyssal.plan.possible import HEADINGS, Possible
from abyssal.plan.possible_tasks import TASKS

STYLES = {"yes": "green", "slow": "yellow", "no": "bright_black"}
SIGNS = {"yes": "●", "slow": "◐", "no": "○"}


def print_possible(found: Possible, console: Console) -> None:
    """The table is the picture of a terminal: a row a model, a column a task, a sign that says what the colour says."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for title in ("model", "parameters", *(HEADINGS[task].lower() for task in TASKS)):
        table.add_column(title, justify="right" if title == "parameters" else "left")
    for model in found.models:
        cells = [model.answers[task] for task in TASKS]
        told = [Text(f"{SIGNS[cell.verdict]} {cell.short}", style=STYLES[cell.verdict]) for cell in cells]
        table.add_row(model.name, count_text(model.parameters), *told)
    first, *lines = found.words
    console.print(Text(first, style="bold"), soft_wrap=True)
    for line in lines:
        task, _, said = line.partition(": ")
        console.print(Text.assemble(("  " + task, "bold"), ": ", said), soft_wrap=True)
    console.print()
    console.print(table)
    legend = "● ready to use   ◐ for the patient   ○ no, or nobody would wait"
    console.print(Text(legend, style="dim"))


def possible_section(found: Possible) -> Markup:
    _, *lines = found.words
    said = Markup("").join(Markup("<p><b>{}</b>: {}</p>").format(*line.partition(": ")[::2]) for line in lines)
    rows = [
        [model.name, HEADINGS[task], Markup('<td class="source">{}</td>').format(answer.words)]
        for model in found.models
        for task, answer in model.answers.items()
        if answer.verdict != "no"
    ]
    return Markup(
        '{}<figure class="full drawn">{}</figure><details><summary>Every answer in words</summary>{}</details>'
    ).format(said, Markup(draw_possible(found)), table_of(["", "", ""], rows))
