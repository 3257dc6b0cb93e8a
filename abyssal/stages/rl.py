"""Stages `zero`, `reason` and `align`: reinforcement learning with GRPO. (DeepSeekMath section 4; R1 section 2.2)

Draw G answers to each of P problems with the engine, on the trainer's own weights; grade them by rules; compare each
with its group; one clipped step. R1-Zero starts from the base and knows accuracy and form alone; later stages add
language, and the last part of `align` open requests, which a reward model judges (preference_judge.py). The form reward
pays for well-formed answers with or without thinking: if thinking grows, it is because it is right more often.
Letters: P problems, G answers per problem, A answers (P x G), B rows, T tokens, N answer tokens.
"""

from __future__ import annotations

import copy
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from abyssal.data.preferences import request_at
from abyssal.data.problems import ProblemSource, Split, problem_at
from abyssal.engine.engine import Engine
from abyssal.evals.grade import Grade, error_reasons, grade, summary
from abyssal.evals.tasks import drafting
from abyssal.loss.grpo import group_advantages
from abyssal.model.transformer import Transformer
from abyssal.optim.schedule import learning_rate
from abyssal.record import Recorder, memory_gb, read_steps, seconds_of_work
from abyssal.reward.verifiers import Verifiers
from abyssal.rollout import agreement, sample_answers
from abyssal.stages.policy_update import GrpoConfig, answer_batch, update_policy
from abyssal.stages.preference_judge import Judge, is_request, watched
from abyssal.stages.schedule_points import RecorderAt, due, steps_in_all
from abyssal.stages.state import TrainState, build_optimizers, resume_state, save_state
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Problem, Rollout, SamplingParams


@dataclass(frozen=True, kw_only=True)
class RlConfig:
    steps: int = 60
    seconds: float = math.inf  # of work, after which it ends too; 0 (student_rl alone): as many as `distil` took
    problems: int = 16  # P per step
    answers: int = 16  # G per problem
    max_tokens: int = 128
    temperature: float = 1.0  # of the policy that is trained: ratios and KL are at it too; evaluations stay at 1
    top_p: float = 1.0  # likewise, over the ids that it and top_k leave
    top_k: int = 0
    lr: float = 1e-4
    warmup: int = 3
    accuracy_weight: float = 1.0
    format_weight: float = 0.1  # R1 weighs both alike; here malformed answers are rare and already wrong
    language_weight: float = 0.0
    instruction_share: float = 0.0  # of problems, in `align`
    preference_share: float = 0.0  # of problems in the last part of `align`: open requests, for the reward model
    preference_last: float = 0.25  # that part, as a share of the steps (R1: 400 of 1,700; longer led to hacking)
    preference_weight: float = 0.5
    preference_clip: float = 3.0  # of each head's score, in deviations from the held-out mean
    dynamic_sampling: bool = False  # draw on until `problems` groups have both right and wrong answers (DAPO)
    reference_every: int = 400  # steps between refreshes of the KL reference (R1: 400)
    row_len: int = 0  # of packed answers; 0: as long as the longest, which leaves attention the least to do
    rows_per_pass: int = 16
    compare_answers: int = 32  # per step, recomputed by the trainer to measure the mismatch
    invariant: bool = False  # rollouts whose bits depend on no neighbour (engine/runner.py); slower
    eval_every: int = 10
    eval_problems: int = 100
    save_every: int = 10
    max_undecided: float = 0.5  # share of a step's answers; with more that no verifier could decide, the stage stops
    dtype: Literal["float32", "bfloat16"] = "float32"
    grpo: GrpoConfig = field(default_factory=GrpoConfig)

    def __post_init__(self) -> None:
        _ = self.sampling  # raises where it makes no sense
        if self.temperature == 0:
            raise ValueError("temperature=0: the answers of a group would all be the same; use above 0")
        for name in ("preference_share", "preference_last"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is a share; give a number from 0 to 1")
        if self.preference_clip <= 0 or self.preference_weight <= 0:
            raise ValueError(
                f"preference_clip={self.preference_clip}, preference_weight={self.preference_weight} would leave no "
                f"reward; give both a number above 0"
            )
        if self.preference_share and round(self.steps * self.preference_last) < 1:
            raise ValueError(
                f"preference_last={self.preference_last} of steps={self.steps} is no step: preference_share="
                f"{self.preference_share} would train a reward model and never ask it; raise one, or set the share to 0"
            )
        if self.seconds < 0:
            raise ValueError(f"seconds={self.seconds} is negative; use inf for no limit")
        if not 0 <= self.max_undecided <= 1:
            raise ValueError(f"max_undecided={self.max_undecided} is a share of answers; use 0 to 1")
        if self.answers < 2:
            raise ValueError(f"answers={self.answers}: an answer is compared with its group; draw at least 2")

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, max_tokens=self.max_tokens
        )


