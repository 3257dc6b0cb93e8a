"""The plan beside what was measured: in the last entry of metrics.jsonl and on the screen."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from abyssal.plan.machine_file import Sourced, read_machine
from abyssal.plan.memory_limit import MemoryLimit
from abyssal.plan.stage_plan import StagePlan
from abyssal.record import amend_last
from abyssal.stages.beside_plan import Forecast, begin_measuring, forecast, peak_above, process_bytes, say_beside
from abyssal.stages.machine_here import MachineHere, built_in, machine_here, measured_file
from abyssal.stages.recipe import read_recipe, with_precision

CPU = torch.device("cpu")
RUNS = Path(__file__).parents[1] / "runs"


def planned(stage: str, *, step_seconds: float, memory_bytes: float) -> StagePlan:
    return StagePlan(
        stage=stage,
        what="",
        n_steps=3,
        tokens=30,
        n_devices=1,
        price_usd_per_device_hour=None,
        step_seconds_by_part={"compute": step_seconds},
        memory_bytes_by_part=({"weights": memory_bytes},),
        memory_limit_bytes=1e9,
        bottleneck="",
        advice="",
    )


def foreseen(*plans: StagePlan) -> Forecast:
    limit = MemoryLimit(10**9, 10**9, "RAM")
    exact = replace(read_machine("laptop"), runtime_bytes=None, allocator_share=None)
    here = MachineHere(exact, limit, "with machines/laptop.toml")
    return Forecast({plan.stage: plan for plan in plans}, {}, here)


def steps(directory: Path, *seconds: float, **more: float) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": k, "time_s": s, **more}) + "\n" for k, s in enumerate(seconds)))
    return path


def test_the_pair_stands_in_the_last_entry_and_on_the_screen(tmp_path: Path):
    """Steps of 1, 2 and 3 s, half a second of each spent measuring: a mean of 1.5 s of work, where 1.2 was planned."""
    console = Console(file=io.StringIO(), width=300)
    path = steps(tmp_path / "zero", 1.0, 2.0, 3.0, measure_s=0.5)
    plan = planned("zero", step_seconds=1.2, memory_bytes=100e6)
    say_beside(foreseen(plan), "zero", tmp_path, memory_bytes=125_000_000, console=console)
    first, _, last = (json.loads(line) for line in path.read_text().splitlines())
    assert first == {"step": 0, "time_s": 1.0, "measure_s": 0.5}
    assert last == {
        "step": 2, "time_s": 3.0, "measure_s": 0.5, "planned_step_seconds": 1.2, "measured_step_seconds": 1.5,
        "planned_memory_bytes": 100e6, "measured_memory_bytes": 125_000_000,
    }  # fmt: skip
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said == (
        "zero: a step planned 1.2 s, measured 1.5 s (plan -20.0 %); memory planned 100 MB, measured 125 MB "
        "(plan -20.0 %); with machines/laptop.toml\n"
    )


def test_parts_of_a_stage_have_their_own_times_and_the_fullest_its_memory(tmp_path: Path):
    console = Console(file=io.StringIO(), width=300)
    traces, sft = steps(tmp_path / "distil" / "traces", 4.0), steps(tmp_path / "distil", 2.0)
    plans = (
        planned("distil/traces", step_seconds=2.0, memory_bytes=80e6),
        planned("distil", step_seconds=2.0, memory_bytes=50e6),
        planned("distil/base", step_seconds=1.0, memory_bytes=10e6),  # it was trained in an earlier session
    )
    say_beside(foreseen(*plans), "distil", tmp_path, memory_bytes=40_000_000, console=console)
    of_traces, of_sft = (json.loads(path.read_text()) for path in (traces, sft))
    assert of_traces["measured_step_seconds"] == 4.0 and "planned_memory_bytes" not in of_traces
    assert of_sft["planned_memory_bytes"] == 80e6 and of_sft["measured_memory_bytes"] == 40_000_000
    assert "distil/base" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_answers_of_another_length_than_planned_are_said(tmp_path: Path):
    """60 tokens were planned to be drawn in 3 steps of 2 answers, 10 each; they were 12 long."""
    console = Console(file=io.StringIO(), width=300)
    steps(tmp_path / "zero", 1.0, 1.0, length=12.0)
    plan = replace(planned("zero", step_seconds=1.0, memory_bytes=1e6), answer_tokens=10.0)
    say_beside(foreseen(plan), "zero", tmp_path, memory_bytes=0, console=console)
    assert "answers of 12 tokens, planned 10; with" in console.file.getvalue()  # type: ignore[attr-defined]


def test_libraries_and_holes_are_part_of_what_the_system_shows():
    """100 MB of weights that last and 50 MB of activations that come and go: 20 MB of libraries, a fifth of holes."""
    plan = replace(
        planned("pretrain", step_seconds=1.0, memory_bytes=0.0),
        memory_bytes_by_part=({"weights": 100e6, "activations": 50e6},),
    )
    of_test = {
        name: Sourced(value=value, source="the test")
        for name, value in (("runtime_bytes", 20e6), ("allocator_share", 1.2))
    }
    assert process_bytes(plan, replace(read_machine("laptop"), **of_test)) == pytest.approx(180e6)


def test_amending_twice_leaves_one_pair_and_the_other_lines_as_they_were(tmp_path: Path):
    path = steps(tmp_path / "zero", 1.0, 2.0)
    before = path.read_text().splitlines()
    amend_last(path, {"planned_step_seconds": 1.0})
    amend_last(path, {"planned_step_seconds": 2.0})
    after = path.read_text().splitlines()
    assert after[0] == before[0] and json.loads(after[1]) == {"step": 1, "time_s": 2.0, "planned_step_seconds": 2.0}
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_stages_peak_is_measured_above_what_was_there_before():
    before = begin_measuring(CPU)
    if not before:
        return  # no Linux
    block = torch.ones(40_000_000)  # 160 MB
    assert 150e6 < peak_above(before, CPU) < 260e6
    del block


def test_a_recipe_is_planned_for_one_device_here_whatever_machine_it_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("ABYSSAL_CACHE", str(tmp_path))
    recipe = with_precision(read_recipe(RUNS / "one_gpu.toml"), "float32")
    found = forecast(recipe, CPU, ("tokenize", "pretrain", "zero"))
    assert list(found.plans) == ["pretrain", "zero"] and not found.unplanned
    assert found.here.note.startswith("with machines/laptop.toml for want of a measured file")
    assert all(plan.n_devices == 1 for plan in found.plans.values())
    assert found.plans["pretrain"].memory_limit_bytes == found.here.limit.limit_bytes


def test_a_measured_file_is_one_for_each_number_of_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("ABYSSAL_CACHE", str(tmp_path))
    one, two = (measured_file(CPU, n) for n in (1, 2))
    assert one != two and one.parent == tmp_path / "machines"
    one.parent.mkdir()
    one.write_text((Path(__file__).parents[1] / "machines" / "laptop.toml").read_text())
    assert "as measured here" in machine_here(CPU, 1).note and "for want of" in machine_here(CPU, 2).note


def test_a_gpu_that_nobody_measured_is_taken_for_one_of_its_kind():
    assert built_in("NVIDIA H100 80GB HBM3") == "h100x1024" and built_in("NVIDIA GeForce RTX 3060") == "rtx4090"
