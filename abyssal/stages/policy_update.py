"""One GRPO update: graded answers -> packed rows -> a clipped step. Owns no sampling and no reward.

The trainer's forward takes the experts that the engine chose when it drew the tokens (router replay): both then compute
the same function, and the ratio starts at 1 in any precision. The reference routes for itself: it is a policy of its
own, and experts that the policy has since learnt to choose would make it another one.
Letters: P problems, G answers per problem, A answers (P x G), B rows, T tokens, N answer tokens of some rows, V
vocabulary, M MoE layers, K chosen experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

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
from abyssal.stages.sampled_policy import Kept, pack_experts, pack_kept, sampled_logits, temperature_of
from abyssal.stages.state import TrainState, apply_step
from abyssal.types import Rollout


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """The objective. R1 clips at 10 either way; DAPO raises `clip_high` alone; Dr. GRPO divides by no deviation.

    `importance_cap`: the ratio is to the trainer's own log-probs before the step, and each token's objective is weighed
    by how likelier the trainer finds it than the engine did, at most so many times (2 is usual).
    `unbiased_kl` and `off_policy_mask` (in nats a token) are DeepSeek-V3.2's; see loss/grpo.py.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.001
    divide_by_std: bool = True
    mean: Literal["answer", "token"] = "answer"
    minibatches: int = 1  # optimizer steps per batch of rollouts
    clip_gradient: float = 1.0
    router_replay: bool = True  # compute with the experts that the engine chose
    importance_cap: float = 0.0  # 0: off
    unbiased_kl: bool = False
    off_policy_mask: float = 0.0  # 0: off
    mtp_weight: float = 0.1  # keeps the MTP module in step with the policy; its gradient stops at the module

    def __post_init__(self) -> None:
        if self.importance_cap != 0 and not self.importance_cap >= 1:
            raise ValueError(
                f"importance_cap={self.importance_cap} would shrink tokens on which trainer and engine agree; "
                f"use 0 (off) or at least 1"
            )
        if not self.off_policy_mask >= 0:
            raise ValueError(f"off_policy_mask={self.off_policy_mask} is a distance in nats; use 0 (off) or above")
        if self.unbiased_kl and self.kl_weight == 0:
            raise ValueError("unbiased_kl=true has no KL to correct, since kl_weight=0; set one of them")


@dataclass(frozen=True)
class AnswerBatch:
    """Answers packed in rows. Tensors (B, T) hold, at each answer token, its value for that token.

    `drawn_logp_BT` are the engine's log-probs under the distribution it drew from: at `temperature`, over the `kept`
    ids of the first `vocab_size`. `experts_BTMK` int16 are those it chose at each token it computed, -1 elsewhere.
    `old_logp_BT` are the trainer's own before the first step, where several steps weigh them.
    """

    batch: Batch  # mask_BT is True on answer tokens
    drawn_logp_BT: Tensor
    advantage_BT: Tensor
    answer_BT: Tensor
    n_answers: int
    experts_BTMK: Tensor | None = None
    temperature: float = 1.0
    kept: Kept | None = None
    vocab_size: int | None = None
    old_logp_BT: Tensor | None = None

    @property
    def lengths_B(self) -> Tensor:
        """Tokens of each row; behind them is padding."""
        assert self.batch.segments_BT is not None, "answers are packed so that they cannot see each other"
        return (self.batch.segments_BT > 0).sum(1)

    def rows(self, rows: Tensor) -> AnswerBatch:
        """Some of its rows, as wide as the longest of them needs."""
        width = _in_eights(int(self.lengths_B[rows].max()))

        def cut(x: Tensor) -> Tensor:
            return x[rows, :width]

        return replace(
            self,
            batch=Batch(*(None if x is None else cut(x) for x in self.batch)),  # type: ignore[arg-type]
            drawn_logp_BT=cut(self.drawn_logp_BT),
            advantage_BT=cut(self.advantage_BT),
            answer_BT=cut(self.answer_BT),
            experts_BTMK=None if self.experts_BTMK is None else cut(self.experts_BTMK),
            kept=None if self.kept is None else Kept(self.kept.ids_X, cut(self.kept.start_BT), cut(self.kept.count_BT)),
            old_logp_BT=None if self.old_logp_BT is None else cut(self.old_logp_BT),
        )