class Groups(NamedTuple):
    """P groups of G graded answers, flat and side by side."""

    rollouts: list[Rollout]
    grades: list[Grade]
    rewards_PG: torch.Tensor
    valid_PG: torch.Tensor
    reward_s: float  # spent on grading
    preference: dict[str, float] | None = None  # reward model against the hidden truth, where open requests were drawn


def reinforce(
    stage_dir: Path,
    *,
    config: RlConfig,
    model: Transformer,
    tokenizer: Tokenizer,
    stream: ProblemStream,
    first_problem: int,
    verifiers: Verifiers,
    seed: int,
    recorder_at: RecorderAt,
    judge: Judge | None = None,
) -> TrainState:
    """Leaves `stage_dir`/checkpoint; continues from it if there is one."""
    state = TrainState(model, build_optimizers(model, kind="adamw", lr=0.0, adamw_lr=config.lr, weight_decay=0.0))
    state.extra = {
        "next_problem": first_problem,
        "reference": model.state_dict(),
        "shuffle": torch.Generator().manual_seed(seed).get_state(),
    }
    reference = copy.deepcopy(model).requires_grad_(False)
    resume_state(stage_dir / "checkpoint", state)
    reference.load_state_dict(state.extra["reference"])
    shuffle = torch.Generator()
    shuffle.set_state(state.extra["shuffle"])
    engine = Engine(
        model,
        eos_ids=[tokenizer.eos_id],
        max_batch=config.problems * config.answers,
        record_sampling=True,
        vocab_size=tokenizer.vocab_size,
        invariant=config.invariant,
    )
    params = config.sampling
    device = model.embed_tokens.weight.device

    with recorder_at(state.step) as recorder:
        worked_s = seconds_of_work(read_steps(stage_dir / "metrics.jsonl"))
        if state.remark:
            recorder.log(state.remark, aloud=True)
        for step in range(state.step, state.extra.get("ended_at", config.steps)):
            began = time.perf_counter()
            groups = draw_groups(
                engine, tokenizer, stream, state, config, params, verifiers, seed=seed + step, judge=judge
            )
            check_undecided(groups, config, verifiers, step)
            drawn = time.perf_counter()
            kept, advantages = learnable(groups, divide_by_std=config.grpo.divide_by_std)
            compared_from = time.perf_counter()
            gap = agreement(
                model,
                [r.completion for r in groups.rollouts[: config.compare_answers]],
                replay=config.grpo.router_replay,
                vocab_size=tokenizer.vocab_size,
            )
            measure_s = time.perf_counter() - compared_from
            lr = learning_rate(step, config.steps, warmup=config.warmup, shape="constant")
            update: dict[str, float] = {}
            if kept:  # groups without variance teach nothing: a step of them alone is no step
                answers = answer_batch(
                    kept,
                    advantages,
                    row_len=config.row_len,
                    pad_id=tokenizer.pad_id,
                    device=device,
                    vocab_size=tokenizer.vocab_size,
                )
                update = update_policy(
                    state,
                    answers,
                    reference=reference if config.grpo.kl_weight else None,
                    config=config.grpo,
                    lr_fraction=lr,
                    rows_per_pass=config.rows_per_pass,
                    shuffle=shuffle,
                )
            if (step + 1) % config.reference_every == 0:
                reference.load_state_dict(model.state_dict())
            engine.load_weights(model)  # the next rollouts see the new policy
            updated = time.perf_counter()

            n_tokens = sum(len(r.completion.ids) for r in groups.rollouts)
            state.step, state.tokens = step + 1, state.tokens + n_tokens
            metrics: dict[str, Any] = {
                **by_rules(groups),
                **(groups.preference or {}),
                **update,
                "zero_variance_share": 1 - len(kept) / len(groups.rollouts),
                "mismatch_max": gap.max,
                "mismatch_mean": gap.mean,
                "mismatch_free_max": gap.free_max,
                "mismatch_free_mean": gap.free_mean,
                "flip_share": gap.flip_share,
                "lr": lr * config.lr,
                "tokens": n_tokens,
                "rollout_s": drawn - began - groups.reward_s,
                "reward_s": groups.reward_s,
                "update_s": updated - drawn,
                "memory_gb": memory_gb(),
            }
            worked_s += updated - began - measure_s
            total = steps_in_all(step, config.steps, worked_s=worked_s, seconds=config.seconds)
            if due(step, config.eval_every, total):
                n = config.eval_problems
                metrics |= held_out(model, engine, tokenizer, stream, verifiers, config.max_tokens, n)
                if judge is not None:
                    metrics |= held_out_requests(engine, tokenizer, stream, config, judge)
            ended = time.perf_counter()
            metrics |= {"measure_s": measure_s + ended - updated, "time_s": ended - began}
            recorder.step(step, total, metrics)
            report_step(recorder, groups, step)
            if due(step, config.save_every, total):
                if total == step + 1 < config.steps:
                    state.extra["ended_at"] = total  # by the clock: taken up again, the stage is still over
                state.extra |= {"reference": reference.state_dict(), "shuffle": shuffle.get_state()}
                save_state(
                    stage_dir / "checkpoint",
                    state,
                    tokenizer,
                    generation={"temperature": 0.6, "top_p": 0.95, "do_sample": True},
                )
            if total == step + 1:
                break
    return state


