"""Distance to the reference policy, per token.

Letters: N tokens.
"""

from __future__ import annotations

from torch import Tensor


def k3_kl(logp_N: Tensor, ref_logp_N: Tensor) -> Tensor:
    """pi_ref/pi - log(pi_ref/pi) - 1: never negative, low variance, unbiased on samples of pi. (GRPO, eq. 4)"""
    log_ratio = ref_logp_N - logp_N
    return log_ratio.exp() - log_ratio - 1
