"""Balance of experts: the sequence-wise loss is 1 for an even router, and MaxVio counts how far the fullest is over."""

from __future__ import annotations

import pytest
import torch

from abyssal.loss.balance import expert_load, max_violation, sequence_balance_loss


def test_an_even_router_scores_one():
    # four tokens, two experts, each chosen by two tokens: f = (1, 1), and P sums to 1
    scores_NE = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.1, 0.9]])
    assert float(sequence_balance_loss(scores_NE, batch=1, experts_per_tok=1)) == pytest.approx(1.0)


def test_an_uneven_router_by_hand():
    # all three tokens choose expert 0 of 2: f = (2 * 3 / 3, 0) = (2, 0); P_0 is the mean of .8 / 1, .6 / 1.2, .9 / 1.5
    scores_NE = torch.tensor([[0.8, 0.2], [0.6, 0.6 - 1e-7], [0.9, 0.6]])
    want = 2 * (0.8 + 0.5 + 0.6) / 3
    assert float(sequence_balance_loss(scores_NE, batch=1, experts_per_tok=1)) == pytest.approx(want, abs=1e-5)


def test_two_experts_a_token_by_hand():
    # tokens choose {0, 1}, {0, 2}: hits (2, 1, 1, 0), times E / (K T) = 4 / 4 = 1; P = mean of normalised scores
    scores_NE = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.4, 0.1, 0.3, 0.2]])
    want = 2 * 0.4 + 1 * 0.2 + 1 * 0.25 + 0 * 0.15
    assert float(sequence_balance_loss(scores_NE, batch=1, experts_per_tok=2)) == pytest.approx(want)


def test_each_sequence_is_judged_alone():
    """Two sequences that each use one expert are uneven, though together they are even."""
    one = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    scores_NE = torch.cat([one, one.flip(-1)])
    assert float(sequence_balance_loss(scores_NE, batch=2, experts_per_tok=1)) == pytest.approx(2 * 0.9)
    assert float(sequence_balance_loss(scores_NE, batch=1, experts_per_tok=1)) == pytest.approx(1.0)


def test_the_gradient_lowers_the_affinity_of_the_expert_that_has_too_many():
    scores_NE = torch.tensor([[0.8, 0.2], [0.7, 0.3]], requires_grad=True)
    sequence_balance_loss(scores_NE, batch=1, experts_per_tok=1).backward()
    assert scores_NE.grad is not None
    assert (scores_NE.grad[:, 0] > 0).all() and (scores_NE.grad[:, 1] < 0).all()


def test_loads_count_assignments_and_leave_padding_out():
    experts_NK = torch.tensor([[0, 1], [0, 2], [3, 3]])
    assert expert_load(experts_NK, n_experts=5).tolist() == [2, 1, 1, 2, 0]
    counted_N = torch.tensor([True, True, False])
    assert expert_load(experts_NK, n_experts=5, counted_N=counted_N).tolist() == [2, 1, 1, 0, 0]


def test_max_violation_by_hand():
    assert max_violation(torch.tensor([5, 5, 5, 5])) == 0.0
    assert max_violation(torch.tensor([10, 5, 5, 0])) == pytest.approx(1.0)  # the fullest has twice its share
    assert max_violation(torch.tensor([20, 0, 0, 0])) == pytest.approx(3.0)