def draw_groups(
    engine: Engine,
    tokenizer: Tokenizer,
    stream: ProblemStream,
    state: TrainState,
    config: RlConfig,
    params: SamplingParams,
    verifiers: Verifiers,
    *,
    seed: int,
    judge: Judge | None = None,
) -> Groups:
    """P graded groups. With dynamic sampling, groups all right or all wrong are drawn anew, at most three times; those
    of open requests stay, since whether they are right is not for the training to know."""
    rollouts: list[Rollout] = []
    grades: list[Grade] = []
    reward_s = 0.0
    for attempt in range(4 if config.dynamic_sampling else 1):
        n_missing = config.problems - len(grades) // config.answers
        first = state.extra["next_problem"]
        problems = [problem_of(stream, config, step=state.step, index=first + i) for i in range(n_missing)]
        state.extra["next_problem"] = first + n_missing
        drawn = sample_answers(
            engine, tokenizer, problems, answers_per_problem=config.answers, params=params, seed=seed * 4 + attempt
        )
        began = time.perf_counter()
        graded = grade(drawn, verifiers, tokenizer)
        reward_s += time.perf_counter() - began
        last = attempt == 3 or not config.dynamic_sampling
        for g in range(0, len(drawn), config.answers):
            group = slice(g, g + config.answers)
            open_ended = is_request(drawn[g].problem)
            if last or open_ended or len({grade.accuracy for grade in graded[group]} - {None}) > 1:
                rollouts += drawn[group]
                grades += graded[group]
        if len(grades) == config.problems * config.answers:
            break
    began = time.perf_counter()
    rewards = [reward(grade, config) for grade in grades]
    requests = [i for i, rollout in enumerate(rollouts) if is_request(rollout.problem)]
    preference: dict[str, float] | None = None
    if requests:
        assert judge is not None, "open requests are drawn where there is a reward model to judge them"
        judged = judge.judge([rollouts[i] for i in requests])
        for i, value in zip(requests, judged.rewards_A, strict=True):
            rewards[i] = preference_reward(value, grades[i], config)
        preference = watched(judged, answers=config.answers)
    reward_s += time.perf_counter() - began
    rewards_PG = torch.tensor(rewards).view(config.problems, config.answers)
    return Groups(rollouts, grades, rewards_PG, ~rewards_PG.isnan(), reward_s, preference)


