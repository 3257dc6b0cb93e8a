"""What a machine can do as one picture: a row a model, a column a task, and in each cell whether and how fast.

Numbers in, text out: no library, no file. It stands by itself or within a page, in light and dark; a sign says the same
as the colour.
"""

from __future__ import annotations

from html import escape

from abyssal.plan.in_words import count_text
from abyssal.plan.possible import HEADINGS, Model, Possible
from abyssal.plan.possible_tasks import TASKS, Answer, Task, Verdict

NOTES: dict[Task, str] = {
    "pretrain": "20 tokens a parameter",
    "fine_tune": "10M tokens",
    "distil": "R1's 800K traces, twice",
    "reinforce": "500 steps of 256 answers",
    "serve": "one user",
}
LEGEND: dict[Verdict, str] = {"yes": "ready to use", "slow": "for the patient", "no": "no, or nobody would wait"}
LIGHT = """--paper:#fff;--ink:#18212c;--dim:#5d6977;--rule:#e4e7ea;--yes:#d8efe4;--yes-ink:#0d5a41;--slow:#fbeccb;
--slow-ink:#7a4d06;--no:#f3f4f5;--no-ink:#7b8794"""
DARK = """--paper:#131a23;--ink:#e4eaf1;--dim:#98a5b4;--rule:#263140;--yes:#153d31;--yes-ink:#7fe0bf;--slow:#43340f;
--slow-ink:#f2cf7a;--no:#1a232e;--no-ink:#7f8d9d"""
NAME, CELL, ROW, HEAD, MARGIN = 190, 156, 40, 96, 20  # pixels


def draw_possible(possible: Possible) -> str:
    width = 2 * MARGIN + NAME + CELL * len(TASKS)
    height = HEAD + ROW * len(possible.models) + 44
    title = f"What {possible.machine} can do"
    parts = [
        f'<rect class="paper" width="{width}" height="{height}" rx="8"/>',
        _text(MARGIN, 30, title, "title"),
    ]
    for column, task in enumerate(TASKS):
        x = MARGIN + NAME + CELL * column
        parts += [_text(x + 8, 62, HEADINGS[task], "heading"), _text(x + 8, 79, NOTES[task], "note")]
    for row, model in enumerate(possible.models):
        parts += _row(model, y=HEAD + ROW * row)
    parts += _legend(y=HEAD + ROW * len(possible.models) + 24)
    return _svg(parts, label=" ".join(possible.words), width=width, height=height)


def _row(model: Model, *, y: int) -> list[str]:
    size = count_text(model.parameters)
    if model.active != model.parameters:
        size += f", {count_text(model.active)} active"
    parts = [
        f'<line class="rule" x1="{MARGIN}" x2="{MARGIN + NAME + CELL * len(TASKS)}" y1="{y}" y2="{y}"/>',
        _text(MARGIN, y + 17, model.name, "name"),
        _text(MARGIN, y + 31, size, "note"),
    ]
    for column, task in enumerate(TASKS):
        parts.append(_cell(model.answers[task], x=MARGIN + NAME + CELL * column, y=y))
    return parts


def _cell(answer: Answer, *, x: int, y: int) -> str:
    box = f'<rect class="{answer.verdict}" x="{x + 2}" y="{y + 2}" width="{CELL - 4}" height="{ROW - 4}" rx="4"/>'
    sign = _sign(answer.verdict, x + 15, y + ROW / 2)
    middle = y + ROW / 2 + (-2 if answer.detail else 4)
    text = _text(x + 27, middle, answer.short, f"in-{answer.verdict}")
    if answer.detail:
        text += _text(x + 27, middle + 13, answer.detail, "note")
    return f"<g><title>{escape(answer.words)}</title>{box}{sign}{text}</g>"


def _sign(verdict: Verdict, x: float, y: float) -> str:
    """A full circle, a half one, an empty one."""
    ring = f'<circle class="ring {verdict}-sign" cx="{x}" cy="{y}" r="4.5"/>'
    if verdict == "no":
        return ring
    if verdict == "yes":
        return f'<circle class="full {verdict}-sign" cx="{x}" cy="{y}" r="4.5"/>'
    return f'{ring}<path class="full {verdict}-sign" d="M{x} {y - 4.5}a4.5 4.5 0 0 0 0 9z"/>'


def _legend(*, y: float) -> list[str]:
    parts, x = [], float(MARGIN)
    for verdict, words in LEGEND.items():
        parts += [_sign(verdict, x + 5, y - 4), _text(x + 16, y, words, "note")]
        x += 34 + 6.4 * len(words)
    return [*parts, _text(x + 8, y, "RAM: experts lie there; the last figure is tokens of context", "note")]


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(text)}</text>'


def _svg(parts: list[str], *, label: str, width: int, height: int) -> str:
    style = (
        f".possible{{{LIGHT};font-family:system-ui,sans-serif;font-size:12px}}"
        f"@media(prefers-color-scheme:dark){{:root:not([data-theme=light]) .possible,.possible:root{{{DARK}}}}}"
        f":root[data-theme=dark] .possible{{{DARK}}}"
        ".possible .paper{fill:var(--paper)}.possible text{fill:var(--ink)}"
        ".possible .title{font-size:16px;font-weight:600}"
        ".possible .heading,.possible .name{font-weight:600}.possible .note{fill:var(--dim);font-size:11px}"
        ".possible .rule{stroke:var(--rule)}.possible .ring{fill:none;stroke-width:1.4}"
    )
    for verdict in LEGEND:
        style += (
            f".possible rect.{verdict}{{fill:var(--{verdict})}}.possible .in-{verdict}{{fill:var(--{verdict}-ink)}}"
            f".possible .full.{verdict}-sign{{fill:var(--{verdict}-ink)}}"
            f".possible .ring.{verdict}-sign{{stroke:var(--{verdict}-ink)}}"
        )
    return (
        f'<svg class="possible" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(label)}"><style>{style}</style>{"".join(parts)}</svg>'
    )
