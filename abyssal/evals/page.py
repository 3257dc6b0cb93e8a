"""The report: a run directory becomes one self-contained HTML page, also while the run is still under way.

Owns what the page says and in which order. Does not own reading (evals/run_files.py), curves (evals/page_curves.py),
tables (evals/page_tables.py), drawing (evals/charts.py), style and script (evals/page_look.py).

Text of users and models is escaped by construction: pieces are `Markup`, and whatever is formatted into one and is not
Markup itself is escaped. The page forbids itself all network and every script but its own, by hash.
"""

from __future__ import annotations

import base64
import hashlib
import os
import time
from pathlib import Path

from markupsafe import Markup

from abyssal.evals.charts import value_label
from abyssal.evals.page_arms import arms_section, budget_section
from abyssal.evals.page_curves import curves_section, stage_title, trace_card
from abyssal.evals.page_look import SCRIPT, STYLE
from abyssal.evals.page_needles import needles_section
from abyssal.evals.page_tables import (
    COLOURS,
    NOTHING,
    cost_section,
    data_section,
    families_section,
    has,
    percent,
    results_section,
    span_of,
    total_of,
)
from abyssal.evals.run_files import RunFiles, read_run
from abyssal.record import human_time

SIDE_BY_SIDE = ("base", "zero", "r1", "student")
N_TRACES = 12  # in the page; the first three unfolded


def write_report(run_dir: Path) -> Path:
    """Read the run directory and write its report.html, in one move."""
    run_dir = Path(run_dir)
    target, partial = run_dir / "report.html", run_dir / "report.html.partial"
    page = render(read_run(run_dir))
    try:
        partial.write_text(page, encoding="utf-8", errors="replace")
        os.replace(partial, target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"cannot write {target}: {reason}; free some space and ask for the report again") from error
    return target


def render(run: RunFiles) -> str:
    """The whole page as text."""
    sections = {
        "results": ("Results", results_section(run)),
        "arms": ("The student’s arms", arms_section(run)),
        "budget": ("Thinking budget", budget_section(run)),
        "traces": ("Side by side", _traces(run)),
        "curves": ("How it learned", curves_section(run.stages)),
        "needles": ("Long context", needles_section(run.needles)),
        "families": ("Families", families_section(run)),
        "data": ("Data", data_section(run)),
        "cost": ("Time and tokens", cost_section(run.stages)),
        "recipe": ("Recipe", _recipe(run)),
    }
    written = time.strftime("%Y-%m-%d", time.localtime(run.written_at)) if run.written_at else ""
    links = Markup("").join(
        Markup('<a href="#{}">{}</a>').format(name, title) for name, (title, body) in sections.items() if body
    )
    return document(
        name=run.name,
        written=f" · {written}" if written else "",
        heading="From raw text to a model that reasons",
        header=Markup('<p class="lead">{}</p>{}<nav>{}</nav>').format(_lead(run), _tiles(run), links),
        body=Markup("").join(body for _, body in sections.values()),
        footer="One file, no network. The numbers behind every curve lie beside it, in each stage’s metrics.jsonl.",
    )


