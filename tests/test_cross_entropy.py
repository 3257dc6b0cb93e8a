"""Cross-entropy of the next token: numbers a reader can check, and which places are learned at all."""

from __future__ import annotations

import math

import pytest
import torch

from abyssal.loss.cross_entropy import cross_entropy, entropy, next_token_targets, token_logprobs

NONE = -100


def rows(*values: list[int]) -> torch.Tensor:
    return torch.tensor(values)


def test_the_target_of_a_place_is_the_token_after_it():
    ids_BT = rows([5, 6, 7, 8])
    every = torch.ones_like(ids_BT)
    assert next_token_targets(ids_BT, every, None).tolist() == [[6, 7, 8, NONE]]
    assert next_token_targets(ids_BT, every, None, ahead=2).tolist() == [[7, 8, NONE, NONE]]
    assert next_token_targets(ids_BT, every, None, ahead=3).tolist() == [[8, NONE, NONE, NONE]]


def test_the_mask_speaks_of_the_token_that_is_predicted_not_of_the_place_that_predicts():
    ids_BT, mask_BT = rows([5, 6, 7, 8]), rows([0, 0, 1, 1])
    assert next_token_targets(ids_BT, mask_BT, None).tolist() == [[NONE, 7, 8, NONE]]
    assert next_token_targets(ids_BT, mask_BT, None, ahead=2).tolist() == [[7, 8, NONE, NONE]]


def test_no_example_predicts_the_beginning_of_the_next():
    ids_BT, every, segments_BT = rows([5, 6, 7, 8, 9]), rows([1] * 5), rows([1, 1, 1, 2, 2])
    assert next_token_targets(ids_BT, every, segments_BT).tolist() == [[6, 7, NONE, 9, NONE]]
    assert next_token_targets(ids_BT, every, segments_BT, ahead=2).tolist() == [[7, NONE, NONE, NONE, NONE]]


def test_the_mean_is_over_the_targets_that_count():
    logits_NV = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [9.0, -9.0]])
    # p = 1/2 and p = 1/4; the third row has nothing to learn
    loss = cross_entropy(logits_NV, torch.tensor([0, 1, NONE]))
    assert float(loss) == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_a_batch_with_nothing_to_learn_is_an_error_and_not_a_nan():
    with pytest.raises(ValueError, match="no token to learn"):
        cross_entropy(torch.zeros(2, 3), torch.tensor([NONE, NONE]))


def test_bfloat16_logits_are_computed_in_float32():
    logits_NV = torch.randn(7, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets_N = torch.arange(7)
    assert torch.equal(cross_entropy(logits_NV, targets_N), cross_entropy(logits_NV.float(), targets_N))
    assert token_logprobs(logits_NV, targets_N).dtype == torch.float32


def test_log_probability_and_entropy_by_hand():
    logits_NV = torch.tensor([[math.log(3), 0.0], [0.0, 0.0], [50.0, 0.0]])
    assert token_logprobs(logits_NV, torch.tensor([0, 1, 0])).tolist() == pytest.approx(
        [math.log(3 / 4), math.log(1 / 2), 0.0], abs=1e-6
    )
    quarter = -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4))
    assert entropy(logits_NV).tolist() == pytest.approx([quarter, math.log(2), 0.0], abs=1e-6)


def test_the_gradient_is_probability_minus_one_at_the_target():
    logits_NV = torch.tensor([[math.log(3), 0.0]], requires_grad=True)
    cross_entropy(logits_NV, torch.tensor([1])).backward()
    assert logits_NV.grad is not None
    assert logits_NV.grad[0].tolist() == pytest.approx([3 / 4, 1 / 4 - 1])
