"""The page of `abyssal eval --budget`: accuracy against the tokens that a question costs, by budget and by vote.

Owns what the page says. Does not own the numbers (evals/budget.py), drawing (evals/charts.py) or the sheet
(evals/page.py).
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from abyssal.evals.charts import Series, line_chart, value_label
from abyssal.evals.page import document
from abyssal.evals.page_tables import percent, span_of, table_of

TITLES = ["", "budget, tokens", "accuracy", "tokens a question", "tokens thought", "thinking cut", "answer cut off"]


def budget_page(results: dict[str, Any]) -> str:
    """`results` as the command writes them."""
    points = results["points"]
    # where no limit changed nothing it would only be drawn twice
    drawn = list({(p["best_of"], p["tokens"], p["accuracy"]): p for p in points}.values())
    counts = sorted({point["best_of"] for point in points})
    chart = line_chart(
        [
            Series(
                name=name_of(n),
                points=[(point["tokens"], point["accuracy"]) for point in line],
                spans=tuple((point["tokens"], point["ci_low"], point["ci_high"]) for point in line),
                colour=i,
                sparse=True,
            )
            for i, n in enumerate(counts)
            if (line := sorted((p for p in drawn if p["best_of"] == n), key=lambda point: point["tokens"]))
        ],
        title="Accuracy against tokens",
        x_label="tokens a question costs, thinking and answers together (log scale)",
        y_label="accuracy",
        fmt="percent",
        log_x=True,
        width=620,
        height=340,
    )
    rows = [
        [
            name_of(n) if first else "",
            "no limit" if point["budget"] is None else f"{point['budget']:,}",
            Markup("{} <small>{}</small>").format(percent(point), span_of(point)),
            value_label(point["tokens"], "plain"),
            f"{point['thinking_tokens']:.1f}",
            percent(point, "cut_share"),
            percent(point, "truncated_share"),
        ]
        for n in counts
        for first, point in ((i == 0, p) for i, p in enumerate(p for p in points if p["best_of"] == n))
    ]
    lead = Markup("{} problems of {}, {} answers each, temperature {:g}. {}").format(
        f"{results['n_problems']:,}", results["data"], results["answers"], results["temperature"], efforts(results)
    )
    note = (
        "A budget is the number of tokens between the marks of thinking, never exceeded. What thinks less, or not at "
        "all, is left as it is. Of several answers the majority counts. Bars: 95 % intervals, bootstrap by problem."
    )
    body = Markup(
        '<section><h2>What thinking buys</h2><p class="note">{}</p><figure class="wide">{}</figure>{}</section>'
    ).format(note, Markup(chart), table_of(TITLES, rows))
    return document(
        name=results["checkpoint"],
        written="",
        heading="Accuracy against tokens",
        header=Markup('<p class="lead">{}</p>').format(lead),
        body=body,
        footer="One file, no network. The numbers lie beside it, in budget.json.",
    )


def name_of(best_of: int) -> str:
    return "one answer" if best_of == 1 else f"majority of {best_of}"


def efforts(results: dict[str, Any]) -> str:
    """What low, medium and high effort now mean."""
    lengths = results["lengths"]
    if lengths is None:
        return "Too few right answers thought for efforts to be made of their lengths."
    said = ", ".join(f"{length:,} ({effort})" for effort, length in lengths["lengths"].items())
    return f"Of {lengths['n_answers']:,} right answers that thought, half, 80 % and 95 % took at most {said} tokens."
