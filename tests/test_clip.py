"""Clipping: one norm over all gradients, and no step from a gradient that is not a number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abyssal.optim.clip import clip_gradients


def with_gradients(*gradients: list[float]) -> list[Tensor]:
    params = [torch.zeros(len(g)).requires_grad_() for g in gradients]
    for p, g in zip(params, gradients, strict=True):
        p.grad = torch.tensor(g)
    return params


def test_a_long_gradient_is_scaled_as_one_vector():
    a, b = with_gradients([3.0, 0.0], [4.0])
    assert clip_gradients([a, b], 1.0) == pytest.approx(5.0)  # the norm before
    assert a.grad is not None and b.grad is not None
    assert a.grad.tolist() == pytest.approx([0.6, 0.0], abs=1e-5)
    assert b.grad.tolist() == pytest.approx([0.8], abs=1e-5)


def test_a_short_gradient_stays_as_it_is():
    (a,) = with_gradients([0.3, 0.4])
    assert clip_gradients([a], 1.0) == pytest.approx(0.5)
    assert a.grad is not None and torch.equal(a.grad, torch.tensor([0.3, 0.4]))


def test_parameters_without_a_gradient_do_not_count():
    (a,) = with_gradients([3.0, 4.0])
    assert clip_gradients([a, torch.zeros(2).requires_grad_()], 10.0) == pytest.approx(5.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_raises_before_any_step(bad: float):
    a, b = with_gradients([1.0, bad], [2.0])
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        clip_gradients([a, b], 1.0)
    assert b.grad is not None and b.grad.tolist() == [2.0]
