"""The k3 estimator of the distance to the reference: its value, its sign, and what it estimates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abyssal.loss.kl import k3_kl

LOGPS = st.floats(min_value=-8, max_value=0)


def test_its_value_by_hand():
    # the reference finds the token twice as likely, half as likely, and as likely
    logp_N = torch.tensor([math.log(0.2), math.log(0.4), math.log(0.3)])
    ref_logp_N = torch.tensor([math.log(0.4), math.log(0.2), math.log(0.3)])
    want = [2 - math.log(2) - 1, 0.5 + math.log(2) - 1, 0.0]
    assert k3_kl(logp_N, ref_logp_N).tolist() == pytest.approx(want, abs=1e-6)


@given(LOGPS, LOGPS)
def test_it_is_never_negative(logp: float, ref_logp: float):
    value = float(k3_kl(torch.tensor(logp, dtype=torch.float64), torch.tensor(ref_logp, dtype=torch.float64)))
    assert value >= 0
    if abs(logp - ref_logp) > 1e-3:
        assert value > 0


def test_its_mean_under_the_policy_is_the_divergence():
    p_V, q_V = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    mean = (p_V * k3_kl(p_V.log(), q_V.log())).sum()  # every token as often as the policy says it
    assert float(mean) == pytest.approx(float((p_V * (p_V / q_V).log()).sum()), abs=1e-6)


def test_its_gradient_pulls_the_policy_towards_the_reference():
    logp_N = torch.tensor([math.log(0.2), math.log(0.4)], requires_grad=True)
    k3_kl(logp_N, torch.tensor([math.log(0.4), math.log(0.2)])).sum().backward()
    assert logp_N.grad is not None
    assert logp_N.grad.tolist() == pytest.approx([1 - 2, 1 - 0.5])  # 1 - ratio: up where the reference is higher
