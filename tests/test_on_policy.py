"""On-policy distillation: what moves and what must not, that it teaches, and that its clock survives being stopped."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_models import small_model

from abyssal.data.problems import ProblemSource
from abyssal.loss.kl import reverse_kl
from abyssal.model.transformer import Transformer
from abyssal.record import Recorder, read_steps, seconds_of_work
from abyssal.reward.verifiers import Verifiers
from abyssal.stages.on_policy import OnPolicyConfig, answer_rows, distil_on_policy, follow_teacher
from abyssal.stages.rl import ProblemStream
from abyssal.stages.state import TrainState, build_optimizers
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Completion, Message, Problem, Rollout

QUIET = Console(file=io.StringIO())
CONFIG = OnPolicyConfig(
    steps=4, problems=6, max_tokens=6, row_len=32, rows_per_pass=2, eval_every=2, eval_problems=2, save_every=2,
    warmup=1,
)  # fmt: skip
PROBLEMS = tuple(Problem(prompt=f"say {i}", answer=str(i), key=str(i), verifier="exact") for i in range(40))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe(["one plus two is three", "name a colour: red"] * 20, vocab_size=320))


def pair(tokenizer: Tokenizer, student_kind: str = "gqa_dense") -> tuple[Transformer, Transformer]:
    """A dense student and a teacher that is a mixture of experts, with one vocabulary."""
    sizes: dict[str, object] = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 64}
    return small_model(student_kind, seed=1, **sizes), small_model("mla_moe", seed=2, **sizes)


def rollout(prompt: list[int], ids: list[int]) -> Rollout:
    completion = Completion(prompt_ids=prompt, ids=ids, logps=[-1.0] * len(ids), finish_reason="stop")
    return Rollout(problem=PROBLEMS[0], completion=completion, message=Message(role="assistant", content=""))


def step(model: Transformer, teacher: Transformer, rollouts: list[Rollout], **changes: Any) -> dict[str, float]:
    config = replace(CONFIG, **({"optimizer": "adamw"} | changes))
    optimizers = build_optimizers(model, kind=config.optimizer, lr=0.0, adamw_lr=1e-3, weight_decay=0.0)
    batch = answer_rows(rollouts, config.row_len, 0)
    return follow_teacher(TrainState(model, optimizers), teacher, batch, config=config, lr_fraction=1.0)


def mean_kl(model: Transformer, teacher: Transformer, rollouts: list[Rollout]) -> float:
    """Over all answer tokens, each answer alone in a row of its own."""
    parts = []
    for r in rollouts:
        ids_BT = torch.tensor([r.completion.prompt_ids + r.completion.ids])
        with torch.no_grad():
            student_TV, teacher_TV = (one.logits(one.hidden(ids_BT))[0] for one in (model, teacher))
        first = len(r.completion.prompt_ids) - 1
        parts.append(reverse_kl(student_TV[first:-1], teacher_TV[first:-1]))
    return float(torch.cat(parts).mean())


SOME = [rollout([1, 2, 3], [4, 5, 6, 7]), rollout([9, 8], [7]), rollout([5, 5, 5, 5], [1, 2] * 8), rollout([3], [3, 3])]


def test_the_loss_is_the_mean_over_answer_tokens_however_they_are_packed_and_split(tokenizer):
    want = mean_kl(*pair(tokenizer), SOME)
    for changes in ({"rows_per_pass": 16}, {"rows_per_pass": 1}, {"rows_per_pass": 1, "row_len": 8}):
        assert step(*pair(tokenizer), SOME, **changes)["loss"] == pytest.approx(want, rel=1e-4)


def test_a_step_brings_the_student_nearer_and_leaves_the_teacher_alone(tokenizer):
    model, teacher = pair(tokenizer)
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    kls = [step(model, teacher, SOME)["loss"] for _ in range(12)]
    assert mean_kl(model, teacher, SOME) < 0.7 * kls[0]
    assert all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_students_drafts_follow_it_and_do_not_steer_it(tokenizer):
    """The gradient of the MTP loss stops at the MTP module."""
    (plain, teacher), (drafting, _) = (pair(tokenizer, "mla_moe_query_latent") for _ in range(2))
    before = {name: p.clone() for name, p in drafting.state_dict().items()}
    step(plain, teacher, SOME, mtp_weight=0.0)
    metrics = step(drafting, teacher, SOME, mtp_weight=0.5)
    assert metrics["mtp_loss"] > 0
    for name, p in drafting.state_dict().items():
        if name.startswith("mtp."):
            continue
        assert torch.equal(p, plain.state_dict()[name]), name
    assert any(not torch.equal(p, before[name]) for name, p in drafting.state_dict().items() if name.startswith("mtp."))


def test_two_vocabularies_are_refused(tokenizer, tmp_path: Path):
    model, _ = pair(tokenizer)
    with pytest.raises(ValueError, match=f"the student knows {tokenizer.vocab_size} tokens, the teacher 61"):
        walk(tmp_path, tokenizer, model=model, teacher=small_model())


def walk(
    directory: Path,
    tokenizer: Tokenizer,
    config: OnPolicyConfig = CONFIG,
    *,
    model: Transformer | None = None,
    teacher: Transformer | None = None,
) -> TrainState:
    student, other = pair(tokenizer)
    with Verifiers() as verifiers:
        return distil_on_policy(
            directory,
            config=config,
            model=model or student,
            teacher=teacher or other,
            tokenizer=tokenizer,
            stream=ProblemStream(ProblemSource(), 0, own=PROBLEMS, own_held_out=PROBLEMS[:2]),
            first_problem=0,
            verifiers=verifiers,
            seed=3,
            recorder_at=lambda step: Recorder(directory, "on_policy", 1, 1, resume_from_step=step, console=QUIET),
        )


def test_it_learns_from_its_own_answers(tokenizer, tmp_path: Path):
    walk(tmp_path, tokenizer, replace(CONFIG, steps=20, problems=16))
    losses = [entry["loss"] for entry in read_steps(tmp_path / "metrics.jsonl")]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    sample = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert sample["problem"] == "say 0"


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tokenizer, tmp_path: Path):
    whole = walk(tmp_path / "whole", tokenizer)
    walk(tmp_path / "halves", tokenizer, replace(CONFIG, steps=2))
    halves = walk(tmp_path / "halves", tokenizer)
    for name, p in whole.model.state_dict().items():
        assert torch.equal(p, halves.model.state_dict()[name]), name
    losses = [[e["loss"] for e in read_steps(tmp_path / d / "metrics.jsonl")] for d in ("whole", "halves")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_seconds_end_it_at_a_step_and_it_stays_ended(tokenizer, tmp_path: Path):
    """The step that uses the seconds up is whole, evaluated and saved; another start adds none."""
    state = walk(tmp_path, tokenizer, replace(CONFIG, seconds=1e-9))
    steps = read_steps(tmp_path / "metrics.jsonl")
    assert [entry["step"] for entry in steps] == [0] and state.step == state.extra["ended_at"] == 1
    assert "held_out_accuracy" in steps[0] and (tmp_path / "checkpoint").is_dir()
    again = walk(tmp_path, tokenizer, replace(CONFIG, seconds=1e9))
    assert again.step == 1 and len(read_steps(tmp_path / "metrics.jsonl")) == 1


def test_the_clock_goes_on_over_a_stop_and_does_not_count_what_was_thrown_away(tokenizer, tmp_path: Path):
    """Half of the allowance was worked before the stop, as metrics.jsonl says; steps after the checkpoint are gone."""
    walk(tmp_path, tokenizer, replace(CONFIG, steps=2))
    path = tmp_path / "metrics.jsonl"
    first, second = read_steps(path)
    lost = second | {"step": 2, "time_s": 1e6}  # recorded, then killed before it was saved
    edited = [first | {"time_s": 50.0, "measure_s": 10.0}, second | {"time_s": 70.0, "measure_s": 10.0}, lost]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in edited))
    state = walk(tmp_path, tokenizer, replace(CONFIG, steps=100, seconds=100.0 + 1e-9))
    assert state.step == state.extra["ended_at"] == 3  # 40 + 60 were used, and one step crosses the line
    assert seconds_of_work(read_steps(path)) > 100


def test_measuring_is_no_work(tokenizer, tmp_path: Path):
    walk(tmp_path, tokenizer)
    steps = read_steps(tmp_path / "metrics.jsonl")
    for entry in steps:
        assert 0 <= entry["measure_s"] < entry["time_s"]
        worked_s = entry["time_s"] - entry["measure_s"]
        assert worked_s == pytest.approx(entry["rollout_s"] + entry["update_s"], abs=1e-6)
    assert seconds_of_work(steps) == pytest.approx(sum(e["rollout_s"] + e["update_s"] for e in steps), abs=1e-5)


def test_a_limit_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="seconds=-1.0 is negative; use inf"):
        OnPolicyConfig(seconds=-1.0)
