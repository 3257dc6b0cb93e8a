"""The preference loss on numbers that a pocket calculator confirms."""

from __future__ import annotations

import math

import pytest
import torch

from abyssal.loss.bradley_terry import bradley_terry


def test_equal_scores_cost_log_two():
    assert float(bradley_terry(torch.tensor([3.0, -1.0]), torch.tensor([3.0, -1.0]))) == pytest.approx(math.log(2))


def test_the_mean_over_pairs_by_hand():
    # sigmoid(log 3) = 3/4 and sigmoid(-log 3) = 1/4
    gap = math.log(3)
    loss = bradley_terry(torch.tensor([gap, 0.0]), torch.tensor([0.0, gap]))
    assert float(loss) == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)


def test_a_shift_of_all_scores_changes_nothing_and_a_huge_gap_is_finite():
    chosen, rejected = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    assert torch.allclose(bradley_terry(chosen + 7, rejected + 7), bradley_terry(chosen, rejected))
    assert float(bradley_terry(torch.tensor([-500.0]), torch.tensor([500.0]))) == 1000.0


def test_the_gradient_pulls_by_how_wrong_the_order_is():
    chosen, rejected = torch.tensor([0.0], requires_grad=True), torch.tensor([math.log(3)], requires_grad=True)
    bradley_terry(chosen, rejected).backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert float(chosen.grad) == pytest.approx(-0.75) and float(rejected.grad) == pytest.approx(0.75)


def test_no_pairs_is_an_error():
    with pytest.raises(ValueError, match="no pairs"):
        bradley_terry(torch.empty(0), torch.empty(0))
