"""Reinforcement learning: which answers teach, what an undecided one is worth, and when more are drawn."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_models import small_model

from abyssal.data.problems import ProblemSource
from abyssal.engine.engine import Engine
from abyssal.evals.grade import Grade, error_reasons, summary
from abyssal.model.transformer import Transformer
from abyssal.record import Recorder, read_steps
from abyssal.reward.open_request import heads_of
from abyssal.reward.own_reward import OwnReward
from abyssal.reward.verifiers import Verifiers
from abyssal.stages.policy_update import GrpoConfig
from abyssal.stages.preference_judge import Judge, is_request
from abyssal.stages.rl import (
    Groups,
    ProblemStream,
    RlConfig,
    by_rules,
    draw_groups,
    learnable,
    problem_of,
    reinforce,
    report_step,
    reward,
)
from abyssal.stages.state import TrainState
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Completion, Message, Problem, Rollout, SamplingParams, Score

NAN = float("nan")
QUIET = Console(file=io.StringIO())


def grade_of(accuracy: float | None, **changes: object) -> Grade:
    values: dict[str, object] = {
        "accuracy": accuracy, "error": None if accuracy is not None else "it broke", "well_formed": 1.0,
        "language": 0.5, "mixed": False, "thinks": False, "truncated": False, "length": 3,
    }  # fmt: skip
    return Grade(**(values | changes))  # type: ignore[arg-type]


def rollout_of(content: str, problem: Problem | None = None) -> Rollout:
    completion = Completion(prompt_ids=[1], ids=[2], logps=[-1.0], finish_reason="stop")
    message = Message(role="assistant", content=content)
    return Rollout(problem=problem or Problem(prompt="?", answer="1"), completion=completion, message=message)


def groups_of(rewards: list[list[float]]) -> Groups:
    rewards_PG = torch.tensor(rewards)
    flat = rewards_PG.flatten().tolist()
    rollouts = [rollout_of(str(i)) for i in range(len(flat))]
    grades = [grade_of(None if math.isnan(r) else r) for r in flat]
    return Groups(rollouts, grades, rewards_PG, ~rewards_PG.isnan(), 0.0)


def kept_of(rewards: list[list[float]], **options: bool) -> dict[str, float]:
    kept, advantages = learnable(groups_of(rewards), **({"divide_by_std": True} | options))
    return {r.message.content: a for r, a in zip(kept, advantages, strict=True)}


def test_groups_without_variance_teach_nothing():
    kept = kept_of([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    assert kept == pytest.approx({"2": 1.0, "3": -1.0}, abs=1e-4)


def test_the_rounding_of_a_mean_is_no_variance():
    """15 rewards of 1.1 have a mean that is not 1.1 in FP32; over its own tiny spread that would look like a signal."""
    assert kept_of([[1.1] * 15]) == {}
    assert kept_of([[0.1] * 7], divide_by_std=False) == {}


def test_an_undecided_answer_is_no_variance():
    assert kept_of([[1.1, 1.1, NAN], [NAN, NAN, NAN], [0.0, NAN, 0.0]]) == {}


def test_an_undecided_answer_teaches_nothing_and_shifts_nobody():
    assert kept_of([[1.0, NAN, 0.0]]) == pytest.approx({"0": 1.0, "2": -1.0}, abs=1e-4)


def test_the_reward_is_the_weighted_sum_and_nan_where_nobody_knows():
    config = RlConfig(accuracy_weight=1.0, format_weight=0.1, language_weight=0.2)
    assert reward(grade_of(1.0), config) == pytest.approx(1.0 + 0.1 + 0.2 * 0.5)
    assert reward(grade_of(0.0, well_formed=0.0), config) == pytest.approx(0.1)
    assert math.isnan(reward(grade_of(None), config))


def test_undecided_answers_are_counted_and_not_averaged():
    grades = [grade_of(1.0), grade_of(None), grade_of(0.0)]
    assert summary(grades)["accuracy"] == 0.5
    assert summary(grades)["verifier_errors"] == 1
    assert error_reasons(grades) == {"it broke": 1}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe(["one plus two is three", "name a colour: red"] * 20, vocab_size=400))


def model_of(tokenizer: Tokenizer, *, padding: int = 0) -> Transformer:
    """Half of its answers end after a few tokens: one feature is always large, and the end token listens to it."""
    model = small_model(vocab_size=tokenizer.vocab_size + padding, max_position_embeddings=64)
    with torch.no_grad():
        model.embed_tokens.weight[:, 0] = 3.0
        model.lm_head.weight[tokenizer.eos_id, 0] = 1.6
    return model


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A verifier of the user's own, called here and not in a worker; what it decides is set by the test."""
    module = types.SimpleNamespace()

    def scores(own: OwnReward, asked: Sequence[tuple[Problem, Message]]) -> list[Score]:
        return [score_of(module.judge, problem, message) for problem, message in asked]

    monkeypatch.setattr(OwnReward, "scores", scores)
    return module


