"""A timeline as one SVG, drawn to time: a row a rank, its compute lane, and under it what it communicates.

Numbers in, text out: no library, no file. It stands by itself or within a page, in light and dark. Colours are kinds of
work; a rank's other stages are paler. A pair of DualPipe has its forward above and its backward below, in one frame.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from html import escape

from abyssal.plan.in_words import percent_text, seconds_text
from abyssal.plan.simulate import TimedJob, Timeline

TITLES = {
    "none": "No pipeline",
    "1f1b": "1F1B",
    "interleaved": "Interleaved 1F1B",
    "zb1p": "ZB1P",
    "zbv": "ZBV",
    "dualpipe": "DualPipe",
    "dualpipev": "DualPipeV",
}
LEGEND = {
    "forward": "forward",
    "backward": "backward",
    "backward_input": "backward for inputs",
    "backward_weight": "backward for weights",
    "pair": "forward and backward together",
    "paler": "paler: the rank's other stage",
    "idle": "bubble",
    "hidden_experts": "experts' all-to-all, hidden",
    "exposed_experts": "experts' all-to-all, exposed",
    "send": "send to another rank",
}
LIGHT = """--paper:#fff;--ink:#18212c;--dim:#5d6977;--rule:#e4e7ea;--lane:#f3f4f5;--hatch:#aab3bd;--on:#fff;
--frame:#18212c;--forward:#2767bd;--backward:#cc6a1c;--backward_input:#d99a22;--backward_weight:#15826a;--hidden_experts:#8a63b8;
--exposed_experts:#c22e4a;--send:#7b8794"""
DARK = """--paper:#131a23;--ink:#e4eaf1;--dim:#98a5b4;--rule:#263140;--lane:#1a232e;--hatch:#4a5a6d;--on:#0d1219;
--frame:#e4eaf1;--forward:#6ea8ff;--backward:#f0a35e;--backward_input:#ecc563;--backward_weight:#4fcbb0;
--hidden_experts:#bd97e8;--exposed_experts:#f2788c;--send:#94a1b0"""
LEFT, RIGHT, TOP, HALF, THIN, GAP = 58, 14, 14, 11, 4, 7  # pixels; a compute lane is two halves high
DIGIT = 0.62  # width of a digit, in font sizes


