"""Group relative policy optimisation: advantages within a group and the clipped objective. (DeepSeekMath section 4.1)

Options stand beside the paper's form: Dr. GRPO's missing standard deviation, DAPO's token mean and asymmetric clip,
truncated importance weights between engine and trainer, DeepSeek-V3.2's unbiased KL and off-policy mask. Three policies
meet here: `logp` of the one that learns, `old_logp` of the one before this batch's first step, `drawn_logp` of the
engine that drew the tokens. The last two are one but for rounding, and the same tensor unless importance is weighed.
Letters: P problems, G answers per problem, N answer tokens of all rows, A answers.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from abyssal.loss.kl import k3_kl, unbiased_kl


class GrpoLoss(NamedTuple):
    """Shares and means are over the tokens given; `n_off_policy` counts answers whose objective was masked."""

    loss: Tensor
    clip_share: Tensor
    kl: Tensor
    importance_cut_share: Tensor
    n_off_policy: Tensor


def group_advantages(
    rewards_PG: Tensor, *, valid_PG: Tensor | None = None, divide_by_std: bool = True, eps: float = 1e-6
) -> Tensor:
    """Each answer against the mean (and spread) of its own group.

    Answers that no verifier could decide (`valid_PG` False) count neither in the mean nor in the spread, and get 0.
    """
    valid_PG = torch.ones_like(rewards_PG) if valid_PG is None else valid_PG.to(rewards_PG.dtype)
    count_P1 = valid_PG.sum(1, keepdim=True).clamp(min=1)
    rewards_PG = torch.where(valid_PG > 0, rewards_PG, 0.0)
    centred_PG = (rewards_PG - rewards_PG.sum(1, keepdim=True) / count_P1) * valid_PG
    if not divide_by_std:
        return centred_PG
    std_P1 = (centred_PG.square().sum(1, keepdim=True) / count_P1).sqrt()
    return centred_PG / (std_P1 + eps)


def grpo_loss(
    logp_N: Tensor,
    *,
    old_logp_N: Tensor,
    ref_logp_N: Tensor | None,
    advantages_N: Tensor,
    answer_N: Tensor,
    n_answers: int,
    n_all_answers: int,
    n_tokens: int,
    clip_low: float,
    clip_high: float,
    kl_weight: float,
    mean: Literal["answer", "token"],
    drawn_logp_N: Tensor | None = None,
    importance_cap: float = 0.0,
    unbiased: bool = False,
    off_policy_mask: float = 0.0,
) -> GrpoLoss:
    """Minus the clipped objective, plus kl_weight times k3.

    `answer_N` says to which of `n_all_answers` answers a token belongs; all tokens of an answer are here. The means are
    over the minibatch's `n_answers` answers and `n_tokens` tokens, of which these may be a part, so that losses of
    parts add up. mean "answer": average each answer's tokens, then the answers (DeepSeekMath); "token": all tokens
    alike (DAPO), which does not favour short right answers. The ratio is clipped to [1 - clip_low, 1 + clip_high].

    `drawn_logp_N`, None for `old_logp_N`, are the log-probs at which the tokens were drawn. An `importance_cap` above 0
    weighs each token's objective by pi_old / pi_drawn, at most the cap. `unbiased` multiplies k3 by pi / pi_drawn. An
    `off_policy_mask` above 0 leaves out the objective, not the KL, of answers with a negative advantage whose mean
    log(pi_drawn / pi) is above it: the policy has left them, and pushing further only does harm.
    """
    drawn_logp_N = old_logp_N if drawn_logp_N is None else drawn_logp_N
    lengths_A = torch.bincount(answer_N, minlength=n_all_answers)
    ratio_N = (logp_N - old_logp_N).exp()
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    objective_N = torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    cut_N = torch.zeros_like(logp_N)
    if importance_cap > 0:
        weight_N = (old_logp_N - drawn_logp_N).exp()
        cut_N = (weight_N > importance_cap).float()
        objective_N = objective_N * weight_N.clamp(max=importance_cap)
    off_policy_A = torch.zeros_like(lengths_A, dtype=torch.bool)
    if off_policy_mask > 0:
        drift_A = _answer_means(drawn_logp_N - logp_N.detach(), answer_N, lengths_A)
        off_policy_A = (drift_A > off_policy_mask) & (_answer_means(advantages_N, answer_N, lengths_A) < 0)
        objective_N = objective_N.masked_fill(off_policy_A[answer_N], 0.0)
    kl_N = torch.zeros_like(logp_N)
    if ref_logp_N is not None:
        kl_N = unbiased_kl(logp_N, ref_logp_N, drawn_logp_N) if unbiased else k3_kl(logp_N, ref_logp_N)
    token_loss_N = kl_weight * kl_N - objective_N
    if mean == "token":
        loss = token_loss_N.sum() / n_tokens
    else:
        loss = (token_loss_N / lengths_A[answer_N]).sum() / n_answers
    clipped = (clipped_N * advantages_N < ratio_N * advantages_N).float().mean()
    return GrpoLoss(loss, clipped.detach(), kl_N.detach().mean(), cut_N.mean(), off_policy_A.sum())


def _answer_means(values_N: Tensor, answer_N: Tensor, lengths_A: Tensor) -> Tensor:
    """Mean over each answer's tokens; 0 for answers that have none here."""
    sums_A = values_N.new_zeros(len(lengths_A)).index_add(0, answer_N, values_N)
    return sums_A / lengths_A.clamp(min=1)