def score_of(judge: Callable[[Problem, Message], float | Score], problem: Problem, message: Message) -> Score:
    try:
        value = judge(problem, message)
    except RuntimeError as error:
        return Score(None, f"raised: judge_of_a_test:judge: RuntimeError: {error}")
    return value if isinstance(value, Score) else Score(float(value))


def problems_judged(n: int) -> tuple[Problem, ...]:
    return tuple(
        Problem(prompt=f"say {i}", answer=str(i), key=str(i), verifier="judge_of_a_test:judge") for i in range(n)
    )


def draw(tokenizer: Tokenizer, config: RlConfig) -> tuple[Groups, int]:
    """One step's groups, and how far the stream of problems was read. Every token ends an answer: none is cut off."""
    engine = Engine(model_of(tokenizer), eos_ids=range(tokenizer.vocab_size), max_batch=16)
    stream = ProblemStream(ProblemSource(), 0, own=problems_judged(100))
    state = TrainState(model_of(tokenizer), {}, extra={"next_problem": 0})
    with Verifiers() as verifiers:
        params = SamplingParams(max_tokens=4)
        groups = draw_groups(engine, tokenizer, stream, state, config, params, verifiers, seed=5)
    return groups, state.extra["next_problem"]


def test_a_verifier_that_raises_is_counted_and_never_a_zero(judge, tokenizer, tmp_path: Path):
    def broken(problem: Problem, message: Message) -> float:
        raise RuntimeError("no idea")

    judge.judge = broken
    groups, _ = draw(tokenizer, RlConfig(problems=2, answers=3))
    assert groups.rewards_PG.isnan().all() and not groups.valid_PG.any()
    assert summary(groups.grades)["verifier_errors"] == summary(groups.grades)["undecided_raised"] == 6
    assert learnable(groups, divide_by_std=True) == ([], [])
    with Recorder(tmp_path, "zero", 1, 1) as recorder:
        report_step(recorder, groups, 0)
    log = (tmp_path / "log.txt").read_text()
    assert "could not decide 6 answers" in log and "RuntimeError: no idea" in log


def test_a_step_of_mostly_undecided_answers_stops_the_stage_and_is_decided_anew_when_the_verifier_was_mended(
    judge, tokenizer, tmp_path: Path
):
    def broken(problem: Problem, message: Message) -> float:
        raise RuntimeError("no idea")

    judge.judge = lambda problem, message: float(len(message.content) < 4)
    walk_rl(tmp_path, tokenizer, steps=2)
    judge.judge = broken
    why = r"step 2: (\d+) of 12 answers are undecided, most often \(\1\) 'raised: judge_of_a_test:judge: RuntimeError"
    with pytest.raises(ValueError, match=why + ": no idea'.* from its last checkpoint .*max_undecided=0.01") as stopped:
        walk_rl(tmp_path, tokenizer, steps=4, max_undecided=0.01)
    assert "\n" not in str(stopped.value)
    judge.judge = lambda problem, message: float(len(message.content) < 4)
    walk_rl(tmp_path, tokenizer, steps=4, max_undecided=0.0)
    assert [entry["step"] for entry in metrics_of(tmp_path)] == [0, 1, 2, 3]


def test_a_few_undecided_answers_do_not_stop_the_stage_and_are_counted_by_reason(judge, tokenizer, tmp_path: Path):
    late = Score(None, "timeout: j: late")
    judge.judge = lambda problem, message: late if len(message.content) % 2 else Score(1.0)
    walk_rl(tmp_path, tokenizer, steps=2, max_undecided=1.0)
    metrics = metrics_of(tmp_path)
    assert sum(entry["verifier_errors"] for entry in metrics) > 0
    assert all(entry["verifier_errors"] == entry.get("undecided_timeout", 0.0) for entry in metrics)


def right_and_wrong_from(first: int) -> Callable[[Problem, Message], Score]:
    """Right and wrong in turn, from the `first`-th problem on; before it, everything is wrong."""
    calls = itertools.count()
    return lambda problem, message: Score(float(int(problem.key) >= first and next(calls) % 2))


def test_one_draw_takes_what_comes(judge, tokenizer):
    judge.judge = right_and_wrong_from(2)
    groups, position = draw(tokenizer, RlConfig(problems=3, answers=4))
    assert position == 3
    assert [g.accuracy for g in groups.grades].count(1.0) == 2  # of the third problem alone