def draw_schedule(timeline: Timeline, *, width: int = 960, until_seconds: float | None = None) -> str:
    """`until_seconds` is where the time axis ends, so that several pictures can have the same scale."""
    schedule = timeline.schedule
    span = float(max(timeline.step_seconds, until_seconds or 0)) or 1.0
    scale = (width - LEFT - RIGHT) / span
    by_rank: dict[int, list[TimedJob]] = defaultdict(list)
    for job in timeline.jobs:
        by_rank[job.rank].append(job)
    kinds = {job.kind for job in timeline.jobs}
    has_experts, has_sends = bool(kinds & {"hidden_experts", "exposed_experts"}), "send" in kinds
    row_height = 2 * HALF + (THIN + 1) * (has_experts + has_sends) + GAP

    shown = _shown(timeline, kinds)
    legend, legend_height = _legend(shown, y=TOP + 50, width=width)
    top = TOP + 50 + legend_height
    bottom = top + row_height * schedule.n_ranks - GAP
    title, summary = _titles(timeline)
    parts = [
        f'<rect class="paper" width="{width}" height="{bottom + 30}" rx="8"/>',
        _text(LEFT - 44, TOP + 12, title, "title"),
        _text(LEFT - 44, TOP + 31, summary, "summary"),
        legend,
        *_axis(span, scale, top=top - 5, bottom=bottom + 4, n_ticks=max(4, width // 90)),
    ]
    shapes: dict[str, list[str]] = defaultdict(list)
    numbers: list[str] = []
    for rank in range(schedule.n_ranks):
        y = top + row_height * rank
        parts.append(_text(LEFT - 10, y + HALF + 4, f"rank {rank}", "rank", anchor="end"))
        x = LEFT + float(timeline.step_seconds) * scale
        parts.append(f'<rect class="lane" x="{LEFT}" y="{y}" width="{x - LEFT:.2f}" height="{2 * HALF}"/>')
        _draw_compute(timeline, rank, y=y, scale=scale, shapes=shapes, numbers=numbers)
        for track in range(has_experts + has_sends):
            below = y + 2 * HALF + 1 + (THIN + 1) * track
            parts.append(f'<rect class="lane" x="{LEFT}" y="{below}" width="{x - LEFT:.2f}" height="{THIN}"/>')
        for job in by_rank[rank]:
            if job.lane == "communication":
                below = y + 2 * HALF + 1 + (THIN + 1) * (job.kind == "send" and has_experts)
                shapes[job.kind].append(_box(job.start_seconds, job.end_seconds, below, THIN, scale))
    parts += [f'<path class="{kind}" d="{"".join(boxes)}"/>' for kind, boxes in shapes.items() if kind != "pair"]
    if "pair" in shapes:  # a frame is as fine as its pairs are narrow
        narrowest = min(time.pair_seconds for time in timeline.times) * scale
        stroke = min(1.0, max(0.3, float(narrowest) / 20))
        parts.append(f'<path class="pair" style="stroke-width:{stroke:.2f}" d="{"".join(shapes["pair"])}"/>')
    if 2 * len(numbers) >= sum(job.lane == "compute" for job in timeline.jobs):  # a few would say nothing
        parts += numbers
    return _svg(parts, label=f"{title}. {summary}", width=width, height=bottom + 30)


def _draw_compute(
    timeline: Timeline, rank: int, *, y: float, scale: float, shapes: dict[str, list[str]], numbers: list[str]
) -> None:
    clock: float = 0
    own, n_digits = timeline.schedule.orders[rank][0][0].stage, len(str(timeline.schedule.n_micro_batches - 1))
    for slot, (start, end) in zip(timeline.schedule.orders[rank], timeline.slot_seconds[rank], strict=True):
        if start > clock:
            shapes["idle"].append(_box(clock, start, y, 2 * HALF, scale))
        clock = end
        height = 2 * HALF / len(slot)
        for k, (kind, m, stage) in enumerate(slot):
            paler = " paler" if stage != own else ""
            shapes[kind + paler].append(_box(start, end, y + k * height, height, scale))
            middle = y + (k + 0.5) * height
            numbers += _number(m, n_digits, (start, end), middle, scale, f"number{paler}")
        if len(slot) > 1:
            shapes["pair"].append(_box(start, end, y, 2 * HALF, scale))
    if timeline.step_seconds > clock:
        shapes["idle"].append(_box(clock, timeline.step_seconds, y, 2 * HALF, scale))


def _number(m: int, n_digits: int, box: tuple[float, float], middle: float, scale: float, kind: str) -> list[str]:
    """A micro-batch's number, where the longest of them could be read as well."""
    start, end = box
    size = min(10.0, (float(end - start) * scale - 2) / (DIGIT * n_digits))
    if size < 7.5:
        return []
    x, y = LEFT + float(start + end) / 2 * scale, middle + size * 0.36
    return [f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" style="font-size:{size:.1f}px">{m}</text>']


def _titles(timeline: Timeline) -> tuple[str, str]:
    schedule = timeline.schedule
    ranks = "one rank" if schedule.n_ranks == 1 else f"{schedule.n_ranks} ranks"
    title = f"{TITLES[schedule.name]} on {ranks}, {schedule.n_micro_batches} micro-batches"
    least, most = (seconds_text(float(idle)) for idle in (min(timeline.bubble_seconds), max(timeline.bubble_seconds)))
    idle = most if least == most else f"{least} to {most}"
    summary = (
        f"step {seconds_text(float(timeline.step_seconds))} · bubble {idle} a rank, "
        f"{percent_text(float(timeline.bubble_share))} of all time"
    )
    hidden, exposed = sum(timeline.hidden_communication_seconds), sum(timeline.exposed_communication_seconds)
    if hidden + exposed:
        n_ranks = schedule.n_ranks
        summary += (
            f" · communication hidden {percent_text(float(timeline.hidden_share))}: "
            f"{seconds_text(float(hidden) / n_ranks)} of {seconds_text(float(hidden + exposed) / n_ranks)} a rank"
        )
    return title, summary


def _shown(timeline: Timeline, kinds: Iterable[str]) -> list[str]:
    """What the legend has to explain."""
    shown = set(kinds)
    if any(timeline.bubble_seconds):
        shown.add("idle")
    for order in timeline.schedule.orders:
        if any(len(slot) > 1 for slot in order):
            shown.add("pair")
        if len({work.stage for slot in order for work in slot}) > 1:
            shown.add("paler")
    return [kind for kind in LEGEND if kind in shown]


def _legend(shown: list[str], *, y: float, width: int) -> tuple[str, float]:
    """The swatches in as many lines as they need, and the height of those."""
    parts, x, top = [], float(LEFT - 44), y
    for kind in shown:
        room = 22 + sum(4.6 if letter in "filrt',- " else 7.5 for letter in LEGEND[kind])
        if x + room > width - RIGHT:
            x, y = float(LEFT - 44), y + 18
        swatch = {"pair": "", "paler": "forward paler"}.get(kind, kind)
        if kind == "pair":
            parts.append(
                f'<path class="forward" d="M{x} {y}h12v6h-12z"/><path class="backward" d="M{x} {y + 6}h12v6h-12z"/>'
            )
            parts.append(f'<path class="pair" d="M{x} {y}h12v12h-12z"/>')
        else:
            height = THIN if kind in ("send", "hidden_experts", "exposed_experts") else 12
            parts.append(f'<path class="{swatch}" d="M{x} {y + (12 - height) / 2}h12v{height}h-12z"/>')
        parts.append(_text(x + 17, y + 10, LEGEND[kind], "key"))
        x += room + 8
    return f"<g>{''.join(parts)}</g>", y - top + 28


def _axis(span: float, scale: float, *, top: float, bottom: float, n_ticks: int) -> list[str]:
    """Grid and ticks at 1, 2 or 5 times a power of ten."""
    rough = span / n_ticks
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    parts = []
    for k in range(math.floor(span / gap + 1e-9) + 1):
        x = LEFT + k * gap * scale
        parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(_text(x, bottom + 14, seconds_text(k * gap), "tick", anchor="middle"))
    return parts


def _box(start: float, end: float, y: float, height: float, scale: float) -> str:
    """A rectangle as part of a path, with a hair's breadth between neighbours."""
    x, wide = LEFT + float(start) * scale, float(end - start) * scale
    wide = max(wide - min(0.8, 0.2 * wide), 0.2)
    return f"M{x:.2f} {y:g}h{wide:.2f}v{height:g}h-{wide:.2f}z"


def _text(x: float, y: float, text: str, kind: str, *, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Iterable[str], *, label: str, width: int, height: float) -> str:
    fills = "".join(
        f".schedule .{kind}{{fill:var(--{kind})}}" for kind in LEGEND if kind not in ("pair", "paler", "idle")
    )
    style = (
        f".schedule{{{LIGHT};font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue','Noto Sans',Arial,"
        "sans-serif;font-variant-numeric:tabular-nums}"
        f"@media(prefers-color-scheme:dark){{:root:not([data-theme=light]) .schedule,.schedule:root{{{DARK}}}}}"
        f":root[data-theme=dark] .schedule{{{DARK}}}{fills}"
        ".schedule .paper{fill:var(--paper)}.schedule .lane{fill:var(--lane)}.schedule .idle{fill:url(#bubble)}"
        ".schedule .rule{stroke:var(--rule)}.schedule .pair{fill:none;stroke:var(--frame);stroke-width:1}"
        ".schedule .paler{fill-opacity:.42}.schedule text{fill:var(--dim);font-size:11.5px}"
        ".schedule .title{font-size:16px;font-weight:600;fill:var(--ink)}"
        ".schedule .summary{font-size:13px;fill:var(--ink)}.schedule .key{font-size:12px}"
        ".schedule text.number{fill:var(--on);text-anchor:middle}"
        ".schedule text.number.paler{fill:var(--ink);fill-opacity:1}"
    )
    hatch = (
        '<defs><pattern id="bubble" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<line x1="0" x2="0" y1="0" y2="5" style="stroke:var(--hatch);stroke-width:1.6"/></pattern></defs>'
    )
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" class="schedule" viewBox="0 0 {width} {height:g}"'
    return f'{opening} role="img" aria-label="{escape(label)}"><style>{style}</style>{hatch}{"".join(parts)}</svg>\n'