def _in_eights(n_tokens: int) -> int:
    return -(-n_tokens // 8) * 8  # FP32 products give a row the same bits where rows come in fours


def answer_batch(
    rollouts: list[Rollout],
    advantages: list[float],
    *,
    row_len: int,
    pad_id: int,
    device: torch.device,
    vocab_size: int | None = None,
) -> AnswerBatch:
    """Pack each prompt and its answer so that they share nothing but a row, of `row_len` or as the longest needs."""
    completions = [r.completion for r in rollouts]
    examples = [
        Example(
            [*c.prompt_ids, *c.ids],
            [0] * len(c.prompt_ids) + [1] * len(c.ids),
        )
        for c in completions
    ]
    longest = max(len(example.ids) for example in examples)
    packed = pack_isolated(examples, row_len=row_len if longest <= row_len else _in_eights(longest), pad_id=pad_id)
    n_rows, width = packed.ids_BT.shape
    drawn_logp, advantage = (np.zeros((n_rows, width), dtype=np.float32) for _ in range(2))
    answer = np.zeros((n_rows, width), dtype=np.int64)
    spans: list[tuple[int, slice]] = []
    for i, (c, (row, start)) in enumerate(zip(completions, packed.places, strict=True)):
        begin = start + len(c.prompt_ids)
        span = slice(begin, begin + len(c.ids))
        drawn_logp[row, span] = c.logps if c.drawn_from is None else c.drawn_from.logps
        advantage[row, span], answer[row, span] = advantages[i], i
        spans.append((row, span))
    experts_BTMK = pack_experts(completions, packed.places, (n_rows, width))
    kept = pack_kept(completions, spans, (n_rows, width))
    return AnswerBatch(
        batch=Batch(packed.ids_BT, packed.mask_BT, packed.segment_BT, packed.position_BT).to(device),
        drawn_logp_BT=torch.from_numpy(drawn_logp).to(device),
        advantage_BT=torch.from_numpy(advantage).to(device),
        answer_BT=torch.from_numpy(answer).to(device),
        n_answers=len(rollouts),
        experts_BTMK=None if experts_BTMK is None else experts_BTMK.to(device),
        temperature=temperature_of(completions),
        kept=None if kept is None else Kept(*(tensor.to(device) for tensor in kept)),
        vocab_size=vocab_size,
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
    if config.router_replay and answers.experts_BTMK is None and has_router(state.model):
        raise ValueError(
            "router_replay=true, but the answers carry no experts; build the engine with record_experts=True, or set "
            "router_replay=false"
        )
    order, lengths_B = torch.randperm(len(answers.batch.ids_BT), generator=shuffle), answers.lengths_B.cpu()
    totals: dict[str, float] = {}
    loads: list[list[Tensor]] = []  # of each piece, one (E,) a layer
    # rows of like length are computed together, so that little of it is padding
    chunks = [chunk[lengths_B[chunk].argsort(stable=True)] for chunk in order.chunk(config.minibatches) if len(chunk)]
    if config.importance_cap > 0 and len(chunks) > 1:  # with one step, what it computes is what was before it
        pieces = [piece for rows in chunks for piece in rows.split(rows_per_pass)]
        old_logp_BT = _logp_before(state.model, answers, pieces, replay=config.router_replay)
        answers = replace(answers, old_logp_BT=old_logp_BT)
    for rows in chunks:
        in_chunk = answers.batch.mask_BT[rows]
        n_answers = len(answers.answer_BT[rows][in_chunk].unique())
        n_tokens = int(in_chunk.sum())
        for piece in rows.split(rows_per_pass):
            metrics, piece_loads = _backward(
                state.model,
                answers.rows(piece),
                reference=reference,
                config=config,
                n_answers=n_answers,
                n_tokens=n_tokens,
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


def has_router(model: Transformer) -> bool:
    return any(model.config.is_moe(layer) for layer in range(model.config.num_hidden_layers))


def apart(model: Transformer) -> tuple[list[Tensor], list[Tensor]]:
    """The policy's parameters, and those of MTP modules with a gradient: its size must not shrink the policy's step."""
    policy: list[Tensor] = [p for name, p in model.named_parameters() if not name.startswith("mtp.")]
    return policy, [p for p in model.mtp.parameters() if p.grad is not None]


def _backward(
    model: Transformer,
    answers: AnswerBatch,
    *,
    reference: Transformer | None,
    config: GrpoConfig,
    n_answers: int,
    n_tokens: int,
) -> tuple[dict[str, float], list[Tensor]]:
    """Gradients of these rows, whose loss is already their share of the minibatch's mean; metrics and expert loads."""
    target_BT = answers.batch.mask_BT
    routings: list[Routing] = []
    hidden_BTD, logits_NV, logp_N = _forward(model, answers, replay=config.router_replay, routings=routings)
    drawn_logp_N = old_logp_N = answers.drawn_logp_BT[target_BT]
    if config.importance_cap > 0:
        old_logp_N = logp_N.detach() if answers.old_logp_BT is None else answers.old_logp_BT[target_BT]
    ref_logp_N = None
    if reference is not None:
        with torch.no_grad():
            ref_logp_N = _forward(reference, answers, replay=False).logp_N
    loss = grpo_loss(
        logp_N,
        old_logp_N=old_logp_N,
        ref_logp_N=ref_logp_N,
        advantages_N=answers.advantage_BT[target_BT],
        answer_N=answers.answer_BT[target_BT],
        n_answers=n_answers,
        n_all_answers=answers.n_answers,
        n_tokens=n_tokens,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        kl_weight=config.kl_weight,
        mean=config.mean,
        drawn_logp_N=drawn_logp_N,
        importance_cap=config.importance_cap,
        unbiased=config.unbiased_kl,
        off_policy_mask=config.off_policy_mask,
    )
    loss.loss.backward()
    share = len(logp_N) / n_tokens
    metrics = {
        "loss": float(loss.loss.detach()),
        "clip_share": float(loss.clip_share) * share,
        "kl": float(loss.kl) * share,
        "entropy": float(entropy(logits_NV.detach()).mean()) * share,
    }
    if config.importance_cap > 0:
        metrics["importance_cut_share"] = float(loss.importance_cut_share) * share
    if config.off_policy_mask > 0:
        metrics["off_policy_share"] = float(loss.n_off_policy) / n_answers
    if config.mtp_weight > 0 and len(model.mtp):
        # only the module learns: the policy must move by its reward alone, yet drafts must follow it
        mtp = mtp_loss(model, hidden_BTD.detach(), answers.batch, None)
        (config.mtp_weight * share * mtp).backward(inputs=list(model.mtp.parameters()))
        metrics["mtp_loss"] = float(mtp.detach()) * share
    return metrics, loads_of(model, routings, answers.batch)


class _Forward(NamedTuple):
    """`logits_NV` are the model's own; `logp_N` those of the answer tokens under the policy that was drawn from."""

    hidden_BTD: Tensor
    logits_NV: Tensor
    logp_N: Tensor


def _forward(
    model: Transformer, answers: AnswerBatch, *, replay: bool, routings: list[Routing] | None = None
) -> _Forward:
    """What the model says about the answer tokens, on the engine's experts or on its own."""
    batch, target_BT = answers.batch, answers.batch.mask_BT
    hidden_BTD = model.hidden(
        batch.ids_BT,
        positions_BT=batch.positions_BT,
        segments_BT=batch.segments_BT,
        routings=routings,
        experts_BTMK=answers.experts_BTMK.long() if replay and answers.experts_BTMK is not None else None,
    )
    places_N = target_BT.flatten().nonzero()[:, 0] - 1  # the place before predicts; an answer never opens a row
    logits_NV = model.logits(hidden_BTD.flatten(0, 1).index_select(0, places_N))
    if answers.vocab_size is not None and answers.vocab_size < logits_NV.shape[1]:
        logits_NV = logits_NV[:, : answers.vocab_size]
    kept_NV = None if answers.kept is None else answers.kept.mask(target_BT, logits_NV.shape[1])
    policy_NV = sampled_logits(logits_NV, temperature=answers.temperature, kept_NV=kept_NV)
    return _Forward(hidden_BTD, logits_NV, token_logprobs(policy_NV, batch.ids_BT[target_BT]))


@torch.no_grad()
def _logp_before(model: Transformer, answers: AnswerBatch, pieces: list[Tensor], *, replay: bool) -> Tensor:
    """The trainer's own log-prob of each answer token before the first step, (B, T)."""
    logp_BT = torch.zeros_like(answers.drawn_logp_BT)
    for rows in pieces:
        piece = answers.rows(rows)
        piece_BT = torch.zeros_like(piece.drawn_logp_BT)
        piece_BT[piece.batch.mask_BT] = _forward(model, piece, replay=replay).logp_N
        logp_BT[rows, : piece_BT.shape[1]] = piece_BT
    return logp_BT