def test_dynamic_sampling_draws_on_until_every_group_has_right_and_wrong(judge, tokenizer):
    judge.judge = right_and_wrong_from(2)
    groups, position = draw(tokenizer, RlConfig(problems=3, answers=4, dynamic_sampling=True))
    assert position == 5  # of 0, 1, 2 one group is good; 3 and 4 both are
    assert [int(groups.rollouts[i].problem.key) for i in (0, 4, 8)] == [2, 3, 4]
    assert all({g.accuracy for g in groups.grades[i : i + 4]} == {0.0, 1.0} for i in (0, 4, 8))
    assert groups.rewards_PG.shape == (3, 4)


def test_dynamic_sampling_ends_when_nothing_is_ever_right(judge, tokenizer):
    judge.judge = right_and_wrong_from(10**9)
    groups, position = draw(tokenizer, RlConfig(problems=3, answers=4, dynamic_sampling=True, format_weight=0.0))
    assert position == 4 * 3 and groups.rewards_PG.shape == (3, 4)
    assert learnable(groups, divide_by_std=True) == ([], [])


def test_an_undecided_answer_does_not_make_a_group_worth_keeping(judge, tokenizer):
    undecided = itertools.count()
    judge.judge = lambda problem, message: Score(None, "lost") if next(undecided) % 4 == 0 else Score(1.0)
    _, position = draw(tokenizer, RlConfig(problems=3, answers=4, dynamic_sampling=True))
    assert position == 4 * 3


def test_own_problems_come_in_turn_and_generated_ones_by_index():
    own = problems_judged(3)
    stream = ProblemStream(ProblemSource(), 0, own=own, own_held_out=own[:1])
    assert [stream.at(i).key for i in range(4)] == ["0", "1", "2", "0"]
    assert stream.at(7, "held_out").key == "0"
    generated = ProblemStream(ProblemSource(), 0)
    assert generated.at(5) == generated.at(5) != generated.at(6)


def walk_rl(
    directory: Path,
    tokenizer: Tokenizer,
    *,
    steps: int,
    seconds: float = math.inf,
    model: Transformer | None = None,
    padding: int = 0,
    **changes: Any,
) -> Transformer:
    own = problems_judged(50)
    options: dict[str, Any] = dict(
        steps=steps, problems=2, answers=6, max_tokens=4, row_len=32, save_every=2, eval_every=0, eval_problems=2,
        warmup=1, lr=1e-3, reference_every=3, seconds=seconds, grpo=GrpoConfig(kl_weight=0.01, minibatches=2),
    )  # fmt: skip
    config = RlConfig(**(options | changes))
    with Verifiers() as verifiers, verifiers.recorded_in(directory / "verdicts.jsonl"):
        return reinforce(
            directory,
            config=config,
            model=model or model_of(tokenizer, padding=padding),
            tokenizer=tokenizer,
            stream=ProblemStream(ProblemSource(), 0, own=own, own_held_out=own[:2]),
            first_problem=0,
            verifiers=verifiers,
            seed=9,
            recorder_at=lambda step: Recorder(directory, "zero", 1, 1, resume_from_step=step, console=QUIET),
        ).model