def document(*, name: str, written: str, heading: str, header: Markup, body: Markup, footer: str) -> str:
    """One file with its style and script in it, which forbids itself everything else."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    page = Markup(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="{policy}">'
        "<title>{name} · Abyssal report</title><style>{style}</style></head><body>"
        '<header class="top"><div class="masthead sans"><span><b>Abyssal</b> &nbsp; {name}{written}</span>'
        '<button id="theme" type="button" hidden aria-label="switch between light and dark">Dark</button></div>'
        "<h1>{heading}</h1>{header}</header><main>{body}<footer>{footer}</footer></main>"
        "<script>{script}</script></body></html>\n"
    )
    return str(
        page.format(
            policy=Markup(policy),
            name=name,
            style=Markup(STYLE),
            written=written,
            heading=heading,
            header=header,
            body=body,
            footer=footer,
            script=Markup(SCRIPT),
        )
    )


def _lead(run: RunFiles) -> Markup:
    """The run in one paragraph, as far as its numbers go."""
    said = []
    base, zero, r1, student = (run.overall(name) for name in SIDE_BY_SIDE)
    if has(base, "accuracy") and has(zero, "accuracy"):
        where = f" on {base['n_problems']:,} held-out problems" if has(base, "n_problems") else " on held-out problems"
        gain = 100 * (zero["accuracy"] - base["accuracy"])
        text = "Reinforcement learning from rewards alone took the base model from <b>{}</b> to <b>{}</b>{} ({} points)"
        said.append(Markup(text).format(percent(base), percent(zero), where, f"{gain:+.1f}"))
        if all(has(one, key) for one in (base, zero) for key in ("think_share", "length")):
            text = "; {} of its answers now think, {} did before, and the mean answer went from {} to {} tokens"
            shares = percent(zero, "think_share"), percent(base, "think_share")
            said.append(Markup(text).format(*shares, f"{base['length']:.0f}", f"{zero['length']:.0f}"))
        said.append(Markup(". "))
    if has(r1, "accuracy"):
        said.append(Markup("The full R1 recipe ends at <b>{}</b>").format(percent(r1)))
        if has(r1, "mixed_share") and has(zero, "mixed_share"):
            mixed = percent(r1, "mixed_share"), percent(zero, "mixed_share")
            said.append(Markup(" and mixes languages in {} of its answers, against {} for zero").format(*mixed))
        said.append(Markup(". "))
    if has(student, "accuracy"):
        size = ""
        if has(student, "active_params") and has(r1, "active_params"):
            share = value_label(student["active_params"] / max(1, r1["active_params"]), "percent")
            size = f", with {share} of its active parameters,"
        said.append(Markup("A dense student of r1{} reaches <b>{}</b>. ").format(size, percent(student)))
        others = [
            Markup("{} {}").format(how, percent(run.overall(name)))
            for name, how in (("student_rl", "by RL alone"), ("student_opd", "by on-policy distillation"))
            if has(run.overall(name), "accuracy")
        ]
        if others:
            said.append(Markup("The same student reaches {}. ").format(Markup(" and ").join(others)))
    unfinished = [stage_title(stage.name) for stage in run.stages if stage.done is None]
    if unfinished:
        said.append(Markup("The run is under way or was stopped in: {}. ").format(", ".join(unfinished)))
    time_s, tokens = total_of(run.stages, "time_s"), total_of(run.stages, "tokens")
    if time_s:
        amount = f" and {value_label(tokens, 'plain')} tokens" if tokens else ""
        soon = "So far it has taken" if unfinished else "The whole way took"
        said.append(Markup("{} {}{}.").format(soon, human_time(time_s).replace(" ", "\N{NO-BREAK SPACE}"), amount))
    return Markup("").join(said) or Markup("Nothing has been measured yet; this page fills as the run goes on.")


def _tiles(run: RunFiles) -> Markup:
    tiles, base = [], run.overall("base")
    for name in SIDE_BY_SIDE:
        numbers = run.overall(name)
        if not has(numbers, "accuracy"):
            continue
        small = f"{span_of(numbers)}" if span_of(numbers) else "accuracy"
        if name != "base" and has(base, "accuracy"):
            small += f" · {100 * (numbers['accuracy'] - base['accuracy']):+.1f}"
        tiles.append(
            Markup(
                '<div class="tile"><div class="who"><i style="background:var(--s{})"></i>{}</div>'
                '<div class="big">{}</div><div class="small">{}</div></div>'
            ).format(COLOURS[name], name, percent(numbers), small)
        )
    return Markup('<div class="tiles">{}</div>').format(Markup("").join(tiles)) if tiles else Markup("")


def _traces(run: RunFiles) -> Markup:
    blocks = []
    for trace in run.traces[:N_TRACES]:
        answers = trace.get("by_checkpoint")
        answers = answers if isinstance(answers, dict) else {}
        cards = Markup("").join(
            trace_card(
                who=name,
                thinking=answers[name].get("thinking"),
                content=answers[name].get("content"),
                correct=bool(answers[name].get("correct")),
            )
            for name in SIDE_BY_SIDE
            if isinstance(answers.get(name), dict)
        )
        if cards:
            text = '<div class="problem"><div class="ask">{}</div><div class="want">right answer: {}</div></div>'
            asked = Markup(text).format(str(trace.get("problem", "")), str(trace.get("answer", NOTHING)))
            blocks.append(Markup('{}<div class="traces">{}</div>').format(asked, cards))
    if not blocks:
        return Markup("")
    more = Markup("<details><summary>{} more problems</summary>{}</details>").format(
        len(blocks) - 3, Markup("").join(blocks[3:])
    )
    return Markup(
        '<section id="traces"><h2>The same problem, side by side</h2><p class="note">Held-out problems, one sampled '
        "answer each. Dimmed: what the model thought. Bright: what it answered.</p>{}{}</section>"
    ).format(Markup("").join(blocks[:3]), more if len(blocks) > 3 else "")


def _recipe(run: RunFiles) -> Markup:
    if not run.recipe:
        return Markup("")
    return Markup(
        '<section id="recipe"><h2>Recipe</h2><details><summary>Every setting of this run, as resolved</summary>'
        "<pre>{}</pre></details></section>"
    ).format(run.recipe)
