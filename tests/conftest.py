"""What every test relies on: one thread per process, no wall-clock limits, no GPU tests without a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# one seed for all machines and no deadline: a slow machine is not a bug
settings.register_profile("abyssal", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("abyssal")


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
