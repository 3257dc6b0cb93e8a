"""The record survives a kill, a resume cuts it without doubling anything, and the screen stays readable."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from abyssal.record import (
    Recorder,
    append,
    cut_to_step,
    human_time,
    memory_gb,
    read_steps,
    seconds_of_work,
    short,
)


class Clock:
    """A clock that a test winds by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_each_step_is_on_disk_at_once(tmp_path):
    recorder = Recorder(tmp_path / "zero", "zero", 3, 9, console=quiet())
    recorder.step(0, 2, {"reward": 0.25, "time_s": 1.5})
    recorder.sample({"problem": "2+3", "content": "5"})
    # not closed: this is what a SIGKILL would leave
    assert json.loads((tmp_path / "zero/metrics.jsonl").read_text()) == {"step": 0, "reward": 0.25, "time_s": 1.5}
    assert json.loads((tmp_path / "zero/samples.jsonl").read_text()) == {"step": 0, "problem": "2+3", "content": "5"}
    recorder.close()


def test_a_resume_at_step_2_drops_steps_2_and_3_and_repeats_nothing(tmp_path):
    with Recorder(tmp_path, "zero", 3, 9, console=quiet()) as recorder:
        for step in range(4):
            recorder.step(step, 6, {"reward": step})
            recorder.sample({"content": str(step)})
    with Recorder(tmp_path, "zero", 3, 9, resume_from_step=2, console=quiet()) as recorder:
        assert steps_in(tmp_path / "metrics.jsonl") == steps_in(tmp_path / "samples.jsonl") == [0, 1]
        for step in range(2, 6):
            recorder.step(step, 6, {"reward": step})
    assert steps_in(tmp_path / "metrics.jsonl") == [0, 1, 2, 3, 4, 5]
    assert "resuming from step 2" in (tmp_path / "log.txt").read_text()


def test_a_fresh_start_leaves_nothing_of_the_old_run(tmp_path):
    for _ in range(2):
        with Recorder(tmp_path, "zero", 3, 9, console=quiet()) as recorder:
            recorder.step(0, 1, {"reward": 1})
    assert steps_in(tmp_path / "metrics.jsonl") == [0]


def test_half_a_line_left_by_a_kill_is_dropped_and_said(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "los')
    Recorder(tmp_path, "pretrain", 2, 9, resume_from_step=3, console=quiet()).close()
    assert steps_in(tmp_path / "metrics.jsonl") == [0, 1]
    assert "dropped 1 unreadable" in (tmp_path / "log.txt").read_text()


def test_the_cut_leaves_an_untouched_file_alone_and_no_partial_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n')
    before = path.stat().st_ino
    assert cut_to_step(path, 5) == (0, 0) and path.stat().st_ino == before
    assert cut_to_step(path, 0) == (1, 0) and path.read_text() == ""
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensors_nan_chinese_and_lone_surrogates_make_valid_json(tmp_path):
    with Recorder(tmp_path, "zero", 3, 9, console=quiet()) as recorder:
        metrics = {"loss": torch.tensor(0.5), "kl": np.float32(2), "entropy": float("nan"), "per_layer": [1.0]}
        recorder.step(0, 1, metrics)
        recorder.sample({"content": "答案 \ud800"})
    entry = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (entry["loss"], entry["kl"], entry["entropy"], entry["per_layer"]) == (0.5, 2.0, None, [1.0])
    text = (tmp_path / "samples.jsonl").read_text()
    assert "答案" in text and json.loads(text)["content"] == "答案 \ud800"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_a_one_line_error_with_a_remedy(tmp_path):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    recorder = Recorder(tmp_path, "zero", 3, 9, console=quiet())
    with pytest.raises(OSError, match=r"cannot write .*log\.txt: No space left on device; free some space") as caught:
        recorder.log("hello")
    assert "\n" not in str(caught.value)
    recorder.close()


def test_a_short_write_is_continued():
    class Slow(io.FileIO):
        def write(self, data):
            return super().write(bytes(data)[:3])

    with Slow("/dev/null", "wb") as file:
        append(file, b"0123456789", path=Path("x"))  # loops for ever or raises if the rest is not carried on


def test_a_pipe_gets_a_plain_line_every_ten_seconds_with_the_time_left(tmp_path):
    out, clock = io.StringIO(), Clock()
    with Recorder(tmp_path, "zero", 3, 9, console=Console(file=out), clock=clock) as recorder:
        for step in range(100):
            clock.now += 1.0
            recorder.step(step, 100, {"reward": 0.5, "loss": 1e-7, "comment": "not a number"})
    lines = out.getvalue().splitlines()
    assert len(lines) == 11  # steps 1, 11, ... 91, and the end
    assert lines[1] == "[3/9 zero] 11/100  reward 0.50  loss 1e-07  1 min 29 s left"
    assert lines[-1] == "[3/9 zero] 100/100  reward 0.50  loss 1e-07  done in 1 min 40 s"
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()


def test_the_line_never_wraps_on_a_narrow_terminal(tmp_path):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=50, color_system=None, _environ={"TERM": "xterm"})
    with Recorder(tmp_path, "zero", 3, 9, console=console) as recorder:
        recorder.step(0, 40, dict.fromkeys(["reward", "loss", "length", "entropy", "kl", "grad_norm", "lr"], 0.123456))
    shown = [line for line in out.getvalue().replace("\r", "\n").split("\n") if "reward" in line]
    assert shown and all("left" in line and line.count("[3/9 zero]") == 1 for line in shown)


