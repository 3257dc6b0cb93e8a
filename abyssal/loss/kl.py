"""Distance of a policy from another, per token: the sampled one of GRPO and the exact ones of distillation.

Letters: N tokens, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor


def k3_kl(logp_N: Tensor, ref_logp_N: Tensor) -> Tensor:
    """pi_ref/pi - log(pi_ref/pi) - 1: never negative, low variance, unbiased on samples of pi. (GRPO, eq. 4)"""
    log_ratio = ref_logp_N - logp_N
    return log_ratio.exp() - log_ratio - 1


def unbiased_kl(logp_N: Tensor, ref_logp_N: Tensor, drawn_logp_N: Tensor) -> Tensor:
    """k3 times pi/pi_old: its mean over samples of pi_old is the divergence, and so is its gradient. (DeepSeek-V3.2)

    The ratio carries a gradient. k3 alone has that of the other divergence, from the reference to pi, whose weight
    pi_ref/pi grows without bound where pi has become much less likely than the reference.
    """
    return (logp_N - drawn_logp_N).exp() * k3_kl(logp_N, ref_logp_N)


def reverse_kl(logits_NV: Tensor, teacher_logits_NV: Tensor) -> Tensor:
    """KL(student || teacher) of each row over the whole vocabulary, (N,) in FP32.

    Its mean is over what the student itself would say, so it asks the student to say nothing that the teacher would
    not, rather than everything that it would. (GKD; the reverse KL of on-policy distillation) No gradient reaches the
    teacher.
    """
    logp_NV = logits_NV.float().log_softmax(-1)
    teacher_logp_NV = teacher_logits_NV.detach().float().log_softmax(-1)
    return (logp_NV.exp() * (logp_NV - teacher_logp_NV)).sum(-1)


def forward_kl(logits_NV: Tensor, teacher_logits_NV: Tensor) -> Tensor:
    """KL(teacher || student) of each row over the whole vocabulary, (N,) in FP32: distillation on given text.

    Its mean is over what the teacher would say, so nothing that it would say may be missing in the student. (Hinton et
    al. 2015) No gradient reaches the teacher.
    """
    logp_NV = logits_NV.float().log_softmax(-1)
    teacher_logp_NV = teacher_logits_NV.detach().float().log_softmax(-1)
    return (teacher_logp_NV.exp() * (teacher_logp_NV - logp_NV)).sum(-1)
