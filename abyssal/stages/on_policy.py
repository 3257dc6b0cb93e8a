"""Stage `on_policy`: on-policy distillation. (GKD, Agarwal et al. 2024; "on-policy distillation")

The student answers, the teacher says at each token what it would have said there itself, and the student moves towards
that by the reverse KL over the whole vocabulary. SFT on traces teaches in contexts that the teacher wrote; here the
contexts are the student's own, mistakes included. No reward is asked: the teacher's distribution is the only signal.
Teacher and student share a tokenizer, so the KL is exact.
Letters: P problems, G answers per problem, B rows, T tokens, N answer tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from abyssal.data.pack import Example, pack_isolated
from abyssal.engine.engine import Engine
from abyssal.loss.cross_entropy import entropy
from abyssal.loss.kl import reverse_kl
from abyssal.model.transformer import Transformer
from abyssal.optim.clip import clip_gradients
from abyssal.optim.schedule import learning_rate
from abyssal.record import Recorder, memory_gb, read_steps, seconds_of_work
from abyssal.reward.verifiers import Verifiers
from abyssal.rollout import sample_answers
from abyssal.stages.objective import Batch, mtp_loss
from abyssal.stages.policy_update import apart
from abyssal.stages.rl import ProblemStream, held_out
from abyssal.stages.schedule_points import RecorderAt, due, steps_in_all
from abyssal.stages.state import TrainState, apply_step, build_optimizers, resume_state, save_state
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Rollout, SamplingParams


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig:
    steps: int = 60  # 0: the stage is passed over
    seconds: float = math.inf  # of work, after which it ends too; 0: as many as `distil` took
    start: Literal["base", "student"] = "base"  # where the other arms start, or on top of distillation
    problems: int = 64  # P per step
    answers: int = 1  # G per problem: nothing is compared within a group, so other problems teach more
    max_tokens: int = 128
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: float = 0.003  # Muon, matrices
    adamw_lr: float = 1.5e-3
    weight_decay: float = 0.0
    warmup: int = 3
    clip: float = 1.0
    mtp_weight: float = 0.1  # of a student that has MTP modules; its gradient stops at them
    row_len: int = 0  # of packed answers; 0: as long as the longest, which leaves attention the least to do
    rows_per_pass: int = 16
    eval_every: int = 10
    eval_problems: int = 100
    save_every: int = 10
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        SamplingParams(max_tokens=self.max_tokens)  # raises where it makes no sense
        if self.seconds < 0:
            raise ValueError(f"seconds={self.seconds} is negative; use inf for no limit")


def distil_on_policy(
    stage_dir: Path,
    *,
    config: OnPolicyConfig,
    model: Transformer,
    teacher: Transformer,
    tokenizer: Tokenizer,
    stream: ProblemStream,
    first_problem: int,
    verifiers: Verifiers,
    seed: int,
    recorder_at: RecorderAt,
) -> TrainState:
    """Leaves `stage_dir`/checkpoint; continues from it if there is one."""
    check_vocabularies(model, teacher)
    optimizers = build_optimizers(
        model, kind=config.optimizer, lr=config.lr, adamw_lr=config.adamw_lr, weight_decay=config.weight_decay
    )
    state = TrainState(model, optimizers, extra={"next_problem": first_problem})
    resume_state(stage_dir / "checkpoint", state)
    engine = Engine(
        model,
        eos_ids=[tokenizer.eos_id],
        max_batch=config.problems * config.answers,
        record_experts=False,
        vocab_size=tokenizer.vocab_size,
    )
    params = SamplingParams(max_tokens=config.max_tokens)

    with recorder_at(state.step) as recorder:
        worked_s = seconds_of_work(read_steps(stage_dir / "metrics.jsonl"))
        for step in range(state.step, state.extra.get("ended_at", config.steps)):
            began = time.perf_counter()
            first = state.extra["next_problem"]
            problems = [stream.at(first + i) for i in range(config.problems)]
            state.extra["next_problem"] = first + config.problems
            rollouts = sample_answers(
                engine, tokenizer, problems, answers_per_problem=config.answers, params=params, seed=seed + step
            )
            drawn = time.perf_counter()
            lr = learning_rate(step, config.steps, warmup=config.warmup, shape="constant")
            update = follow_teacher(
                state, teacher, answer_rows(rollouts, config.row_len, tokenizer.pad_id), config=config, lr_fraction=lr
            )
            engine.load_weights(model)  # the next answers come from the new student
            updated = time.perf_counter()

            n_tokens = sum(len(r.completion.ids) for r in rollouts)
            state.step, state.tokens = step + 1, state.tokens + n_tokens
            metrics: dict[str, Any] = {
                **update,
                "think_share": sum(r.message.thinking is not None for r in rollouts) / len(rollouts),
                "length": n_tokens / len(rollouts),
                "truncated_share": sum(r.completion.finish_reason != "stop" for r in rollouts) / len(rollouts),
                "lr": lr * (config.lr if config.optimizer == "muon" else config.adamw_lr),
                "tokens": n_tokens,
                "rollout_s": drawn - began,
                "update_s": updated - drawn,
                "memory_gb": memory_gb(),
            }
            worked_s += updated - began
            total = steps_in_all(step, config.steps, worked_s=worked_s, seconds=config.seconds)
            if due(step, config.eval_every, total):
                n = config.eval_problems
                metrics |= held_out(model, engine, tokenizer, stream, verifiers, config.max_tokens, n)
            ended = time.perf_counter()
            metrics |= {"measure_s": ended - updated, "time_s": ended - began}
            recorder.step(step, total, metrics)
            show_first(recorder, rollouts, step)
            if due(step, config.save_every, total):
                if total == step + 1 < config.steps:
                    state.extra["ended_at"] = total  # by the clock: taken up again, the stage is still over
                save_state(
                    stage_dir / "checkpoint",
                    state,
                    tokenizer,
                    generation={"temperature": 0.6, "top_p": 0.95, "do_sample": True},
                )
            if total == step + 1:
                break
    return state


def check_vocabularies(model: Transformer, teacher: Transformer) -> None:
    n_ours, n_theirs = model.config.vocab_size, teacher.config.vocab_size
    if n_ours != n_theirs:
        raise ValueError(
            f"the student knows {n_ours} tokens, the teacher {n_theirs}: their distributions cannot be compared token "
            f"by token; give both one tokenizer, or distil by traces"
        )


def answer_rows(rollouts: list[Rollout], row_len: int, pad_id: int) -> Batch:
    """Prompts and answers packed so that they cannot see each other; the answers' tokens are the targets."""
    examples = [
        Example([*c.prompt_ids, *c.ids], [0] * len(c.prompt_ids) + [1] * len(c.ids))
        for c in (rollout.completion for rollout in rollouts)
    ]
    packed = pack_isolated(examples, row_len=max(row_len, max(len(e.ids) for e in examples)), pad_id=pad_id)
    return Batch(packed.ids_BT, packed.mask_BT, packed.segment_BT, packed.position_BT)


