"""A measured machine is written and read back; what is measured is in the right order of magnitude."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import torch

from abyssal.plan import measure_machine as module
from abyssal.plan.machine_file import read_machine
from abyssal.plan.measure_machine import Bench, measure_machine, rounded


@pytest.fixture
def few_products(monkeypatch: pytest.MonkeyPatch):
    """Otherwise it takes a minute."""
    monkeypatch.setattr(module, "SIZES", (64, 256))
    monkeypatch.setattr(module, "ENGINE_SHAPES", ((64, 256, 2),))
    monkeypatch.setattr(module, "POOL_BYTES", 4e6)
    monkeypatch.setattr(module, "LEAST_SECONDS", 3e-4)


def test_it_writes_what_it_returns(few_products: None, tmp_path: Path):
    threads = torch.get_num_threads()
    try:
        spec = measure_machine(threads=1, out=tmp_path / "new" / "here.toml", device="cpu")
    finally:
        torch.set_num_threads(threads)
    assert read_machine(tmp_path / "new" / "here.toml") == spec
    assert spec.kind == "cpu" and spec.n_devices == 1 and spec.price_usd_per_device_hour is None
    assert all(point.source.startswith("measured: ") for point in spec.gemm)
    assert {point.groups for point in spec.gemm} == {1, 8}
    # between a slow laptop and a fast server's core
    assert 1e9 < spec.peak_flops_per_second["float32"] < 1e13
    assert 1e8 < spec.memory_bytes_per_second.value < 1e12
    assert 1e-7 < spec.seconds_per_operation.value < 1e-3
    assert spec.attention_backward_flops_per_second.value > 1e8
    assert spec.allocator_share is not None and 1 <= spec.allocator_share.value < 2


def test_a_time_is_the_median_of_calls(monkeypatch: pytest.MonkeyPatch):
    """A call that takes 1 ms by the clock, but for every fourth, which somebody else held up."""
    bench, now, calls = Bench(torch.device("cpu"), 1), [0.0], itertools.count(1)

    def work() -> None:
        now[0] += 0.5 if next(calls) % 40 == 0 else 1e-3

    monkeypatch.setattr(bench, "clock", lambda: now[0])
    assert bench.seconds(work, repeats=5) == pytest.approx(1e-3)


def test_the_clock_of_one_thread_is_the_processors():
    assert Bench(torch.device("cpu"), 1).clock is time.process_time
    assert Bench(torch.device("cpu"), 2).clock is time.perf_counter


def test_a_product_that_is_all_call_has_no_rate():
    bench = Bench(torch.device("cpu"), 1)
    assert list(bench.point("float32", 1, 1, 16, 16, 3e-6, 2e-6)) == []
    (point,) = bench.point("float32", 1, 100, 100, 100, 12e-6, 2e-6)
    assert point.flops_per_second == rounded(2e6 / 10e-6)


def test_operands_come_in_turn_and_large_ones_repeat(few_products: None):
    bench = Bench(torch.device("cpu"), 1)
    assert [tuple(x.shape) for x in bench.operands("float32", (100, 2000))] == [(100, 2000)] * 5
    first, second, *_ = bench.operands("float32", (100, 2000))
    assert first.data_ptr() != second.data_ptr()
    (large,) = bench.operands("bfloat16", (2000, 2000))
    assert large.shape == (2000, 2000) and large.dtype == torch.bfloat16