def metrics_of(directory: Path) -> list[dict[str, float]]:
    """What each step computed, without how long it took and what was measured after its last."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    left_out = re.compile(r".*_s|memory_gb|held_out_.*")
    return [{k: v for k, v in line.items() if not left_out.fullmatch(k)} for line in lines]


def test_a_stopped_run_goes_on_as_if_it_had_not_been(judge, tokenizer, tmp_path: Path):
    """Problems, noise, order of rows, reference and optimizer: all are where they were, so all numbers are."""
    judge.judge = lambda problem, message: float(len(message.content) < 4)
    whole = walk_rl(tmp_path / "whole", tokenizer, steps=6)
    walk_rl(tmp_path / "halves", tokenizer, steps=4)
    halves = walk_rl(tmp_path / "halves", tokenizer, steps=6)
    metrics = metrics_of(tmp_path / "whole")
    assert metrics == metrics_of(tmp_path / "halves")
    assert [entry["step"] for entry in metrics] == list(range(6))
    assert sum(entry["zero_variance_share"] < 1 for entry in metrics) >= 4  # there was something to learn
    for name, p in whole.state_dict().items():
        assert torch.equal(p, halves.state_dict()[name]), name


def test_a_step_at_another_temperature_over_some_ids_starts_on_the_policy_it_drew_from(judge, tokenizer, tmp_path):
    """With one minibatch nothing has moved: no ratio but 1, no distance to the reference, nothing cut or masked.

    A third of the model's vocabulary is padding, which neither side may give a probability.
    """
    judge.judge = lambda problem, message: float(len(message.content) < 4)
    grpo = GrpoConfig(
        kl_weight=0.01, clip_low=1e-4, clip_high=1e-4, importance_cap=2.0, off_policy_mask=0.01, unbiased_kl=True
    )
    model = walk_rl(tmp_path, tokenizer, steps=1, padding=200, temperature=0.8, top_p=0.9, top_k=50, grpo=grpo)
    before = model_of(tokenizer, padding=200)
    moved_V = (model.lm_head.weight != before.lm_head.weight).any(-1)
    assert moved_V.any() and not moved_V[tokenizer.vocab_size :].any()
    [metrics] = metrics_of(tmp_path)
    assert metrics["zero_variance_share"] < 1  # there was something to learn
    assert metrics["clip_share"] == metrics["importance_cut_share"] == metrics["off_policy_share"] == 0.0
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-7)
    assert metrics["mismatch_max"] < 1e-5 and metrics["mismatch_free_max"] >= metrics["mismatch_max"]


def test_held_out_problems_are_answered_at_temperature_one_whatever_the_rollouts_are_drawn_at(
    judge, tokenizer, tmp_path
):
    judge.judge = lambda problem, message: float(len(message.content) < 4)
    still = {"lr": 0.0, "eval_every": 1, "grpo": GrpoConfig(kl_weight=0.0, mtp_weight=0.0)}
    for name, temperature in (("warm", 1.0), ("cold", 0.3)):
        walk_rl(tmp_path / name, tokenizer, steps=1, temperature=temperature, eval_problems=8, **still)
    warm, cold = (json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("warm", "cold"))
    assert warm["entropy"] != cold["entropy"]  # other rollouts
    assert {k: v for k, v in warm.items() if k.startswith("held_out")} == {
        k: v for k, v in cold.items() if k.startswith("held_out")
    }


def test_greedy_rollouts_and_wrong_filters_are_refused():
    for name, value in (("temperature", 0.0), ("top_p", 0.0), ("top_k", -1)):
        with pytest.raises(ValueError, match=name):
            RlConfig(**{name: value})


class LongerIsBetter:
    """A reward model that anybody can hack: both heads count the characters of the answer."""

    def of(self, head: str, responses: list[tuple[str, Message]]) -> torch.Tensor:
        return torch.tensor([float(len(message.content)) for _, message in responses])


def length_judge() -> Judge:
    facts = {"mean": 4.0, "std": 2.0, "truth_mean": 0.5, "truth_std": 0.5}
    return Judge(LongerIsBetter(), {"helpfulness": facts, "safety": facts}, clip=3.0)  # type: ignore[arg-type]


def test_open_requests_come_in_the_last_part_only_and_in_their_share():
    stream = ProblemStream(ProblemSource(), 0, own=problems_judged(3))
    config = RlConfig(steps=40, preference_share=0.3, preference_last=0.25)
    asked = {step: [problem_of(stream, config, step=step, index=i) for i in range(300)] for step in (0, 29, 30, 39)}
    n_open = {step: sum(map(is_request, problems)) for step, problems in asked.items()}
    assert n_open[0] == n_open[29] == 0 and n_open[30] == n_open[39]
    assert 60 < n_open[30] < 120
    off = RlConfig(steps=40)
    assert [problem_of(stream, off, step=39, index=i) for i in range(9)] == [stream.at(i) for i in range(9)]


def test_open_requests_are_rewarded_by_the_reward_model_and_counted_apart(judge, tokenizer, tmp_path: Path):
    judge.judge = lambda problem, message: 1.0
    config = RlConfig(steps=1, problems=4, answers=3, preference_share=0.5, preference_last=1.0, preference_weight=0.5)
    engine = Engine(model_of(tokenizer), eos_ids=range(tokenizer.vocab_size), max_batch=16)
    stream = ProblemStream(ProblemSource(), 0, own=problems_judged(100))
    state = TrainState(model_of(tokenizer), {}, extra={"next_problem": 0})
    with Verifiers() as verifiers:
        groups = draw_groups(
            engine, tokenizer, stream, state, config, SamplingParams(max_tokens=4), verifiers, seed=5,
            judge=length_judge(),
        )  # fmt: skip
    open_A = [is_request(rollout.problem) for rollout in groups.rollouts]
    assert 0 < sum(open_A) < 12
    for is_open, rollout, grade, got in zip(
        open_A, groups.rollouts, groups.grades, groups.rewards_PG.flatten().tolist(), strict=True
    ):
        n_heads = len(heads_of(rollout.problem)) if is_open else 0
        deviation = min(3.0, max(-3.0, (len(rollout.message.content) - 4) / 2))
        wanted = 0.5 * n_heads * deviation + 0.1 * grade.well_formed if is_open else reward(grade, config)
        assert got == pytest.approx(wanted, abs=1e-5)
    ruled = by_rules(groups)
    assert ruled["accuracy"] == 1.0 and ruled["reward"] == pytest.approx(1.1, abs=0.1)
    assert groups.preference is not None and {"preference_reward", "preference_truth"} <= set(groups.preference)
    with Recorder(tmp_path, "align", 1, 1, console=QUIET) as recorder:
        report_step(recorder, groups, 0)
    shown = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [entry["family"] for entry in shown] == ["user", "requests"]
    best = max(reward for reward, is_open in zip(groups.rewards_PG.flatten().tolist(), open_A, strict=True) if is_open)
    assert shown[1]["reward"] == pytest.approx(best)


def walk_align(directory: Path, tokenizer: Tokenizer, *, steps: int) -> list[dict[str, float]]:
    config = RlConfig(
        steps=steps, problems=2, answers=6, max_tokens=6, row_len=96, save_every=2, eval_every=2, eval_problems=3,
        warmup=1, lr=1e-2, preference_share=0.7, preference_last=1.0,
    )  # fmt: skip
    own = problems_judged(50)
    model = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=128)
    with Verifiers() as verifiers:
        reinforce(
            directory, config=config, model=model, tokenizer=tokenizer, first_problem=0, verifiers=verifiers, seed=9,
            stream=ProblemStream(ProblemSource(), 0, own=own, own_held_out=own[:2]), judge=length_judge(),
            recorder_at=lambda step: Recorder(directory, "align", 1, 1, resume_from_step=step, console=QUIET),
        )  # fmt: skip
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_stopped_align_goes_on_to_the_same_numbers_and_records_reward_and_truth(judge, tokenizer, tmp_path: Path):
    judge.judge = lambda problem, message: float(len(message.content) < 4)
    walk_align(tmp_path / "whole", tokenizer, steps=6)
    walk_align(tmp_path / "halves", tokenizer, steps=4)
    entries = walk_align(tmp_path / "halves", tokenizer, steps=6)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "halves")
    assert any("preference_reward" in entry and "preference_truth" in entry for entry in entries)
    assert all("held_out_preference_truth" in entries[step] for step in (1, 3, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preference_share": 1.5}, "preference_share=1.5 is"),
        ({"preference_clip": 0.0}, "would leave no reward"),
        ({"preference_weight": -1.0}, "would leave no reward"),
        ({"preference_share": 0.1, "steps": 4, "preference_last": 0.1}, "is no step"),
    ],
)
def test_preference_settings_that_make_no_sense_are_refused(change: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        RlConfig(**change)  # type: ignore[arg-type]


def test_seconds_end_it_at_a_step_and_it_stays_ended(judge, tokenizer, tmp_path: Path):
    """The clock is asked after each step: the one that crosses the line is whole, evaluated and saved."""
    judge.judge = lambda problem, message: float(len(message.content) < 4)
    walk_rl(tmp_path, tokenizer, steps=50, seconds=1e-9)
    [entry] = read_steps(tmp_path / "metrics.jsonl")
    assert entry["held_out_accuracy"] >= 0 and 0 < entry["measure_s"] < entry["time_s"]
    weights = (tmp_path / "checkpoint" / "model.safetensors").read_bytes()
    walk_rl(tmp_path, tokenizer, steps=50, seconds=1e9)
    assert len(read_steps(tmp_path / "metrics.jsonl")) == 1
    assert (tmp_path / "checkpoint" / "model.safetensors").read_bytes() == weights


def test_an_evaluation_says_whether_drafts_still_follow(judge, tokenizer, tmp_path: Path):
    judge.judge = lambda problem, message: float(len(message.content) < 4)
    model = small_model("mla_moe_query_latent", vocab_size=tokenizer.vocab_size, max_position_embeddings=64)
    walk_rl(tmp_path, tokenizer, steps=2, model=model)
    *_, last = read_steps(tmp_path / "metrics.jsonl")
    assert 0 <= last["held_out_mtp_acceptance"] <= 1
    walk_rl(tmp_path / "without", tokenizer, steps=2)
    assert not any("held_out_mtp_acceptance" in entry for entry in read_steps(tmp_path / "without" / "metrics.jsonl"))
