"""What autograd keeps is counted by what it keeps, and what a process takes beside that is no less."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch

from abyssal.model.config import ModelConfig
from abyssal.plan.eager_memory import head_kept_bytes, head_scratch_bytes, layer_kept_bytes
from abyssal.plan.measure_memory import SMALL, TINY, SmallStep


@pytest.mark.parametrize(("config", "rows", "row_len"), [(TINY, 4, 16), (SMALL, 2, 64)], ids=["tiny", "small"])
def test_what_passes_is_what_the_plan_says_a_step_keeps(config: ModelConfig, rows: int, row_len: int):
    planned = head_kept_bytes(config, n_tokens=rows * row_len, precision="float32")
    planned += head_scratch_bytes(config, n_tokens=rows * row_len)
    for layer in range(config.num_hidden_layers):
        planned += layer_kept_bytes(
            config, layer, n_rows=rows, row_len=row_len, precision="float32", on_cpu=True
        )
    assert SmallStep(config, rows=rows, row_len=row_len).passing_bytes() == pytest.approx(planned, rel=0.15)


def test_weights_and_moments_last():
    step = SmallStep(TINY, rows=4, row_len=16)
    assert step.lasting_bytes == 3 * 4 * sum(p.numel() for p in step.model.parameters())


def test_a_step_moves_the_weights_and_leaves_no_gradient():
    step = SmallStep(TINY, rows=4, row_len=16)
    before = step.model.embed_tokens.weight.detach().clone()
    step()
    gc.collect()
    assert not torch.equal(before, step.model.embed_tokens.weight)
    assert all(p.grad is None for p in step.model.parameters())


def test_a_young_process_takes_more_than_its_tensors():
    """Between nothing and as much again: 1.33 on the machine that it was written on."""
    code = (
        "from abyssal.machine import keep_freed_memory; from abyssal.plan.measure_memory import *; "
        "keep_freed_memory(); print(runtime_bytes(), allocator_share())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    runtime, share = map(float, done.stdout.split())
    assert 1e6 < runtime < 1e9 and 1 <= share < 2.5
