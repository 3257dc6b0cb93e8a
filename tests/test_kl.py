"""The k3 estimator of the distance to the reference and the exact reverse KL: value, sign, gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abyssal.loss.kl import k3_kl, reverse_kl, unbiased_kl

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


def exact_gradient(logits_V: torch.Tensor, divergence: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    logits_V = logits_V.clone().requires_grad_()
    divergence(logits_V.log_softmax(-1)).backward()
    assert logits_V.grad is not None
    return logits_V.grad


def test_times_the_ratio_its_value_by_hand():
    # drawn at 0.1, now 0.2, and 0.4 under the reference: twice (2 - log 2 - 1)
    logp_N, ref_logp_N, drawn_logp_N = (torch.tensor([math.log(p)]) for p in (0.2, 0.4, 0.1))
    assert unbiased_kl(logp_N, ref_logp_N, drawn_logp_N).tolist() == pytest.approx([2 * (1 - math.log(2))], abs=1e-6)


def test_times_the_ratio_value_and_gradient_are_the_divergences_whoever_drew():
    """Every token as often as the old policy says it. k3 alone has the gradient of the divergence the other way."""
    logits_V = torch.tensor([0.3, -1.0, 0.5, 1.0], dtype=torch.float64)
    ref_V = torch.tensor([1.0, 0.2, -0.5, 0.1], dtype=torch.float64).log_softmax(-1)
    old_V = torch.tensor([-0.4, 0.0, 0.3, 0.9], dtype=torch.float64).log_softmax(-1)
    here_V = logits_V.log_softmax(-1)

    def forward(logp_V: torch.Tensor) -> torch.Tensor:
        return (logp_V.exp() * (logp_V - ref_V)).sum()

    def backward(logp_V: torch.Tensor) -> torch.Tensor:
        return (ref_V.exp() * (ref_V - logp_V)).sum()

    def estimate(logp_V: torch.Tensor) -> torch.Tensor:
        return (old_V.exp() * unbiased_kl(logp_V, ref_V, old_V)).sum()

    def biased(logp_V: torch.Tensor) -> torch.Tensor:
        return (here_V.exp() * k3_kl(logp_V, ref_V)).sum()

    assert float(estimate(here_V)) == pytest.approx(float(forward(here_V)), abs=1e-12)
    assert torch.allclose(exact_gradient(logits_V, estimate), exact_gradient(logits_V, forward), atol=1e-12)
    assert torch.allclose(exact_gradient(logits_V, biased), exact_gradient(logits_V, backward), atol=1e-12)
    assert not torch.allclose(exact_gradient(logits_V, forward), exact_gradient(logits_V, backward), atol=1e-2)


def test_the_reverse_kl_by_hand():
    """Student (1/2, 1/2), teacher (1/4, 3/4): 1/2 ln 2 + 1/2 ln 2/3. The other way round it would be another number."""
    student_NV, teacher_NV = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])
    assert reverse_kl(student_NV, teacher_NV).tolist() == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3)])
    assert reverse_kl(teacher_NV, student_NV).tolist() == pytest.approx([0.25 * math.log(0.5) + 0.75 * math.log(1.5)])
    assert reverse_kl(teacher_NV, teacher_NV + 7).tolist() == pytest.approx([0.0], abs=1e-6)


def test_a_token_that_the_teacher_rules_out_costs_only_a_student_that_says_it():
    """Mode seeking: what the teacher alone says is free, what the student alone says is dear."""
    narrow_NV, wide_NV = torch.tensor([[0.0, -30.0]]), torch.tensor([[0.0, 0.0]])
    assert float(reverse_kl(narrow_NV, wide_NV)) == pytest.approx(math.log(2), abs=1e-4)
    assert float(reverse_kl(wide_NV, narrow_NV)) > 10


def test_the_gradient_of_the_reverse_kl_is_that_of_its_definition_and_stops_at_the_teacher():
    generator = torch.Generator().manual_seed(0)
    logits_NV, teacher_NV = (torch.randn(5, 7, generator=generator).requires_grad_() for _ in range(2))
    reverse_kl(logits_NV, teacher_NV).sum().backward()
    p_NV, q_NV = logits_NV.detach().softmax(-1), teacher_NV.detach().softmax(-1)
    ratio_NV = (p_NV / q_NV).log()
    by_hand_NV = p_NV * (ratio_NV - (p_NV * ratio_NV).sum(-1, keepdim=True))  # d/dz_i of sum p log(p/q)
    assert logits_NV.grad is not None and teacher_NV.grad is None
    assert torch.allclose(logits_NV.grad, by_hand_NV, atol=1e-6)
    again_NV = logits_NV.detach().clone().requires_grad_()
    p_NV = again_NV.softmax(-1)
    (p_NV * (p_NV / q_NV).log()).sum().backward()
    assert again_NV.grad is not None and torch.allclose(logits_NV.grad, again_NV.grad, atol=1e-6)
