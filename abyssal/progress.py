"""A bar for work that is counted, in bytes or in steps: how far, how long still. Owns a line of the console meanwhile.

What is done within a second shows nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

SHOWN_AFTER_S = 1.0


@contextmanager
def bytes_bar(
    title: str, console: Console, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int, int], None]]:
    """Yields what is to be called with the bytes done and the bytes in all. The bar is gone when the block ends."""
    with _bar(title, console, (DownloadColumn(), TransferSpeedColumn()), clock=clock) as update:
        yield update


@contextmanager
def steps_bar(
    title: str, console: Console, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int, int], None]]:
    """The same for steps: yields what is to be called with those done and those in all."""
    with _bar(title, console, (MofNCompleteColumn(),), clock=clock) as update:
        yield update


@contextmanager
def _bar(
    title: str, console: Console, columns: Sequence[ProgressColumn], *, clock: Callable[[], float]
) -> Iterator[Callable[[int, int], None]]:
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        auto_refresh=False,  # no thread beside the one that works
    )
    began = clock()
    task = bar.add_task(title, total=None)

    def update(n_done: int, n_all: int) -> None:
        bar.update(task, completed=n_done, total=n_all)
        if clock() - began >= SHOWN_AFTER_S and console.is_terminal:
            bar.start()
            bar.refresh()

    try:
        yield update
    finally:
        if bar.live.is_started:  # else stopping writes an empty line
            bar.stop()
