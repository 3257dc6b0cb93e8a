"""The report's two comparisons beyond the table of checkpoints: the student's three arms, and thinking cut short.

Owns what these two sections say. Does not own how intervals or seconds came about (evals/budget.py, stages/).
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from abyssal.evals.charts import IntervalRow, Series, interval_chart, line_chart, value_label
from abyssal.evals.page_tables import COLOURS, NOTHING, has, percent, span_of, table_of
from abyssal.evals.run_files import RunFiles, StageFiles
from abyssal.record import human_time

# checkpoint -> the stage that made it, and what it learned from
ARMS = {
    "student": ("distil", "SFT on traces that r1 wrote"),
    "student_rl": ("student_rl", "its own answers, rewarded by rules"),
    "student_opd": ("on_policy", "its own answers, r1’s distribution at each token"),
}


def arms_section(run: RunFiles) -> Markup:
    """The student by distillation, by RL alone and by on-policy distillation, from one base in equal seconds."""
    names = [name for name in ("student_base", *ARMS) if has(run.overall(name), "accuracy")]
    if "student_base" not in names or len(names) < 2:
        return Markup("")
    stages = {stage.name: stage for stage in run.stages}
    titles = ["", "learned from", "steps", "seconds of work", "tokens", "accuracy", "gain over student_base"]
    rows = [[name, *_arm(name, stages), *_measured(run.overall(name))] for name in names]
    chart = interval_chart(
        [
            IntervalRow(
                name=name,
                value=one["accuracy"],
                low=one.get("ci_low"),
                high=one.get("ci_high"),
                colour=COLOURS.get(name, 4),
            )
            for name in names
            for one in [run.overall(name)]
        ],
        title="The student’s arms: accuracy",
    )
    note = (
        "One small dense model, pretrained once and then taught in different ways. Seconds are those of the steps: for "
        "distillation r1’s writing of the traces and the SFT, for the others answering and updating. Evaluating, "
        "loading and saving count for none, and neither does training r1."
    )
    return Markup(
        '<section id="arms"><h2>The student in a fair fight</h2><p class="note">{}</p>'
        '<div class="charts"><figure>{}</figure></div>{}</section>'
    ).format(note, Markup(chart), table_of(titles, rows))


def _arm(name: str, stages: dict[str, StageFiles]) -> list[Any]:
    """What it learned from, steps, seconds, tokens."""
    if name == "student_base":
        base = stages.get("distil/base")
        seconds = Markup("{} <small>of pretraining, for all</small>").format(_seconds(base)) if base else NOTHING
        return ["text and problems", _steps(base), seconds, _tokens(base)]
    stage_name, learned_from = ARMS[name]
    stage, traces = stages.get(stage_name), stages.get(f"{stage_name}/traces")
    if stage is None:
        return [learned_from, NOTHING, NOTHING, NOTHING]
    if traces is None:
        return [learned_from, _steps(stage), _seconds(stage), _tokens(stage)]
    whole = human_time(stage.worked_s() + traces.worked_s())
    return [
        learned_from,
        _steps(stage),
        Markup("{} <small>{} traces, {} SFT</small>").format(whole, _seconds(traces), _seconds(stage)),
        Markup("{} <small>drawn by r1: {}</small>").format(_tokens(stage), _tokens(traces)),
    ]


def _measured(one: dict[str, Any]) -> list[Any]:
    gain = one.get("gain_over_student_base")
    shown: str | Markup = NOTHING
    if isinstance(gain, dict) and all(has(gain, key) for key in ("value", "low", "high")):
        span = f"{100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}"
        shown = Markup("{} <small>{}</small>").format(f"{100 * gain['value']:+.1f}", span)
    return [Markup("{} <small>{}</small>").format(percent(one), span_of(one)), shown]


def _steps(stage: StageFiles | None) -> str:
    return f"{len(stage.metrics):,}" if stage else NOTHING


def _seconds(stage: StageFiles) -> str:
    return human_time(stage.worked_s())


def _tokens(stage: StageFiles | None) -> str:
    tokens = stage.total("tokens") if stage else None
    return value_label(tokens, "plain") if tokens else NOTHING


def budget_section(run: RunFiles) -> Markup:
    """pass@1 against thinking budget, one line a checkpoint."""
    curves = {
        name: [point for point in points if has(point, "budget") and has(point, "accuracy")]
        for name, points in run.budget.items()
    }
    curves = {name: sorted(points, key=lambda point: point["budget"]) for name, points in curves.items() if points}
    if not curves:
        return Markup("")
    chart = line_chart(
        [
            Series(
                name=name,
                points=[(float(point["budget"]), point["accuracy"]) for point in points],
                spans=tuple((float(p["budget"]), p["ci_low"], p["ci_high"]) for p in points if span_of(p)),
                colour=COLOURS.get(name, 4),
                sparse=True,
            )
            for name, points in curves.items()
        ],
        title="pass@1 against thinking budget",
        x_label="thinking budget, tokens",
        y_label="pass@1",
        fmt="percent",
        width=520,
        height=280,
    )
    rows = [
        [
            name if first else "",
            f"{point['budget']:g}",
            Markup("{} <small>{}</small>").format(percent(point), span_of(point)),
            percent(point, "cut_share"),
            f"{point['thinking_tokens']:.1f}" if has(point, "thinking_tokens") else NOTHING,
            percent(point, "truncated_share"),
        ]
        for name, points in curves.items()
        for first, point in ((point is points[0], point) for point in points)
    ]
    titles = ["", "budget, tokens", "pass@1", "thinking cut", "tokens thought", "answer cut off"]
    note = (
        "An answer that has thought for the budget is made to close its thinking and to answer. What thinks less, or "
        "not at all, is left as it is. Bars: 95 % intervals, bootstrap by problem."
    )
    return Markup(
        '<section id="budget"><h2>What thinking buys</h2><p class="note">{}</p>'
        '<figure class="wide">{}</figure>{}</section>'
    ).format(note, Markup(chart), table_of(titles, rows))
