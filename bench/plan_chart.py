"""bench/results/plan.jsonl -> plan.svg: each run's planned and measured time and memory, with the bounds to be kept.

Bars are shares of what was measured, so that runs of a second and of a minute stand beside each other; the figures
themselves stand below them.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

BAR, GAP, HEIGHT, TOP, BOTTOM, LEFT = 26, 52, 190, 56, 70, 46
MOST = 1.4  # of the measured value: where the axis ends
PLANNED, MEASURED, BOUND, TEXT, LINE = "#7aa6c2", "#30475e", "#d1495b", "#222222", "#bbbbbb"


def last_of_each(results: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return list({row["run"]: row for row in rows}.values())


def chart(rows: list[dict[str, Any]], *, time_within: float, memory_within: float) -> str:
    each = 2 * BAR + GAP
    width = LEFT + len(rows) * each + 20
    panels = [
        _panel(rows, "seconds", f"time of a step (held within {100 * time_within:.0f} %)", time_within, 0),
        _panel(
            rows, "peak_bytes", f"peak memory (held within {100 * memory_within:.0f} %)", memory_within, width
        ),
    ]
    legend = "".join(
        f'<rect x="{LEFT + x}" y="8" width="10" height="10" fill="{colour}"/>'
        f'<text x="{LEFT + x + 15}" y="17" font-size="11">{name}</text>'
        for x, colour, name in ((0, PLANNED, "planned"), (80, MEASURED, "measured"), (166, BOUND, "bounds"))
    )
    total = TOP + HEIGHT + BOTTOM
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width} {total}" font-family="sans-serif" '
        f'fill="{TEXT}"><rect width="{2 * width}" height="{total}" fill="#ffffff"/>{legend}{"".join(panels)}</svg>\n'
    )


def _panel(rows: list[dict[str, Any]], what: str, title: str, within: float, x0: int) -> str:
    def y(share: float) -> float:
        return TOP + HEIGHT * (1 - min(share, MOST) / MOST)

    each = 2 * BAR + GAP
    end = x0 + LEFT + len(rows) * each
    parts = [f'<text x="{x0 + LEFT}" y="{TOP - 14}" font-size="12">{escape(title)}</text>']
    for share in (0.0, 0.5, 1.0):
        parts.append(
            f'<line x1="{x0 + LEFT}" x2="{end}" y1="{y(share):.1f}" y2="{y(share):.1f}" stroke="{LINE}"/>'
            f'<text x="{x0 + LEFT - 6}" y="{y(share) + 4:.1f}" font-size="10" text-anchor="end">{share:g}</text>'
        )
    for k, row in enumerate(rows):
        left = x0 + LEFT + GAP / 2 + k * each
        share = row[f"planned_{what}"] / row[f"measured_{what}"]
        for x, height, colour in ((left, share, PLANNED), (left + BAR, 1.0, MEASURED)):
            parts.append(
                f'<rect x="{x:.1f}" y="{y(height):.1f}" width="{BAR}" height="{y(0) - y(height):.1f}" fill="{colour}"/>'
            )
        for bound in (1 - within, 1 + within):
            parts.append(
                f'<line x1="{left - 4:.1f}" x2="{left + BAR:.1f}" y1="{y(bound):.1f}" y2="{y(bound):.1f}" '
                f'stroke="{BOUND}" stroke-width="2"/>'
            )
        middle = left + BAR
        below = (
            (16, 11, row["run"]),
            (32, 10, f"{figure(row[f'planned_{what}'], what)} / {figure(row[f'measured_{what}'], what)}"),
            (48, 10, f"{100 * (share - 1):+.0f} %"),
        )
        parts += [
            f'<text x="{middle:.1f}" y="{TOP + HEIGHT + dy}" font-size="{size}" text-anchor="middle">'
            f"{escape(text)}</text>"
            for dy, size, text in below
        ]
    return "".join(parts)


def figure(value: float, what: str) -> str:
    """2.4 s, 601 ms; 388 MB, 2.4 GB: three digits at most."""
    if what == "seconds":
        return f"{value:.1f} s" if value >= 1 else f"{1e3 * value:.0f} ms"
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
