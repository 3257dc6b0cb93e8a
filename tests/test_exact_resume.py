"""SIGKILL anywhere, run again: weights, optimizer states and records have the bits of a run without an interruption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from abyssal.stages.run import STAGES

ROOT = Path(__file__).parents[1]
KILLED = STAGES[:-1]  # the report is drawn from what is there

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and asks the kernel for orphans")


def attempts(home: Path, *, points: int, stages: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """What kill_lab.py tells, one line an attempt, those without a kill first."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_lab.py")), str(home), str(points), *stages],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [entry for entry in told if entry["wrong"]], [entry for entry in told if entry["wrong"]]
    assert {entry["stage"] for entry in told} == set(KILLED)
    killed = [entry for entry in told if entry["point"] != "none"]
    assert all(entry["killed"] == -9 and entry["ended"] == 0 for entry in killed)
    return killed


@pytest.mark.way
def test_sigkill_anywhere_gives_the_same_bits(tmp_path: Path):
    killed = attempts(tmp_path, points=3)
    assert len(killed) == 3 * len(KILLED)
    in_rollouts = {entry["stage"] for entry in killed if "rollout" in entry["point"]}
    assert in_rollouts == set(KILLED) - {"tokenize", "pretrain", "extend"}
    whole = tmp_path / "whole" / "micro"
    for stage in ("zero", "reason", "align"):  # there was something to learn, or equal weights would say little
        metrics = [json.loads(line) for line in (whole / stage / "metrics.jsonl").read_text().splitlines()]
        assert any(entry["zero_variance_share"] < 1 for entry in metrics), stage
    assert list(whole.rglob("verdicts.jsonl"))  # and something undecided


@pytest.mark.slow
def test_sigkill_at_many_more_points_gives_the_same_bits(tmp_path: Path):
    assert len(attempts(tmp_path, points=10)) == 10 * len(KILLED)
