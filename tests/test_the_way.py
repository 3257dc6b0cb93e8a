"""The whole way, by the command, in a folder of a user's own: killed in two places, taken up, finished, looked at.

One run is walked for all tests: SIGKILL in pretraining, SIGKILL in the middle of a step of R1-Zero, then to the end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import abyssal
from abyssal.checkpoint.load import load_checkpoint
from abyssal.cli import dispatch
from abyssal.data.held_out import is_held_out
from abyssal.data.problems import problem_at
from abyssal.stages.recipe import Recipe, read_recipe
from abyssal.stages.run import CHECKPOINTS, FIRST_PROBLEM, STAGES
from abyssal.stages.steps import seconds_allowed
from abyssal.stages.way import open_run
from abyssal.tokens.tokenizer import Tokenizer

pytestmark = pytest.mark.way

ROOT = Path(__file__).parents[1]
MICRO = Path(__file__).with_name("micro.toml")
N_HELD_OUT = 5
REWARD = '''
import os
import signal
from pathlib import Path


def short(problem, message):
    """Right if short. With KILL_IN set, who asks dies while it grades the step after three recorded ones."""
    metrics = Path(os.environ["KILL_IN"]) if "KILL_IN" in os.environ else None
    if metrics is not None and metrics.exists() and metrics.read_text().count("\\n") == 3:
        os.kill(os.getppid(), signal.SIGKILL)
    return float(len(message.content) < 10)
'''


@dataclass(frozen=True)
class Walked:
    home: Path  # where the user stands
    recipe: Recipe
    after_kill: dict[str, list[int]]  # steps in metrics.jsonl when the process died
    resumed_from: dict[str, int]
    output: str

    @property
    def run(self) -> Path:
        return self.home / "out" / "micro"

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / name).read_text(encoding="utf-8").splitlines()]


def command(*arguments: str) -> list[str]:
    """As the installed script runs: -P keeps the current folder off the path, so that only the cli can put it there."""
    return [sys.executable, "-P", "-m", "abyssal.cli", *arguments]


def environment(**extra: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | extra


def start(home: Path, *arguments: str, **extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments), cwd=home, env=environment(**extra), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(home: Path, *arguments: str) -> str:
    process = start(home, *arguments)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def steps_of(path: Path) -> list[int]:
    """Of whole lines: the last one may be half written."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def kill_in_pretraining(home: Path, metrics: Path, n_steps: int) -> None:
    process = start(home, "run", str(MICRO))
    while len(steps_of(metrics)) < n_steps:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def users_own(home: Path) -> None:
    """A corpus, conversations, problems and a reward, as a user might lay them out."""
    words = "the sea is deep and the light is far away so we go down slowly".split()
    (home / "corpus").mkdir()
    for i in range(40):
        text = " ".join(words[(i * j) % len(words)] for j in range(1, 60))
        (home / "corpus" / f"{i}.txt").write_text(f"{text} number {i}.\n")
    asked = [
        {"prompt": f"say {i}", "answer": str(i), "key": f"say {i}", "verifier": "own_reward:short"} for i in range(35)
    ]
    chats = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}!"}]}
        for i in range(8)
    ]
    for name, entries in (
        ("own_train.jsonl", asked[N_HELD_OUT:]), ("own_held_out.jsonl", asked[:N_HELD_OUT]), ("own_sft.jsonl", chats),
    ):  # fmt: skip
        (home / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (home / "own_reward.py").write_text(REWARD)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Walked:
    home = tmp_path_factory.mktemp("home")
    users_own(home)
    run = home / "out" / "micro"
    metrics = {stage: run / stage / "metrics.jsonl" for stage in ("pretrain", "zero")}
    kill_in_pretraining(home, metrics["pretrain"], 20)
    after_kill = {"pretrain": steps_of(metrics["pretrain"])}
    process = start(home, "run", str(MICRO), KILL_IN=str(metrics["zero"]))
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    after_kill["zero"] = steps_of(metrics["zero"])
    output = finish(home, "run", str(MICRO))
    resumed = {
        stage: int(re.findall(r"resuming from step (\d+)", (run / stage / "log.txt").read_text())[-1])
        for stage in metrics
    }
    return Walked(home, read_recipe(MICRO), after_kill, resumed, output)


def test_every_stage_is_done_and_the_report_is_there(walked: Walked):
    for stage in STAGES:
        done = json.loads((walked.run / stage / "done.json").read_text())
        assert done["stage"] == stage and done["threads"] == 1
    page = (walked.run / "report.html").read_text(encoding="utf-8")
    assert "<html" in page and all(name in page for name in CHECKPOINTS.values())
    assert "http://" not in page.replace("http://www.w3.org", "") and 'src="http' not in page
    assert "Warning" not in walked.output and "Traceback" not in walked.output
    assert "held-out problems" in walked.output and "abyssal chat out/micro/r1" in walked.output
    assert not list(walked.run.rglob("*.partial")) and not list(walked.run.rglob("*.new"))


@pytest.mark.parametrize(("stage", "save_every", "n_steps"), [("pretrain", 15, 60), ("zero", 2, 6)])
def test_a_killed_stage_goes_on_from_its_last_checkpoint(walked: Walked, stage: str, save_every: int, n_steps: int):
    died_after = len(walked.after_kill[stage])
    assert 0 < died_after < n_steps
    assert walked.resumed_from[stage] == died_after // save_every * save_every > 0
    steps = [entry["step"] for entry in walked.lines(f"{stage}/metrics.jsonl")]
    assert steps == list(range(n_steps))  # each once, none missing
    if stage == "zero":
        assert [entry["step"] for entry in walked.lines("zero/samples.jsonl")] == list(range(n_steps))


@pytest.mark.parametrize("part", ["pretrain", "zero", "cold_start/traces", "cold_start", "align", "distil"])
def test_every_stage_ends_with_its_plan_beside_what_was_measured(walked: Walked, part: str):
    *before, last = walked.lines(f"{part}/metrics.jsonl")
    assert last["planned_step_seconds"] > 0 and last["measured_step_seconds"] > 0
    assert not any("planned_step_seconds" in entry for entry in before)
    assert ("planned_memory_bytes" in last) == ("/" not in part)
    assert f"{part}: a step planned " in walked.output or part == "pretrain"  # which ended before the last session


def test_a_second_run_finds_everything_done(walked: Walked):
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in walked.run.rglob("*") if path.is_file()}

    before = written()
    output = finish(walked.home, "run", str(MICRO))
    assert output.count("already done") == len(STAGES)
    after = written()
    changed = {path.name for path in before | after if before.get(path) != after.get(path)}
    assert changed <= {"recipe.toml", ".lock"}