def problem_of(stream: ProblemStream, config: RlConfig, *, step: int, index: int) -> Problem:
    """A problem with a right answer, or, in the last part of the steps and in its share, an open request."""
    is_last_part = step >= config.steps - round(config.steps * config.preference_last)
    drawn = random.Random(f"preference {stream.seed} {index}").random()
    return stream.request(index) if is_last_part and drawn < config.preference_share else stream.at(index)


def by_rules(groups: Groups) -> dict[str, float]:
    """Reward and means of the answers that rules graded; open requests are counted apart."""
    ruled = [i for i, rollout in enumerate(groups.rollouts) if not is_request(rollout.problem)]
    if not ruled:
        return {}
    rewards_A, valid_A = groups.rewards_PG.flatten()[ruled], groups.valid_PG.flatten()[ruled]
    return {"reward": float(rewards_A[valid_A].mean()), **summary([groups.grades[i] for i in ruled])}


def preference_reward(judged: float, grade: Grade, config: RlConfig) -> float:
    """Reward model + format + language, weighted. (R1: general reward = reward model + format)"""
    return (
        config.preference_weight * judged
        + config.format_weight * grade.well_formed
        + config.language_weight * grade.language
    )


def check_undecided(groups: Groups, config: RlConfig, verifiers: Verifiers, step: int) -> None:
    """Stop where most answers are undecided: the rest would teach little, and somebody must look at the verifier."""
    undecided = [rollout for rollout, g in zip(groups.rollouts, groups.grades, strict=True) if g.accuracy is None]
    if len(undecided) <= config.max_undecided * len(groups.grades):
        return
    reason, count = next(iter(error_reasons(groups.grades).items()))
    verifiers.forget([(rollout.problem, rollout.message) for rollout in undecided])
    raise ValueError(
        f"step {step}: {len(undecided)} of {len(groups.grades)} answers are undecided, most often ({count}) {reason!r}"
        f"; mend that and start again, the stage goes on from its last checkpoint (or raise "
        f"max_undecided={config.max_undecided})"
    )


def reward(grade: Grade, config: RlConfig) -> float:
    """accuracy + format + language, weighted; NaN where the verifier could not decide, never a silent 0."""
    if grade.accuracy is None:
        return float("nan")
    return (
        config.accuracy_weight * grade.accuracy
        + config.format_weight * grade.well_formed
        + config.language_weight * grade.language
    )


def learnable(groups: Groups, *, divide_by_std: bool) -> tuple[list[Rollout], list[float]]:
    """The answers whose advantage is not zero, and their advantages."""
    rewards_PG, valid_PG = groups.rewards_PG, groups.valid_PG
    advantages_A = group_advantages(rewards_PG, valid_PG=valid_PG, divide_by_std=divide_by_std).flatten()
    highest_P1 = rewards_PG.masked_fill(~valid_PG, -torch.inf).amax(1, keepdim=True)
    lowest_P1 = rewards_PG.masked_fill(~valid_PG, torch.inf).amin(1, keepdim=True)
    varied_A = ((highest_P1 - lowest_P1 > 1e-6) & valid_PG).flatten()
    kept = varied_A.nonzero()[:, 0].tolist()
    return [groups.rollouts[i] for i in kept], advantages_A[varied_A].tolist()


