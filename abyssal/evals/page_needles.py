"""Needles found by context length and depth, before and after context extension: the chapter "Long context".

Owns what is drawn of extend/needle.json. Does not own the measure (evals/needle.py) nor the drawing (evals/charts.py).
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from abyssal.evals.charts import heat_map


def needles_section(found: dict[str, Any]) -> Markup:
    """A heat map for each model that was asked; empty where the run has extended nothing."""
    accuracy, lengths, depths = (found.get(key) for key in ("accuracy", "lengths", "depths"))
    if not (isinstance(accuracy, dict) and isinstance(lengths, list) and isinstance(depths, list)):
        return Markup("")
    trained = found.get("trained")
    trained = trained if isinstance(trained, dict) else {}
    figures = [
        Markup("<figure>{}</figure>").format(
            Markup(
                heat_map(
                    [list(line) for line in zip(*by_length, strict=True)],
                    title=f"{name[:1].upper()}{name[1:]}, % found",
                    columns=[str(length) for length in lengths],
                    rows=[f"{100 * depth:.0f} %" for depth in depths],
                    x_label="tokens",
                    y_label="depth",
                    mark_after=sum(length <= trained.get(name, 0) for length in lengths),
                )
            )
        )
        for name, by_length in accuracy.items()
    ]
    keys, documents = found.get("keys"), found.get("documents")
    among = f" among {keys} such lines" if isinstance(keys, int) and keys > 1 else ""
    note = (
        f"A line “The code of amber is 4821.” hidden in held-out text{among} and asked for at the "
        f"end; {documents} documents a cell, right only where every token of the answer is the likeliest. Dashed: the "
        f"length of the rows each model was trained on."
    )
    return Markup(
        '<section id="needles"><h2>A needle in a haystack</h2><p class="note">{}</p>'
        '<div class="charts">{}</div></section>'
    ).format(note, Markup("").join(figures))