def test_every_checkpoint_says_how_far_the_engine_is_from_the_trainer(walked: Walked):
    """On the engine's experts FP32 agrees everywhere; BF16 is rounded, and its gap is a number in the report."""
    checkpoints = json.loads((walked.run / "eval" / "results.json").read_text())["checkpoints"]
    for name, entry in checkpoints.items():
        gap = entry["engine_gap"]
        assert gap["float32"]["largest"] <= 1e-5 and gap["float32"]["n_tokens"] > 0, name
        assert 0 <= gap["bfloat16"]["mean"] <= gap["bfloat16"]["largest"] < 1, name
    assert checkpoints["r1"]["engine_gap"]["bfloat16"]["mean"] > 0  # latents: the engine absorbs, the trainer expands
    assert "BF16, flips" in (walked.run / "report.html").read_text(encoding="utf-8")


def test_align_has_a_reward_model_and_watches_it(walked: Walked):
    done = json.loads((walked.run / "align" / "done.json").read_text())
    heads = json.loads((walked.run / "align" / "reward_model" / "done.json").read_text())["heads"]
    assert done["reward_model"] == heads and set(heads) == {"helpfulness", "safety"}
    for head, facts in heads.items():
        assert f"{head} orders {100 * facts['accuracy']:.0f} % of {facts['pairs']} held-out pairs" in walked.output
    (step,) = walked.lines("align/metrics.jsonl")
    assert {"preference_reward", "preference_truth", "held_out_preference_truth"} <= set(step)
    page = (walked.run / "report.html").read_text(encoding="utf-8")
    assert "Reward model against hidden truth" in page and "Pairs ordered rightly" in page