def held_out(
    model: Transformer,
    engine: Engine,
    tokenizer: Tokenizer,
    stream: ProblemStream,
    verifiers: Verifiers,
    max_tokens: int,
    n_problems: int,
) -> dict[str, float]:
    """Accuracy, thinking, length and how far drafts still follow, on problems that no stage trains on; the same ones
    and the same noise each time."""
    problems = [stream.at(i, "held_out") for i in range(n_problems)]
    params = SamplingParams(max_tokens=max_tokens)  # temperature 1, as every evaluation of checkpoints
    rollouts = sample_answers(engine, tokenizer, problems, answers_per_problem=1, params=params, seed=0)
    seen = summary(grade(rollouts, verifiers, tokenizer)) | drafting(model, tokenizer, rollouts)
    return {
        f"held_out_{name}": seen[name]
        for name in (
            "accuracy", "think_share", "length", "length_thinking", "mixed_share", "mtp_acceptance", "verifier_errors"
        )
        if name in seen and (name != "verifier_errors" or seen[name])
    }


def held_out_requests(
    engine: Engine, tokenizer: Tokenizer, stream: ProblemStream, config: RlConfig, judge: Judge
) -> dict[str, float]:
    """Reward model against truth on requests that neither it nor the policy was trained on; the same ones each time."""
    problems = [stream.request(i, "held_out") for i in range(config.eval_problems)]
    params = SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens)
    rollouts = sample_answers(engine, tokenizer, problems, answers_per_problem=1, params=params, seed=0)
    return {f"held_out_{name}": value for name, value in watched(judge.judge(rollouts), answers=1).items()}


def report_step(recorder: Recorder, groups: Groups, step: int) -> None:
    """One readable trace a step, the longest right one or else the first, and of open requests the one that the reward
    model likes best: that is where hacking shows. Verifier errors by reason."""
    ruled = [i for i, rollout in enumerate(groups.rollouts) if not is_request(rollout.problem)]
    right = [i for i in ruled if groups.grades[i].accuracy == 1.0]
    shown = [max(right, key=lambda i: groups.grades[i].length) if right else ruled[0]] if ruled else []
    rewards_A = groups.rewards_PG.flatten().tolist()
    if requests := [i for i, rollout in enumerate(groups.rollouts) if is_request(rollout.problem)]:
        shown.append(max(requests, key=lambda i: rewards_A[i]))
    for i in shown:
        rollout, grade = groups.rollouts[i], groups.grades[i]
        recorder.sample(
            {
                "step": step,
                "problem": rollout.problem.prompt,
                "answer": rollout.problem.answer,
                "family": rollout.problem.family,
                "thinking": rollout.message.thinking,
                "content": rollout.message.content,
                "correct": grade.accuracy == 1.0,
                "reward": rewards_A[i],
            }
        )
    for reason, count in error_reasons(groups.grades).items():
        recorder.log(f"step {step}: the verifier could not decide {count} answers: {reason}")


@dataclass(frozen=True)
class ProblemStream:
    """Where RL problems come from: the generators, or a user's own list in turn."""

    source: ProblemSource
    seed: int
    own: tuple[Problem, ...] = ()
    own_held_out: tuple[Problem, ...] = ()

    def at(self, index: int, split: Split = "train") -> Problem:
        own = self.own if split == "train" else self.own_held_out
        return own[index % len(own)] if own else problem_at(self.source, self.seed, index, split)

    def request(self, index: int, split: Split = "train") -> Problem:
        """An open request, whatever problems are the user's own."""
        return request_at(self.source, self.seed, index, split)
