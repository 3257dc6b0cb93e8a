from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from abyssal.machine import leave_busy_cores


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch uses two threads and the process may run on four cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "running, threads",
    [
        (1, 2),  # nobody but this process
        (3, 2),  # two others: two cores are left
        (4, 1),
        (9, 1),  # more than there are cores
    ],
)
def test_threads_are_no_more_than_the_cores_that_others_leave(tmp_path: Path, running: int, threads: int):
    (tmp_path / "load").write_text(f"6.43 5.73 5.44 {running}/126 2705\n")
    leave_busy_cores(tmp_path / "load")
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("text", [None, "", "1 2 3 many/7 8"])
def test_where_the_system_does_not_say_threads_stay(tmp_path: Path, text: str | None):
    if text is not None:
        (tmp_path / "load").write_text(text)
    leave_busy_cores(tmp_path / "load")
    assert torch.get_num_threads() == 2
