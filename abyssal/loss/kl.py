"""Distance to the reference policy, per token.

Letters: N tokens.
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
