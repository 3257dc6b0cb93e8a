"""The report's tables: checkpoints with intervals, families, time and tokens.

Owns which numbers stand in a table and how they are spelt. Does not own the page around them (evals/page.py). What a
run has not measured is a dash, a column without any number is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from abyssal.evals.charts import Format, IntervalRow, interval_chart, value_label
from abyssal.evals.page_curves import stage_title
from abyssal.evals.run_files import RunFiles, StageFiles
from abyssal.record import human_time

COLOURS = {
    "base": 5, "zero": 0, "dev1": 3, "dev2": 3, "dev3": 3, "r1": 2,
    "student_base": 5, "student": 1, "student_rl": 0, "student_opd": 3,
}  # fmt: skip
NOTHING = "–"


def results_section(run: RunFiles) -> Markup:
    rows = {name: run.overall(name) for name in run.checkpoints if run.overall(name)}
    if not rows:
        return Markup("")
    columns = [
        ("accuracy", lambda one: Markup("{} <small>{}</small>").format(percent(one), span_of(one))),
        ("gain over base", _gain),
        ("majority of k", lambda one: percent(one, "cons_at_k")),
        ("answers that think", lambda one: percent(one, "think_share")),
        ("accuracy given thinking", lambda one: percent(one, "accuracy_thinking")),
        ("tokens an answer", lambda one: _number(one, "length")),
        ("tokens given thinking", lambda one: _number(one, "length_thinking")),
        ("mixed language", lambda one: percent(one, "mixed_share")),
        ("cut off", lambda one: percent(one, "truncated_share")),
        ("MTP accepted", lambda one: percent(one, "mtp_acceptance")),
        ("active / all parameters", _parameters),
    ]
    body = [[name, *(show(one) for _, show in columns)] for name, one in rows.items()]
    kept = [0, *(place for place in range(1, len(columns) + 1) if any(row[place] != NOTHING for row in body))]
    titles = ["", *(title for title, _ in columns)]
    table = table_of([titles[place] for place in kept], [[row[place] for place in kept] for row in body])
    first = next(iter(rows.values()))
    k, n = first.get("k"), first.get("n_problems")
    drawn = f"{n:,} held-out problems, {k} sampled answers each. " if isinstance(k, int) and isinstance(n, int) else ""
    note = f"{drawn}Small print and bars: 95 % intervals, bootstrap by problem. Dashed: {next(iter(rows))}."
    charts: list[tuple[str, str, Format]] = [
        ("Accuracy", "accuracy", "percent"),
        ("Accuracy given thinking", "accuracy_thinking", "percent"),
        ("Accuracy of the majority of k", "cons_at_k", "percent"),
        ("Answers that think", "think_share", "percent"),
        ("Tokens an answer", "length", "plain"),
        ("Answers that mix languages", "mixed_share", "percent"),
    ]
    figures = Markup("").join(
        Markup("<figure>{}</figure>").format(Markup(chart))
        for title, key, fmt in charts
        if (chart := interval_chart(_interval_rows(rows, key), title=title, fmt=fmt))
    )
    head = Markup('<section id="results"><h2>Results</h2><p class="note">{}</p>').format(note)
    return Markup('{}<div class="charts">{}</div>{}</section>').format(head, figures, table)


def families_section(run: RunFiles) -> Markup:
    names = list(run.checkpoints)
    families = list(dict.fromkeys(f for one in run.checkpoints.values() for f in (one.get("family") or {})))
    if not families:
        return Markup("")
    rows: list[list[Any]] = []
    for family in families:
        cells = [_family(run, name, family) for name in names]
        unseen = any(cell.get("held_out") is True for cell in cells)
        title = Markup("{} <small>(never trained on)</small>").format(family) if unseen else family
        rows.append([title, *(_shade(cell) for cell in cells)])
    return Markup(
        '<section id="families"><h2>By family of problems</h2><p class="note">Accuracy of each checkpoint, with its '
        "interval. The darker, the better.</p>{}</section>"
    ).format(table_of(["", *names], rows))


def data_section(run: RunFiles) -> Markup:
    """What became of the documents: a row a source, a column a reason."""
    sources = run.data.get("sources")
    if not isinstance(sources, dict) or not sources:
        return Markup("")
    total, weights, used = (run.data.get(key) or {} for key in ("total", "weights", "train_text"))
    reasons = list(total.get("refused") or {})
    rows = [
        [name, value_label(weights.get(name, 1.0), "percent"), *_documents(one, reasons), _epochs(used, name)]
        for name, one in sources.items()
    ]
    table = table_of(
        ["source", "weight", "read", "kept", "text kept", *reasons, "read over"],
        rows,
        total=["all", "", *_documents(total, reasons), ""] if len(rows) > 1 else (),
    )
    notes = ["Documents of the pretraining text; each is kept, or refused for one reason."]
    if languages := run.data.get("languages"):
        told = ", ".join(f"{language} {n:,}" for language, n in list(languages.items())[:8])
        notes.append(f"By language: {told}.")
    evaluation = run.data.get("evaluation") or {}
    if sets := evaluation.get("sets"):
        n_items, n_hit = sum(sets.values()), evaluation.get("items_hit", 0)
        n_words = evaluation.get("words_in_a_row")
        notes.append(f"{n_hit:,} of {n_items:,} evaluation items were found in it, by {n_words} words in a row.")
    text = '<section id="data"><h2>Data</h2><p class="note">{}</p>{}</section>'
    return Markup(text).format(" ".join(notes), table)


def cost_section(stages: Sequence[StageFiles]) -> Markup:
    """A row a stage; where rollouts, rewards and updates were timed apart, the bar is split."""
    times = [stage.total("time_s") or 0.0 for stage in stages]
    longest = max(times, default=0.0)
    if not longest:
        return Markup("")
    rows = []
    for stage, time_s in zip(stages, times, strict=True):
        parts = [stage.total(key) or 0.0 for key in ("rollout_s", "reward_s", "update_s")]
        rest = max(0.0, time_s - sum(parts))
        pieces = Markup("").join(
            Markup('<span style="width:{}%;background:var(--s{})"></span>').format(f"{100 * part / time_s:.2f}", colour)
            for part, colour in zip([*parts, rest], (0, 1, 2, 5), strict=True)
            if part and time_s
        )
        bar = Markup('<td class="wide"><div class="bar" style="width:{}%">{}</div></td>').format(
            f"{100 * time_s / longest:.2f}", pieces
        )
        tokens = stage.total("tokens")
        amount = value_label(tokens, "plain") if tokens else NOTHING
        rows.append([stage_title(stage.name), f"{len(stage.metrics):,}", amount, human_time(time_s), bar])
    total = total_of(stages, "tokens")
    whole = value_label(total, "plain") if total else NOTHING
    steps = sum(len(stage.metrics) for stage in stages)
    table = table_of(
        ["stage", "steps", "tokens", "time", ""], rows, total=["all", f"{steps:,}", whole, human_time(sum(times)), ""]
    )
    key = Markup("").join(
        Markup('<span><i style="background:var(--s{})"></i>{}</span>').format(colour, text)
        for colour, text in ((0, "rollout"), (1, "reward"), (2, "update"), (5, "everything else"))
    )
    return Markup(
        '<section id="cost"><h2>Time and tokens</h2><p class="note">Wall-clock time of the steps of each stage.</p>'
        '{}<div class="key">{}</div></section>'
    ).format(table, key)


def has(numbers: dict[str, Any], key: str) -> bool:
    return isinstance(numbers.get(key), int | float)


def percent(numbers: dict[str, Any], key: str = "accuracy") -> str:
    return value_label(numbers[key], "percent") if has(numbers, key) else NOTHING


def span_of(numbers: dict[str, Any]) -> str:
    """The interval in points, '53.9–62.1'; empty when there is none."""
    if not (has(numbers, "ci_low") and has(numbers, "ci_high")):
        return ""
    return f"{100 * numbers['ci_low']:.1f}–{100 * numbers['ci_high']:.1f}"


def total_of(stages: Sequence[StageFiles], key: str) -> float:
    return sum(stage.total(key) or 0.0 for stage in stages)


def _documents(counts: dict[str, Any], reasons: Sequence[str]) -> list[str]:
    refused = counts.get("refused") or {}
    size = f"{counts.get('kept_bytes', 0) / 1e6:,.1f} MB"
    read_kept = [f"{counts.get(key, 0):,}" for key in ("read", "kept")]
    return [*read_kept, size, *(f"{refused.get(reason, 0):,}" for reason in reasons)]


def _epochs(used: dict[str, Any], source: str) -> str:
    return f"{used[source]['epochs']:.1f} times" if source in used else NOTHING


def _interval_rows(rows: dict[str, dict[str, Any]], key: str) -> list[IntervalRow]:
    return [
        IntervalRow(
            name=name,
            value=one[key],
            low=one.get("ci_low") if key == "accuracy" else None,
            high=one.get("ci_high") if key == "accuracy" else None,
            colour=COLOURS.get(name, 4),
        )
        for name, one in rows.items()
        if has(one, key)
    ]


def _family(run: RunFiles, checkpoint: str, family: str) -> dict[str, Any]:
    cell = (run.checkpoints[checkpoint].get("family") or {}).get(family)
    return cell if isinstance(cell, dict) else {"accuracy": cell}


def _shade(cell: dict[str, Any]) -> Markup:
    if not has(cell, "accuracy"):
        return Markup(NOTHING)
    depth = round(42 * min(1.0, max(0.0, cell["accuracy"])))
    return Markup(
        '<td style="background:color-mix(in srgb,var(--s2) {}%,transparent)">{} <small>{}</small></td>'
    ).format(depth, percent(cell), span_of(cell))


def _number(numbers: dict[str, Any], key: str) -> str:
    return f"{numbers[key]:.1f}" if has(numbers, key) else NOTHING


def _gain(numbers: dict[str, Any]) -> str | Markup:
    """`gain` = {"value", "low", "high"}: the paired difference to base, when the evaluation worked it out."""
    gain = numbers.get("gain")
    if not isinstance(gain, dict) or not all(has(gain, key) for key in ("value", "low", "high")):
        return NOTHING
    span = f"{100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}"
    return Markup("{} <small>{}</small>").format(f"{100 * gain['value']:+.1f}", span)


def _parameters(numbers: dict[str, Any]) -> str:
    if not (has(numbers, "active_params") and has(numbers, "total_params")):
        return NOTHING
    return f"{value_label(numbers['active_params'], 'plain')} / {value_label(numbers['total_params'], 'plain')}"


def table_of(titles: Sequence[str], rows: Sequence[Sequence[Any]], *, total: Sequence[Any] = ()) -> Markup:
    """Cells that bring their own <td> keep it."""
    head = Markup("").join(Markup("<th>{}</th>").format(title) for title in titles)
    body = [Markup("<tr>{}</tr>").format(_cells(row)) for row in rows]
    if total:
        body.append(Markup('<tr class="total">{}</tr>').format(_cells(total)))
    text = '<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    return Markup(text).format(head, Markup("").join(body))


def _cells(row: Sequence[Any]) -> Markup:
    ready = [isinstance(cell, Markup) and cell.startswith("<td") for cell in row]
    return Markup("").join(
        cell if is_cell else Markup("<td>{}</td>").format(cell) for cell, is_cell in zip(row, ready, strict=True)
    )