def follow_teacher(
    state: TrainState, teacher: Transformer, batch: Batch, *, config: OnPolicyConfig, lr_fraction: float
) -> dict[str, float]:
    """One optimizer step on the mean reverse KL over all answer tokens of the batch."""
    model, n_tokens = state.model, int(batch.mask_BT.sum())
    device = model.embed_tokens.weight.device
    totals: dict[str, float] = {}
    for rows in torch.arange(len(batch.ids_BT)).split(config.rows_per_pass):
        piece = batch.rows(rows).to(device)
        for name, value in _backward(model, teacher, piece, n_tokens=n_tokens, mtp_weight=config.mtp_weight).items():
            totals[name] = totals.get(name, 0.0) + value
    policy, drafts = apart(model)
    totals["grad_norm"] = clip_gradients(policy, config.clip)
    if drafts:
        clip_gradients(drafts, config.clip)
    apply_step(state.optimizers, lr_fraction)
    return totals


def _backward(
    model: Transformer, teacher: Transformer, piece: Batch, *, n_tokens: int, mtp_weight: float
) -> dict[str, float]:
    """Gradients of some rows, whose loss is already their share of the batch's mean."""
    places_N = piece.mask_BT.flatten().nonzero()[:, 0] - 1  # the place before predicts; an answer never opens a row
    with torch.no_grad():
        teacher_logits_NV = _logits_at(teacher, _hidden(teacher, piece), places_N)
    hidden_BTD = _hidden(model, piece)
    logits_NV = _logits_at(model, hidden_BTD, places_N)
    loss = reverse_kl(logits_NV, teacher_logits_NV).sum() / n_tokens
    loss.backward()
    share = len(places_N) / n_tokens
    metrics = {"loss": float(loss.detach()), "entropy": float(entropy(logits_NV.detach()).mean()) * share}
    if mtp_weight > 0 and len(model.mtp):
        mtp = mtp_loss(model, hidden_BTD.detach(), piece, None)
        (mtp_weight * share * mtp).backward(inputs=list(model.mtp.parameters()))
        metrics["mtp_loss"] = float(mtp.detach()) * share
    return metrics


def _hidden(model: Transformer, piece: Batch) -> Tensor:
    return model.hidden(piece.ids_BT, positions_BT=piece.positions_BT, segments_BT=piece.segments_BT)


def _logits_at(model: Transformer, hidden_BTD: Tensor, places_N: Tensor) -> Tensor:
    return model.logits(hidden_BTD.flatten(0, 1).index_select(0, places_N))


def show_first(recorder: Recorder, rollouts: list[Rollout], step: int) -> None:
    rollout = rollouts[0]
    recorder.sample(
        {
            "step": step,
            "problem": rollout.problem.prompt,
            "answer": rollout.problem.answer,
            "family": rollout.problem.family,
            "thinking": rollout.message.thinking,
            "content": rollout.message.content,
        }
    )
