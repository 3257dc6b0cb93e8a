"""AdamW equals torch's own in FP32, and differs where it is meant to: the dtype of its moments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from abyssal.optim.adamw import AdamW

SHAPES = [(7, 5), (5,), (3, 4, 2), ()]
OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def run(optimizer: torch.optim.Optimizer, params: list[Tensor], n_steps: int = 10) -> None:
    generator = torch.Generator().manual_seed(1)
    for step in range(n_steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** (step % 3 - 1)
        optimizer.step()


def test_it_equals_torchs_adamw():
    ours, theirs = parameters(), parameters()
    run(AdamW(ours, **OPTIONS), ours)
    run(torch.optim.AdamW(theirs, **OPTIONS), theirs)
    for a, b, start in zip(ours, theirs, parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-6)
        assert not torch.allclose(a, start, atol=1e-3)


def test_the_first_step_by_hand():
    # both moments are corrected for their start at zero: the step is lr times the sign, after the decay
    p = torch.tensor([2.0, -1.0]).requires_grad_()
    p.grad = torch.tensor([0.5, -4.0])
    AdamW([p], lr=0.1, weight_decay=0.2).step()
    assert p.tolist() == pytest.approx([2.0 * 0.98 - 0.1, -1.0 * 0.98 + 0.1], abs=1e-6)


def test_groups_have_their_own_rate_and_decay():
    a, b = (torch.ones(2).requires_grad_() for _ in range(2))
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    AdamW([{"params": [a], "weight_decay": 0.0}, {"params": [b], "lr": 0.5}], lr=0.1, weight_decay=0.4).step()
    assert a.tolist() == pytest.approx([0.9, 0.9], abs=1e-6)
    assert b.tolist() == pytest.approx([1 - 0.5 * 0.4 - 0.5] * 2, abs=1e-6)


def test_moments_in_bfloat16_stay_close_and_take_half_the_memory():
    exact, rounded = parameters(), parameters()
    run(AdamW(exact, **OPTIONS), exact)
    optimizer = AdamW(rounded, **OPTIONS, moments=torch.bfloat16)
    run(optimizer, rounded)
    for p, want in zip(rounded, exact, strict=True):
        assert p.dtype == torch.float32
        assert optimizer.state[p]["exp_avg"].dtype == optimizer.state[p]["exp_avg_sq"].dtype == torch.bfloat16
        assert torch.allclose(p, want, atol=0.01)  # ten steps of 0.01, each right to 1 %
        assert not torch.equal(p, want)


def test_a_parameter_without_a_gradient_is_left_alone():
    a, b = torch.ones(2).requires_grad_(), torch.ones(2).requires_grad_()
    a.grad = torch.ones(2)
    optimizer = AdamW([a, b], lr=0.1)
    optimizer.step()
    assert b.tolist() == [1.0, 1.0] and b not in optimizer.state


def test_bias_correction_counts_the_steps_of_a_saved_state():
    ours, theirs = parameters(), parameters()
    first = AdamW(ours, **OPTIONS)
    run(first, ours, n_steps=3)
    second = AdamW(ours, **OPTIONS)
    second.load_state_dict(first.state_dict())
    run(second, ours, n_steps=3)
    whole = AdamW(theirs, **OPTIONS)
    run(whole, theirs, n_steps=3)
    run(whole, theirs, n_steps=3)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