@pytest.mark.parametrize("name", CHECKPOINTS.values())
def test_every_checkpoint_loads_in_transformers_and_says_the_same(walked: Walked, name: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stage = next(stage for stage, leaves in CHECKPOINTS.items() if leaves == name)
    path = walked.run / stage / "checkpoint"
    theirs, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    config = walked.recipe.student if name.startswith("student") else walked.recipe.model
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info.get("error_msgs")
    mtp = f"model.layers.{config.num_hidden_layers}."
    assert all(key.startswith(mtp) for key in info["unexpected_keys"]), info["unexpected_keys"]
    lm = abyssal.load(path)
    text = "say 12"
    assert AutoTokenizer.from_pretrained(path)(text)["input_ids"] == lm.tokenizer.encode(text)
    ids_BT = torch.tensor([lm.tokenizer.encode(text) * 3])
    with torch.inference_mode():
        logits_BTV = theirs(ids_BT).logits
    assert torch.allclose(logits_BTV, lm.logits(ids_BT), atol=1e-4)


def test_the_students_active_size_is_smaller_and_its_shape_dense(walked: Walked):
    config = load_checkpoint(walked.run / "distil" / "checkpoint").config
    assert (config.attention, config.feed_forward) == ("gqa", "dense")


def test_the_students_arms_start_from_one_base_and_end_apart(walked: Walked):
    def weights(stage: str) -> bytes:
        return (walked.run / stage / "checkpoint" / "model.safetensors").read_bytes()

    stages = ("distil/base", "distil", "student_rl", "on_policy")
    assert any(entry["zero_variance_share"] < 1 for entry in walked.lines("student_rl/metrics.jsonl"))
    assert len({weights(stage) for stage in stages}) == 4
    for stage in stages[1:]:
        assert walked.lines(f"{stage}/metrics.jsonl")
    results = json.loads((walked.run / "eval" / "results.json").read_text())
    for name in ("student", "student_rl", "student_opd"):
        gain = results["checkpoints"][name]["overall"]["gain_over_student_base"]
        assert gain["low"] <= gain["value"] <= gain["high"]
    assert list(results["budget"]) == ["r1", "student_opd"]
    assert [point["budget"] for point in results["budget"]["r1"]] == [0, 4]
    page = (walked.run / "report.html").read_text(encoding="utf-8")
    assert 'id="arms"' in page and 'id="budget"' in page


def test_zero_seconds_are_as_many_as_distillation_took(walked: Walked):
    """r1's writing of the traces and the SFT on them, without the pretraining that all arms share."""
    run = open_run(replace(walked.recipe, run=replace(walked.recipe.run, out=str(walked.home / "out"))), Console())
    took = sum(e["time_s"] for part in ("distil", "distil/traces") for e in walked.lines(f"{part}/metrics.jsonl"))
    assert seconds_allowed(run, "student_rl", 0.0) == pytest.approx(took) and took > 0
    assert seconds_allowed(run, "student_rl", 3.5) == 3.5
    empty = replace(run, directory=walked.home / "nothing")
    with pytest.raises(ValueError, match="on_policy.seconds=0 is as many as distil took, which is not done"):
        seconds_allowed(empty, "on_policy", 0.0)


def test_any_teachers_traces_are_enough_to_distil(walked: Walked, tmp_path: Path):
    """No r1, no RL, no traces of our own: a tokenizer, the student's base and a file of conversations."""
    users_own(tmp_path)
    run = tmp_path / "out" / "micro"
    run.mkdir(parents=True)
    shutil.copytree(walked.run / "tokenize", run / "tokenize")
    options = ("--distil.traces.problems", "0", "--distil.data", "own_sft.jsonl", "--distil.sft.row-len", "128")
    finish(tmp_path, "distil", str(MICRO), *options)
    done = json.loads((run / "distil" / "done.json").read_text())
    assert (done["traces"], done["own"]) == (0, 8)
    assert not (run / "distil" / "traces.jsonl").exists()
    assert load_checkpoint(run / "distil" / "checkpoint").config.feed_forward == "dense"
    # arms without steps are passed over, and leave nothing to be evaluated
    said = finish(tmp_path, "student_rl", str(MICRO), *options, "--student-rl.steps", "0")
    assert "student_rl] off in this recipe" in said and not (run / "student_rl").exists()
    (tmp_path / "broken.jsonl").write_text('{"messages": [{"role": "teacher", "content": "hm"}]}\n')
    refused = start(tmp_path, "distil", str(MICRO), *options[:2], "--distil.data", "broken.jsonl", "--run.name", "b")
    said, _ = refused.communicate()
    assert refused.returncode == 1 and "role 'teacher'; use one of system, user, assistant" in said


def test_what_is_held_out_is_trained_on_nowhere(walked: Walked):
    """By key for the generators' problems, and word by word in what was written down."""
    source, seed = walked.recipe.data.problems, walked.recipe.run.seed
    for first in (0, *FIRST_PROBLEM.values()):  # pretraining begins at 0
        keys = [problem_at(source, seed, first + i).key for i in range(200)]
        assert not any(is_held_out(key, source.held_out) for key in keys)
    measured = [problem_at(source, seed, first + i, "held_out") for first in (0, 1_000_000) for i in range(200)]
    assert all(is_held_out(problem.key, source.held_out) for problem in measured)

    tokenizer = Tokenizer.load(walked.run / "tokenize" / "tokenizer")
    tokens = np.fromfile(walked.run / "tokenize" / "train" / "tokens-00000.bin", dtype=np.uint16)
    questions = asked_in(tokens.tolist(), tokenizer)
    assert len(questions) > 100
    assert questions.isdisjoint(problem.prompt for problem in measured)
    held_out_tokens = np.fromfile(walked.run / "tokenize" / "held_out" / "tokens-00000.bin", dtype=np.uint16)
    assert asked_in(held_out_tokens.tolist(), tokenizer).isdisjoint(questions)


def asked_in(ids: list[int], tokenizer: Tokenizer) -> set[str]:
    """Every question of a file of tokens."""
    questions = set()
    for i, token in enumerate(ids):
        if token == tokenizer.user_id and tokenizer.assistant_id in ids[i : i + 200]:
            questions.add(tokenizer.decode(ids[i + 1 : ids.index(tokenizer.assistant_id, i)]))
    return questions


def test_a_users_own_data_is_what_is_trained_on_and_measured(walked: Walked):
    kept_out = {f"say {i}" for i in range(N_HELD_OUT)}
    trained = ("zero", "reason", "align", "student_rl", "on_policy")
    samples = [walked.lines(f"{stage}/samples.jsonl") for stage in trained]
    # the open requests of `align` are the generators' own, whatever the problems are
    seen = {entry["problem"] for of_stage in samples for entry in of_stage if entry["family"] != "requests"}
    traced = {
        entry["messages"][0]["content"]
        for stage in ("cold_start", "reject", "distil")
        for entry in walked.lines(f"{stage}/traces.jsonl")
    }
    assert seen and traced and all(re.fullmatch(r"say \d+", prompt) for prompt in seen | traced)
    assert kept_out.isdisjoint(seen | traced)
    assert json.loads((walked.run / "cold_start" / "done.json").read_text())["own"] == 8
    results = json.loads((walked.run / "eval" / "results.json").read_text())["checkpoints"]
    assert list(results) == list(CHECKPOINTS.values())
    # six problems were asked for and five are there: none is asked twice
    assert {entry["overall"]["n_problems"] for entry in results.values()} == {N_HELD_OUT}
    traces = json.loads((walked.run / "eval" / "traces.json").read_text())
    assert {trace["problem"] for trace in traces} <= kept_out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--pretrain.lr", "0.5"), r"\[pretrain\]"),
        (("--run.seed", "7"), "run.seed"),
        (("--rl-data.held-out", ""), r"\[rl_data\]"),
        (("--distil.sft.epochs", "9"), r"\[distil\]"),
        (("--reward-model.lr", "0.5"), r"\[reward_model\]"),
    ],
)
def test_a_changed_recipe_is_refused_once_its_stage_has_begun(
    walked: Walked, monkeypatch: pytest.MonkeyPatch, change: tuple[str, ...], named: str
):
    monkeypatch.chdir(walked.home)
    before = (walked.run / "recipe.toml").read_bytes()
    with pytest.raises(ValueError, match=f"was begun with another {named}; give this run another name"):
        dispatch(["run", str(MICRO), *change])
    assert (walked.run / "recipe.toml").read_bytes() == before


def test_a_later_checkpoint_makes_an_earlier_evaluation_and_report_new(walked: Walked, tmp_path: Path):
    """`eval` run half-way through is done again when the stages after it have left their checkpoints."""
    users_own(tmp_path)
    half = tmp_path / "out" / "micro"
    shutil.copytree(walked.run, half)
    for stage in ("distil", "eval", "report"):
        shutil.rmtree(half / stage)
    finish(tmp_path, "eval", str(MICRO))
    assert "student" not in json.loads((half / "eval" / "results.json").read_text())["checkpoints"]
    finish(tmp_path, "run", str(MICRO))
    assert "student" in json.loads((half / "eval" / "results.json").read_text())["checkpoints"]
