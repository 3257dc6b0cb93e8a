"""Wholes and their parts -> SVG text: a bar a row, a colour a part, a line where there is no more room.

Owns this one drawing. Scales, text and frame are charts.py's; colours are the page's variables, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from abyssal.evals.charts import N_COLOURS, linear_scale, svg_chart, svg_text


class PartRow(NamedTuple):
    name: str
    parts: Mapping[str, float]  # name of a part -> how much of it
    said: str = ""  # at the end of the bar; "": the whole


class Line(NamedTuple):
    """Drawn across all bars."""

    value: float
    name: str


def part_bars(
    rows: Sequence[PartRow],
    *,
    title: str,
    text: Callable[[float], str],
    limit: Line | None = None,
    ticks: bool = True,
    width: int = 1040,
    row_height: int = 24,
) -> str:
    """`text` says a value with its unit. A part has the same colour in every row; what is nothing anywhere is left
    out, of the legend too."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row.parts) if _anywhere(rows, name)]
    if not names:
        return ""
    left = 14 + 6.4 * max(len(row.name) for row in rows)
    right, top = width - 86, 52 if limit is None else 66
    bottom = top + row_height * len(rows)
    most = max(sum(row.parts.values()) for row in rows)
    scale = linear_scale(0.0, max(most, limit.value if limit else 0.0) * 1.02, left, right, n_ticks=5)
    parts = [svg_text(8, 16, title, "title"), legend(names, left=8, y=36)]
    for tick in scale.ticks if ticks else ():
        x = scale.to_pixel(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(svg_text(x, bottom + 14, text(tick) if tick else "0", "tick", anchor="middle"))
    for place, row in enumerate(rows):
        y, start, whole = top + row_height * place + 3, 0.0, sum(row.parts.values())
        parts.append(svg_text(left - 8, y + row_height / 2 + 1, row.name, "name", anchor="end"))
        for name in names:
            value = row.parts.get(name, 0.0)
            if value > 0:
                x0, x1 = scale.to_pixel(start), scale.to_pixel(start + value)
                note = f"{row.name}: {name} {text(value)}, {100 * value / whole:.1f} % of {text(whole)}"
                box = f'x="{x0:.1f}" y="{y}" width="{max(0.6, x1 - x0):.1f}" height="{row_height - 7}"'
                parts.append(f'<g><rect {box} style="fill:{colour(names, name)}"/><title>{escape(note)}</title></g>')
                start += value
        parts.append(svg_text(scale.to_pixel(whole) + 7, y + row_height / 2 + 1, row.said or text(whole), "value"))
    if limit is not None:
        x = scale.to_pixel(limit.value)
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 5}" y2="{bottom + 3}"/>')
        parts.append(svg_text(x, top - 9, f"{limit.name} {text(limit.value)}", "tick", anchor="middle"))
    return svg_chart(parts, title=title, width=width, height=bottom + (22 if ticks else 8))


def legend(names: Sequence[str], *, left: float, y: float) -> str:
    parts, x = [], left
    for name in names:
        box = f'x="{x:.1f}" y="{y - 9:.1f}" width="9" height="9" rx="2"'
        parts.append(f'<rect style="fill:{colour(names, name)}" {box}/>')
        parts.append(svg_text(x + 14, y, name, "legend"))
        x += 32 + 6.2 * len(name)
    return "".join(parts)


def colour(names: Sequence[str], name: str) -> str:
    return f"var(--s{list(names).index(name) % N_COLOURS})"


def _anywhere(rows: Sequence[PartRow], name: str) -> bool:
    return any(row.parts.get(name, 0.0) > 0 for row in rows)