def test_an_interrupted_stage_does_not_claim_to_be_done(tmp_path):
    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Recorder(tmp_path, "zero", 3, 9, console=Console(file=out)) as recorder:
        recorder.step(0, 2, {"reward": 1})
        raise KeyboardInterrupt
    assert "done" not in out.getvalue()


def test_human_readable():
    assert [human_time(s) for s in (0.4, 42, 200)] == ["0 s", "42 s", "3 min 20 s"]
    assert [human_time(s) for s in (3900, 180000)] == ["1 h 05 min", "2 d 02 h"]
    assert [short(v) for v in (0.0312, 0.5, 12480, 22.25, 310, 3e-7, 2.5e6)] == [
        "0.031", "0.50", "12k", "22.2", "310", "3e-07", "2.5M"]  # fmt: skip
    assert 0.01 < memory_gb() < 1000


def test_seconds_of_work_are_those_of_the_steps_without_the_measuring(tmp_path):
    steps = '{"step": 0, "time_s": 2.5}\n{"step": 1, "time_s": 4.0, "measure_s": 1.5}\n'
    (tmp_path / "metrics.jsonl").write_text(steps)
    assert seconds_of_work(read_steps(tmp_path / "metrics.jsonl")) == 5.0
    assert read_steps(tmp_path / "nothing.jsonl") == [] and seconds_of_work([]) == 0


def test_trouble_is_shown_first_and_only_while_there_is_some(tmp_path):
    out, clock = io.StringIO(), Clock()
    with Recorder(tmp_path, "zero", 3, 9, console=Console(file=out), clock=clock) as recorder:
        for step, n in enumerate((0.0, 3.0, 0.0)):
            clock.now += 60.0
            recorder.step(step, 3, {"reward": 0.5, "verifier_errors": n})
    first, second, third, last = out.getvalue().splitlines()
    assert "1/3  reward 0.50" in first and "2/3  undecided 3  reward 0.50" in second and "3/3  reward" in third


def test_what_is_said_aloud_stands_on_the_console_and_in_the_log(tmp_path):
    out = io.StringIO()
    with Recorder(tmp_path, "zero", 3, 9, console=Console(file=out)) as recorder:
        recorder.log("threads [1] -> [2]", aloud=True)
        recorder.log("quietly")
    assert out.getvalue() == "[3/9 zero] threads [1] -> [2]\n"
    assert "threads [1] -> [2]" in (tmp_path / "log.txt").read_text()
