"""One GRPO update: graded answers -> packed rows -> a clipped step. Owns no sampling and no reward.

Letters: P problems, G answers per problem, A answers (P x G), B rows, T tokens, N answer tokens of some rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from abyssal.data.pack import Example, pack_isolated
from abyssal.loss.balance import max_violation
from abyssal.loss.cross_entropy import entropy, token_logprobs
from abyssal.loss.grpo import grpo_loss
from abyssal.model.moe import Routing
from abyssal.model.transformer import Transformer
from abyssal.optim.clip import clip_gradients
from abyssal.stages.objective import Batch, loads_of, mtp_loss
from abyssal.stages.state import TrainState, apply_step
from abyssal.types import Rollout


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """The objective. R1 clips at 10 either way; DAPO raises `clip_high` alone; Dr. GRPO divides by no deviation."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.001
    divide_by_std: bool = True
    mean: Literal["answer", "token"] = "answer"
    minibatches: int = 1  # optimizer steps per batch of rollouts
    clip_gradient: float = 1.0
    mtp_weight: float = 0.1  # keeps the MTP module in step with the policy; its gradient stops at the module


@dataclass(frozen=True)
class AnswerBatch:
    """Answers packed in rows. Tensors (B, T) hold, at each answer token, its value for that token."""

    batch: Batch  # mask_BT is True on answer tokens
    old_logp_BT: Tensor
    advantage_BT: Tensor
    answer_BT: Tensor
    n_answers: int


def answer_batch(
    rollouts: list[Rollout], advantages: list[float], *, row_len: int, pad_id: int, device: torch.device
) -> AnswerBatch:
    """Pack each prompt and its answer so that rows share nothing but their length: `row_len`, or the longest's."""
    examples = [
        Example(
            [*r.completion.prompt_ids, *r.completion.ids],
            [0] * len(r.completion.prompt_ids) + [1] * len(r.completion.ids),
        )
        for r in rollouts
    ]
    longest = max(len(example.ids) for example in examples)
    packed = pack_isolated(examples, row_len=max(row_len, longest), pad_id=pad_id)
    old_logp, advantage = (np.zeros(packed.ids_BT.shape, dtype=np.float32) for _ in range(2))
    answer = np.zeros(packed.ids_BT.shape, dtype=np.int64)
    for i, (rollout, (row, start)) in enumerate(zip(rollouts, packed.places, strict=True)):
        begin = start + len(rollout.completion.prompt_ids)
        span = slice(begin, begin + len(rollout.completion.ids))
        old_logp[row, span], advantage[row, span], answer[row, span] = rollout.completion.logps, advantages[i], i
    return AnswerBatch(
        batch=Batch(packed.ids_BT, packed.mask_BT, packed.segment_BT, packed.position_BT).to(device),
        old_logp_BT=torch.from_numpy(old_logp).to(device),
        advantage_BT=torch.from_numpy(advantage).to(device),
        answer_BT=torch.from_numpy(answer).to(device),
        n_answers=len(rollouts),
    )


def update_policy(
    state: TrainState,
    answers: AnswerBatch,
    *,
    reference: Transformer | None,
    config: GrpoConfig,
    lr_fraction: float,
    rows_per_pass: int,
    shuffle: torch.Generator,
) -> dict[str, float]:
    """One optimizer step per minibatch of rows; means of its metrics."""
    order = torch.randperm(len(answers.batch.ids_BT), generator=shuffle)
    totals: dict[str, float] = {}
    loads: list[list[Tensor]] = []  # of each piece, one (E,) a layer
    chunks = [chunk for chunk in order.chunk(config.minibatches) if len(chunk)]
    for rows in chunks:
        in_chunk = answers.batch.mask_BT[rows]
        n_answers = len(answers.answer_BT[rows][in_chunk].unique())
        n_tokens = int(in_chunk.sum())
        for piece in rows.split(rows_per_pass):
            metrics, piece_loads = _backward(
                state.model, answers, piece, reference=reference, config=config, n_answers=n_answers, n_tokens=n_tokens
            )
            loads.append(piece_loads)
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value / len(chunks)
        policy, drafts = apart(state.model)
        grad_norm = clip_gradients(policy, config.clip_gradient)
        if drafts:
            clip_gradients(drafts, config.clip_gradient)
        totals["grad_norm"] = totals.get("grad_norm", 0.0) + grad_norm / len(chunks)
        apply_step(state.optimizers, lr_fraction)
    if loads[0]:
        of_layers = [torch.stack(pieces).sum(0) for pieces in zip(*loads, strict=True)]
        totals["max_violation"] = max(max_violation(load_E) for load_E in of_layers)
    return totals


def apart(model: Transformer) -> tuple[list[Tensor], list[Tensor]]:
    """The policy's parameters, and those of MTP modules with a gradient: its size must not shrink the policy's step."""
    policy: list[Tensor] = [p for name, p in model.named_parameters() if not name.startswith("mtp.")]
    return policy, [p for p in model.mtp.parameters() if p.grad is not None]


def _backward(
    model: Transformer,
    answers: AnswerBatch,
    rows: Tensor,
    *,
    reference: Transformer | None,
    config: GrpoConfig,
    n_answers: int,
    n_tokens: int,
) -> tuple[dict[str, float], list[Tensor]]:
    """Gradients of some rows, whose loss is already their share of the minibatch's mean; metrics and expert loads."""
    piece = answers.batch.rows(rows)
    target_BT = piece.mask_BT
    routings: list[Routing] = []
    hidden_BTD = model.hidden(
        piece.ids_BT, positions_BT=piece.positions_BT, segments_BT=piece.segments_BT, routings=routings
    )
    places_N = target_BT.flatten().nonzero()[:, 0] - 1  # the place before predicts; an answer never opens a row
    ids_N = piece.ids_BT[target_BT]
    logits_NV = model.logits(hidden_BTD.flatten(0, 1).index_select(0, places_N))
    logp_N = token_logprobs(logits_NV, ids_N)
    loss = grpo_loss(
        logp_N,
        old_logp_N=answers.old_logp_BT[rows][target_BT],
        ref_logp_N=None if reference is None else _reference_logp(reference, piece, places_N, ids_N),
        advantages_N=answers.advantage_BT[rows][target_BT],
        answer_N=answers.answer_BT[rows][target_BT],
        n_answers=n_answers,
        n_all_answers=answers.n_answers,
        n_tokens=n_tokens,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        kl_weight=config.kl_weight,
        mean=config.mean,
    )
    loss.loss.backward()
    share = len(ids_N) / n_tokens
    metrics = {
        "loss": float(loss.loss.detach()),
        "clip_share": float(loss.clip_share) * share,
        "kl": float(loss.kl) * share,
        "entropy": float(entropy(logits_NV.detach()).mean()) * share,
    }
    if config.mtp_weight > 0 and len(model.mtp):
        # only the module learns: the policy must move by its reward alone, yet drafts must follow it
        mtp = mtp_loss(model, hidden_BTD.detach(), piece, None)
        (config.mtp_weight * share * mtp).backward(inputs=list(model.mtp.parameters()))
        metrics["mtp_loss"] = float(mtp.detach()) * share
    return metrics, loads_of(model, routings, piece)


@torch.no_grad()
def _reference_logp(reference: Transformer, piece: Batch, places_N: Tensor, ids_N: Tensor) -> Tensor:
    hidden_BTD = reference.hidden(piece.ids_BT, positions_BT=piece.positions_BT, segments_BT=piece.segments_BT)
    return token_logprobs(reference.logits(hidden_BTD.flatten(0, 1).index_select(0, places_N)), ids_N)
