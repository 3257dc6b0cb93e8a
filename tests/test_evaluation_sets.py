"""The questions that training text is kept clear of are the very ones that the stages ask."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from abyssal.data.preferences import request_at
from abyssal.evals.tasks import Result
from abyssal.record import Recorder
from abyssal.stages import measure as measuring
from abyssal.stages import reward_model, rl, steps
from abyssal.stages.recipe import Recipe, RlDataConfig, read_recipe
from abyssal.stages.run import Run
from abyssal.types import Problem

LAPTOP = Path(__file__).parents[1] / "runs" / "laptop.toml"


def run_of(recipe: Recipe, directory: Path) -> Run:
    return Run(recipe, directory, torch.device("cpu"), Console(quiet=True))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return run_of(read_recipe(LAPTOP), tmp_path)


def sets_of(run: Run) -> dict[str, list[str]]:
    """As `run_tokenize` asks for them."""
    told: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "tokenize", lambda *a, **options: told.update(options) or SimpleNamespace(vocab_size=0))
        steps.run_tokenize(run, "tokenize", None)
    return told["evaluation"]


def asked_by_eval(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the stage asks, from its own code, with the asking taken out."""
    asked: list[list[str]] = []

    def evaluate(model: None, tokenizer: None, problems: list[Problem], **options: Any) -> Result:
        asked.append([problem.prompt for problem in problems])
        return Result({"accuracy": 1.0}, {}, [1.0] * len(problems), [], [])

    monkeypatch.setattr(measuring, "evaluate", evaluate)
    monkeypatch.setattr(measuring, "engine_gap", lambda *_, **options: {})  # asks some of the same problems again
    monkeypatch.setattr(Run, "tokenizer", lambda self: None)
    monkeypatch.setattr(Run, "load", lambda self, name, dtype: None)
    monkeypatch.setattr(
        Run, "recorder_at", lambda self, stage: lambda step: Recorder(self.stage_dir(stage), stage, 1, 1)
    )
    for stage in ("pretrain", "eval"):
        run.stage_dir(stage).mkdir()
        (run.stage_dir(stage) / "done.json").write_text("{}")
    steps.run_eval(run, "eval", None)
    return asked


def test_they_are_what_eval_asks(run: Run, monkeypatch: pytest.MonkeyPatch):
    sets = sets_of(run)
    assert asked_by_eval(run, monkeypatch) == [sets["eval"], sets["never trained"]]
    assert len(sets["eval"]) == 300 and len(sets["never trained"]) == 60


@pytest.mark.parametrize("stage", ["zero", "reason", "align", "student_rl"])
def test_they_are_what_rl_measures_itself_by(run: Run, stage: str, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def sample_answers(engine: None, tokenizer: None, problems: list[Problem], **options: Any) -> None:
        asked.extend(problem.prompt for problem in problems)
        raise StopIteration

    monkeypatch.setattr(rl, "sample_answers", sample_answers)
    config = getattr(run.recipe, stage)
    stream = run.stream(config.instruction_share)
    with pytest.raises(StopIteration):
        rl.held_out(None, None, None, stream, None, config.max_tokens, config.eval_problems)
    assert asked == sets_of(run)[f"{stage} held-out"] and len(asked) == 100


def test_they_are_what_the_reward_model_is_measured_by(run: Run, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, list[str]] = {}

    def draw_pairs(
        engine: None, tokenizer: None, source: Any, *, split: Any, first: int, requests: int, seed: int, **_: Any
    ):
        found = (request_at(source, seed, first + i, split) for i in range(requests))
        asked[split] = [problem.prompt for problem in found]
        return []

    def train(directory: Path, *, config: Any, source: Any, first: int, seed: int, **_: Any) -> None:
        reward_model.all_pairs(config, None, SimpleNamespace(eos_id=0, vocab_size=1), source, first=first, seed=seed)
        raise StopIteration

    monkeypatch.setattr(reward_model, "Engine", lambda *a, **options: None)
    monkeypatch.setattr(reward_model, "draw_pairs", draw_pairs)
    monkeypatch.setattr(steps, "train_reward_model", train)
    monkeypatch.setattr(Run, "tokenizer", lambda self: None)
    align = replace(run.recipe.align, preference_share=0.5)
    judged = run_of(replace(run.recipe, align=align), run.directory)
    with pytest.raises(StopIteration):
        steps.trained_judge(judged, "align", None)
    sets = sets_of(judged)
    assert asked["held_out"] == sets["reward model"] and asked["held_out"]
    assert sets["align requests"] == [judged.stream().request(i, "held_out").prompt for i in range(align.eval_problems)]


def test_a_users_held_out_file_takes_their_place(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, prompts in (("train.jsonl", "ab"), ("held_out.jsonl", "cd")):
        (tmp_path / name).write_text("".join(f'{{"prompt": "{p}?", "answer": "1"}}\n' for p in prompts))
    files = RlDataConfig(train=str(tmp_path / "train.jsonl"), held_out=str(tmp_path / "held_out.jsonl"))
    own = run_of(replace(run.recipe, rl_data=files), tmp_path)
    sets = sets_of(own)
    assert sets.pop(files.held_out) == ["c?", "d?"] and set(sets) <= {"reward model", "align requests"}
    assert asked_by_eval(own, monkeypatch) == [["c?", "d?"]]
