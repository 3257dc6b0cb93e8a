"""Muon: what it does to singular values, how far a step moves, and that stacking changes nothing."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from small_models import small_model
from torch import Tensor

from abyssal.optim.muon import Muon, orthogonalize
from abyssal.stages.state import build_optimizers


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8), (32, 31)])
def test_singular_values_end_near_one(shape: tuple[int, int], dtype: torch.dtype):
    found = orthogonalize(random(1, *shape), dtype=dtype)
    assert found.dtype == dtype
    values = torch.linalg.svdvals(found[0].float())
    assert values.shape == (min(shape),)
    assert 0.6 < float(values.min()) and float(values.max()) < 1.3


def test_directions_are_kept():
    """U S V' becomes U V', roughly: its overlap with the exact one is near whole."""
    matrix = random(12, 20)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found, exact = orthogonalize(matrix[None])[0].float(), u @ vh
    assert float((found * exact).sum() / (found.norm() * exact.norm())) > 0.97


def test_the_size_of_the_gradient_does_not_matter():
    """Up to a power of two, which BF16 keeps exactly."""
    matrix = random(1, 12, 12)
    assert torch.allclose(orthogonalize(matrix), orthogonalize(matrix * 1024), atol=1e-2)


@pytest.mark.parametrize("shape", [(16, 16), (8, 64), (64, 8)])
def test_a_step_moves_every_matrix_by_its_rms(shape: tuple[int, int]):
    p = torch.zeros(shape).requires_grad_()
    p.grad = random(*shape)
    Muon([p], lr=0.5, weight_decay=0.0, update_rms=0.2).step()
    assert float(p.detach().square().mean().sqrt()) == pytest.approx(0.5 * 0.2, rel=0.2)


def test_the_step_goes_down_the_gradient():
    p = torch.zeros(4, 6).requires_grad_()
    p.grad = random(4, 6)
    Muon([p], lr=1.0).step()
    assert float((p.detach() * p.grad).sum()) < 0


def test_experts_stacked_equal_experts_one_by_one():
    experts = random(3, 8, 12)
    stacked = experts.clone().requires_grad_()
    single = [expert.clone().requires_grad_() for expert in experts]
    together, apart = Muon([stacked], lr=0.1), [Muon([p], lr=0.1) for p in single]
    for step in range(3):
        gradient = random(3, 8, 12, seed=step + 1)
        stacked.grad = gradient.clone()
        together.step()
        for p, g, optimizer in zip(single, gradient, apart, strict=True):
            p.grad = g.clone()
            optimizer.step()
    assert torch.allclose(stacked.detach(), torch.stack([p.detach() for p in single]), atol=1e-3)
    assert not torch.allclose(stacked.detach(), experts, atol=0.02)


def test_matrices_of_different_shapes_are_updated_in_one_step():
    params = [random(4, 6, seed=1).requires_grad_(), random(6, 4, seed=2).requires_grad_()]
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = random(*p.shape, seed=3)
    Muon(params, lr=0.1).step()
    assert all(not torch.equal(p.detach(), b) for p, b in zip(params, before, strict=True))


def test_momentum_carries_on_when_the_gradient_turns():
    """Momentum 0.95 keeps 0.95 of what it had: one small step back does not turn it."""
    p = torch.zeros(4, 4).requires_grad_()
    optimizer = Muon([p], lr=0.1, weight_decay=0.0)
    gradient = torch.eye(4)
    for _ in range(20):
        p.grad = gradient.clone()
        optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].diagonal().mean() == pytest.approx(1 - 0.95**20, abs=1e-5)
    before = p.detach().clone()
    p.grad = -0.1 * gradient
    optimizer.step()
    assert float((p.detach() - before).diagonal().sum()) < 0


def test_weight_decay_shrinks_by_the_rate():
    p = torch.full((4, 4), 10.0).requires_grad_()
    p.grad = torch.zeros(4, 4)
    Muon([p], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(p.detach(), torch.full((4, 4), 9.5))


def test_vectors_are_refused():
    p = torch.zeros(4).requires_grad_()
    p.grad = torch.ones(4)
    with pytest.raises(ValueError, match="give it to AdamW"):
        Muon([p], lr=0.1).step()


def test_the_iteration_runs_in_the_type_of_the_model():
    for dtype in (torch.float32, torch.bfloat16):
        model = small_model(dtype=dtype)
        muon = build_optimizers(model, kind="muon", lr=0.1, adamw_lr=0.1, weight_decay=0.0)["muon"]
        with mock.patch("abyssal.optim.muon.orthogonalize", side_effect=orthogonalize) as called:
            for p in muon.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            muon.step()
        assert {call.kwargs["dtype"] for call in called.call_args_list} == {dtype}
