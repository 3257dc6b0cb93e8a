"""Work done for many at once, of which one may fail: the one is found, the others get theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def isolate(n: int, work: Callable[[np.ndarray], T]) -> tuple[list[T], dict[int, str]]:
    """`work` on the places 0..n-1 together; where it raises, on each half, down to the one to blame.

    Returns the parts that were done, in order, and the error of each place that fails even alone. `work` must leave
    nothing half done that doing it again would not overwrite. Ctrl-C is no error of anybody's and goes through.
    """
    done: list[T] = []
    errors: dict[int, str] = {}
    todo = [np.arange(n)]
    while todo:
        places = todo.pop()
        try:
            done.append(work(places))
        except Exception as error:  # whatever it is
            if len(places) == 1:
                errors[int(places[0])] = said(error)
            else:
                half = len(places) // 2
                todo += [places[half:], places[:half]]
    return done, errors


def said(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
