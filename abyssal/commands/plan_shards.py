"""`abyssal plan --shards`: every rank's shard of the recipe's model, built on the meta device, beside the plan."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from abyssal.evals.page_tables import table_of
from abyssal.plan.in_words import bytes_text, deviation_text
from abyssal.plan.rank_shards import AllShards, ShardRow

TITLES = ("ranks", "pipeline ranks", "hold", "part", "built", "planned", "plan")


def together(shards: AllShards) -> str:
    """What all ranks hold, in a sentence."""
    ranks = "One rank holds" if shards.n_ranks == 1 else f"{shards.n_ranks:,} ranks hold"
    mtp = f", and {shards.n_mtp_weights:,} of MTP modules" if shards.n_mtp_weights else ""
    return f"{ranks} {shards.n_weights:,} weights{mtp}, each counted once."


def cells(rows: Sequence[ShardRow]) -> list[list[str]]:
    """What a class has said once is left out of its other lines."""
    table, before = [], None
    for row in rows:
        head = (f"{row.n_ranks:,}", spans(row.pipeline_ranks), row.holds)
        shown = ("", "", "") if head == before else head
        deviation = deviation_text(row.planned_bytes, row.built_bytes) if row.built_bytes else ""
        table.append([*shown, row.part, bytes_text(row.built_bytes), bytes_text(row.planned_bytes), deviation])
        before = head
    return table


def print_shards(shards: AllShards, console: Console) -> None:
    console.print("\n[bold]shards[/bold], built on the meta device, in bytes of one rank")
    console.print(together(shards), highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for title in TITLES:
        table.add_column(title, justify="left" if title in ("hold", "part") else "right")
    for row in cells(shards.rows):
        table.add_row(*row)
    console.print(table)


def shards_section(shards: AllShards) -> Markup:
    note = "Names and shapes are those of the model itself, cut as the layout says; nothing of it is in memory."
    return Markup('<p class="note">{} {}</p>{}').format(
        together(shards), note, table_of(list(TITLES), cells(shards.rows))
    )


def spans(ranks: Sequence[int]) -> str:
    """(0, 1, 2, 5) -> '0-2, 5'."""
    starts = [rank for rank in ranks if rank - 1 not in ranks]
    ends = [rank for rank in ranks if rank + 1 not in ranks]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
