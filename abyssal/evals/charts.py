"""Series -> SVG text. Pure functions, no library, no files; colours are the page's CSS variables --s0 ... --s5.

Owns scales, ticks, smoothing, legends and the geometry that the page's hover script reads. Does not own what is plotted
(evals/page.py) nor the colours and the script (evals/page_look.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Literal, NamedTuple

Format = Literal["plain", "percent"]
Point = tuple[float, float]
N_COLOURS = 6
MOST_POINTS = 400  # more than this cannot be told apart at the width of a chart, and makes the page heavy


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line. `sparse` ones, measured now and then, are drawn with their points and not smoothed.

    `spans` are (x, low, high): intervals, drawn as bars behind the points.
    """

    name: str
    points: list[Point]
    colour: int = 0
    sparse: bool = False
    spans: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class IntervalRow:
    """One dot with its interval; without low and high just the dot."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    colour: int = 0


class Scale(NamedTuple):
    """Data to pixels along one axis, and where the ticks stand."""

    to_pixel: Callable[[float], float]
    ticks: list[float]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "step",
    y_label: str = "",
    fmt: Format = "plain",
    log: bool = False,
    log_x: bool = False,
    width: int = 360,
    height: int = 218,
) -> str:
    """Raw values faint, a local fit over them, axes, ticks, a legend when there is more than one series."""
    shown = [one for one in (_usable(one, log=log) for one in series) if one.points]
    if not shown:
        return ""
    smooth = [one.points if one.sparse else _smoothed(one.points) for one in shown]
    many = len(shown) > 1
    left, right, top, bottom = 62 if y_label else 46, width - 12, 48 if many else 32, height - 34
    xs = [x for one in shown for x, _ in one.points]
    ys = [y for one in shown for _, y in one.points] + [y for one in shown for _, *span in one.spans for y in span]
    first_x, last_x = min(xs), max(xs)
    if log_x:
        if last_x <= first_x * 1.5:
            first_x, last_x = first_x / 1.5, last_x * 1.5
        x_scale = log_scale(first_x, last_x, left, right, n_ticks=4)
    else:
        x_scale = linear_scale(first_x, last_x, left, right, n_ticks=4, whole=all(float(x).is_integer() for x in xs))
    low, high = (min(ys), max(ys)) if log else _roomy(min(ys), max(ys), fmt=fmt)
    y_scale = (log_scale if log else linear_scale)(low, high, bottom, top, n_ticks=5)

    parts = [svg_text(8, 16, title, "title")]
    if many:
        parts.append(_legend(shown, left=8, y=33, width=width))
    for tick in y_scale.ticks:
        y = y_scale.to_pixel(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            svg_text(left - 6, y + 3.5, tick_label(tick, y_scale.ticks, fmt=fmt, log=log), "tick", anchor="end")
        )
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    for tick in x_scale.ticks:
        x = x_scale.to_pixel(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(svg_text(x, bottom + 16, tick_label(tick, x_scale.ticks, log=log_x), "tick", anchor="middle"))
    parts.append(svg_text((left + right) / 2, height - 4, x_label, "tick", anchor="middle"))
    if y_label:
        turned = svg_text(0, 0, y_label, "tick", anchor="middle")
        parts.append(f'<g transform="translate(13 {(top + bottom) / 2:.1f}) rotate(-90)">{turned}</g>')
    for one, mean in zip(shown, smooth, strict=True):
        stroke = f'style="stroke:var(--s{one.colour % N_COLOURS})"'
        for x, span_low, span_high in one.spans:
            ends = f'y1="{y_scale.to_pixel(span_low):.1f}" y2="{y_scale.to_pixel(span_high):.1f}"'
            x1 = x_scale.to_pixel(x)
            parts.append(f'<line class="span" {stroke} x1="{x1:.1f}" x2="{x1:.1f}" {ends}/>')
        if mean is not one.points:
            parts.append(f'<polyline class="raw" {stroke} points="{_path(_thin(one.points), x_scale, y_scale)}"/>')
        parts.append(f'<polyline class="line" {stroke} points="{_path(_thin(mean), x_scale, y_scale)}"/>')
        if one.sparse or len(one.points) == 1:
            fill = f'style="fill:var(--s{one.colour % N_COLOURS})"'
            parts += [
                f'<circle {fill} cx="{x_scale.to_pixel(x):.1f}" cy="{y_scale.to_pixel(y):.1f}" r="2.4"/>'
                for x, y in _thin(one.points)
            ]
    parts.append(f'<line class="guide" y1="{top}" y2="{bottom}" visibility="hidden"/>')
    hover = {
        "l": left, "r": right, "x0": first_x, "x1": last_x, "lx": log_x, "x": x_label, "f": fmt,
        "s": [{"n": one.name, "c": one.colour % N_COLOURS, "p": _rounded(_thin(one.points))} for one in shown],
    }  # fmt: skip
    data = escape(json.dumps(hover, separators=(",", ":"), ensure_ascii=False))
    return svg_chart(parts, title=title, width=width, height=height, extra=f' data-hover="{data}"')


def interval_chart(
    rows: Sequence[IntervalRow], *, title: str, fmt: Format = "percent", from_zero: bool = True, width: int = 360
) -> str:
    """One row a checkpoint: a dot, its interval as a bar, the value beside it; a dashed line marks the first row."""
    if not rows:
        return ""
    left, right, top, row_height = 12 + 7 * max(len(row.name) for row in rows), width - 60, 34, 26
    bottom = top + row_height * len(rows)
    low = min(row.value if row.low is None else row.low for row in rows)
    high = max(row.value if row.high is None else row.high for row in rows)
    low, high = _roomy(min(0.0, low) if from_zero else low, high, fmt=fmt)
    scale = linear_scale(low, high, left, right, n_ticks=4)
    parts = [svg_text(8, 16, title, "title")]
    for tick in scale.ticks:
        x = scale.to_pixel(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(svg_text(x, bottom + 14, tick_label(tick, scale.ticks, fmt=fmt), "tick", anchor="middle"))
    first = scale.to_pixel(rows[0].value)
    parts.append(f'<line class="reference" x1="{first:.1f}" x2="{first:.1f}" y1="{top}" y2="{bottom}"/>')
    for place, row in enumerate(rows):
        y, colour = top + row_height * (place + 0.5), f"var(--s{row.colour % N_COLOURS})"
        note = f"{row.name}: {value_label(row.value, fmt)}"
        parts.append(svg_text(left - 10, y + 4, row.name, "name", anchor="end"))
        parts.append("<g>")
        end = scale.to_pixel(row.value)
        if row.low is not None and row.high is not None:
            start, end = scale.to_pixel(row.low), scale.to_pixel(row.high)
            box = f'x="{start:.1f}" y="{y - 4:.1f}" width="{max(1.0, end - start):.1f}" height="8" rx="4"'
            parts.append(f'<rect class="interval" style="fill:{colour}" {box}/>')
            note += f" ({value_label(row.low, fmt)} to {value_label(row.high, fmt)})"
        parts.append(f'<circle style="fill:{colour}" cx="{scale.to_pixel(row.value):.1f}" cy="{y:.1f}" r="5"/>')
        parts.append(f"<title>{escape(note)}</title></g>")
        parts.append(svg_text(end + 9, y + 4, value_label(row.value, fmt), "value"))
    return svg_chart(parts, title=title, width=width, height=bottom + 22)


def heat_map(
    values: Sequence[Sequence[float]],
    *,
    title: str,
    columns: Sequence[str],
    rows: Sequence[str],
    x_label: str,
    y_label: str,
    mark_after: int | None = None,
    colour: int = 2,
    width: int = 360,
) -> str:
    """Shares from 0 to 1 as cells, `values[row][column]`: the fuller the colour the higher, with the number in it. A
    dashed line stands behind column `mark_after` (counted from 1)."""
    if not values or not columns:
        return ""
    left, top, cell_height = 46, 30, 24
    cell_width = (width - left - 10) / len(columns)
    bottom = top + cell_height * len(rows)
    parts = [svg_text(8, 16, title, "title")]
    for r, (name, line) in enumerate(zip(rows, values, strict=True)):
        y = top + r * cell_height
        parts.append(svg_text(left - 6, y + cell_height / 2 + 4, name, "tick", anchor="end"))
        for c, (column, value) in enumerate(zip(columns, line, strict=True)):
            x = left + c * cell_width
            box = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{cell_width - 2:.1f}" height="{cell_height - 2}" rx="3"'
            shade = f'style="fill:var(--s{colour % N_COLOURS});fill-opacity:{0.06 + 0.72 * value:.2f}"'
            note = f"{x_label} {column}, {y_label} {name}: {value_label(value, 'percent')}"
            parts.append(f"<g><rect {box} {shade}/><title>{escape(note)}</title>")
            number = f"{100 * value:.0f}"
            parts.append(
                svg_text(x + cell_width / 2, y + cell_height / 2 + 4, number, "value", anchor="middle") + "</g>"
            )
    for c, column in enumerate(columns):
        parts.append(svg_text(left + (c + 0.5) * cell_width, bottom + 14, column, "tick", anchor="middle"))
    if mark_after is not None and 0 < mark_after < len(columns):
        x = left + mark_after * cell_width
        parts.append(f'<line class="reference" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{bottom + 4}"/>')
    caption = f"{x_label}; {y_label} downwards"
    parts.append(svg_text((left + width - 10) / 2, bottom + 30, caption, "tick", anchor="middle"))
    return svg_chart(parts, title=title, width=width, height=bottom + 36)


def linear_scale(low: float, high: float, start: float, end: float, *, n_ticks: int, whole: bool = False) -> Scale:
    """Ticks at 1, 2 or 5 times a power of ten; at least one apart when `whole`."""
    if high <= low:
        high = low + (1.0 if whole or low == 0 else abs(low) * 0.5)
    rough = (high - low) / n_ticks
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        gap = max(1.0, round(gap))
    first, last = math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9)
    return Scale(
        lambda value: start + (value - low) / (high - low) * (end - start), [k * gap for k in range(first, last + 1)]
    )


def log_scale(low: float, high: float, start: float, end: float, *, n_ticks: int) -> Scale:
    """Whole powers of ten over a wide range, 1-2-5 steps over a narrow one."""
    if high <= low * 1.5:
        low, high = low / 1.5, high * 1.5
    bottom, top = math.log10(low), math.log10(high)
    span, powers = top - bottom, range(math.floor(bottom), math.ceil(top) + 1)
    factors = (1, 1.5, 2, 3, 5, 7) if span < 0.8 else (1, 2, 5) if span < 2 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
    every = max(1, math.ceil(len(ticks) / (n_ticks + 2)))
    return Scale(lambda value: start + (math.log10(value) - bottom) / span * (end - start), ticks[::every])


def value_label(value: float, fmt: Format) -> str:
    """0.583 -> '58.3 %' (with a space that does not break) or '0.583', 12480 -> '12.5k', 1400000 -> '1.4M'."""
    if fmt == "percent":
        return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"
    size = abs(value)
    if size >= 1e9:
        return f"{value / 1e9:.3g}B"
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.0f}" if size >= 100 else f"{value:.3g}"


def tick_label(value: float, ticks: Sequence[float], *, fmt: Format = "plain", log: bool = False) -> str:
    """All ticks of an axis with as many decimals as their distance needs."""
    if fmt == "percent":
        value, ticks = 100 * value, [100 * tick for tick in ticks]
    if log:
        text = f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e") if not 1e-3 <= value < 1e4 else f"{value:g}"
        return text + (" %" if fmt == "percent" else "")
    gap = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    largest = max((abs(tick) for tick in ticks), default=0.0)
    for limit, unit, letter in ((1e7, 1e6, "M"), (1e4, 1e3, "k")):
        if largest >= limit:
            return f"{_decimals(value / unit, gap / unit)}{letter}" if value else "0"
    if 0 < largest < 0.01 and fmt == "plain":
        power = math.floor(math.log10(largest))
        return f"{_decimals(value / 10.0**power, gap / 10.0**power)}e{power}" if value else "0"
    return _decimals(value, gap) + (" %" if fmt == "percent" else "")


def _decimals(value: float, gap: float) -> str:
    n_decimals = next((n for n in range(6) if abs(round(gap, n) - gap) < gap * 1e-3), 6)
    return f"{value + 0.0:.{n_decimals}f}"


def _usable(one: Series, *, log: bool) -> Series:
    points = [(x, y) for x, y in one.points if math.isfinite(y) and (y > 0 or not log)]
    return replace(one, points=points)


def _smoothed(points: list[Point]) -> list[Point]:
    """A line fitted around each step (local regression): unlike a mean it neither lags nor sags at the ends."""
    n = len(points)
    if n < 12:
        return points
    half = max(2, n // 14)
    lowest, highest = min(y for _, y in points), max(y for _, y in points)
    sums_y, sums_ky = [0.0], [0.0]
    for k, (_, y) in enumerate(points):
        sums_y.append(sums_y[-1] + y)
        sums_ky.append(sums_ky[-1] + k * y)
    smooth = []
    for k, (x, _) in enumerate(points):
        start, stop = max(0, k - half), min(n, k + half + 1)
        size, middle = stop - start, (start + stop - 1) / 2
        mean = (sums_y[stop] - sums_y[start]) / size
        slope = (sums_ky[stop] - sums_ky[start] - size * middle * mean) / (size * (size * size - 1) / 12)
        smooth.append((x, min(highest, max(lowest, mean + slope * (k - middle)))))
    return smooth


def _thin(points: list[Point]) -> list[Point]:
    """The lowest and the highest point of each bucket, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / MOST_POINTS)
    kept = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        ends = {min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _roomy(low: float, high: float, *, fmt: Format) -> tuple[float, float]:
    """Leave air above; start at zero unless the values are far from it; a share stays within 0 and 1."""
    if low == high:  # a constant stands in the middle of an axis from zero
        low, high = min(0.0, 2 * low), max(0.0, 2 * high) or (1.0 if low == 0 else 0.0)
    if 0 <= low < 0.3 * high:
        low = 0.0
    pad = 0.06 * ((high - low) or abs(high) or 1.0)
    low, high = low if low == 0 else low - pad, high + pad
    if fmt == "percent":
        low, high = (low, min(high, 1.0)) if low >= 0 else (low, high)
        high = max(high, low + 0.002)
    return low, high


def _rounded(points: list[Point]) -> list[list[float]]:
    return [[round(x, 3), float(f"{y:.4g}")] for x, y in points]


def _path(points: list[Point], x_scale: Scale, y_scale: Scale) -> str:
    return " ".join(f"{x_scale.to_pixel(x):.1f},{y_scale.to_pixel(y):.1f}" for x, y in points)


def _legend(series: Sequence[Series], *, left: float, y: float, width: int) -> str:
    parts, x = [], left
    for one in series:
        parts.append(f'<circle style="fill:var(--s{one.colour % N_COLOURS})" cx="{x + 4:.1f}" cy="{y - 4:.1f}" r="4"/>')
        parts.append(svg_text(x + 12, y, one.name, "legend"))
        x += 24 + 6.1 * len(one.name)
    return "".join(parts)


def svg_text(x: float, y: float, text: str, kind: str, *, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def svg_chart(parts: Sequence[str], *, title: str, width: int, height: float, extra: str = "") -> str:
    label = f'role="img" aria-label="{escape(title)}"'
    return f'<svg class="chart" viewBox="0 0 {width} {height:g}" {label}{extra}>{"".join(parts)}</svg>'
