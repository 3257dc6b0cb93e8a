"""GRPO by hand: advantages within a group, the clip, and the two ways to take the mean."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from abyssal.loss.grpo import GrpoLoss, group_advantages, grpo_loss

PLAIN: dict[str, Any] = {
    "ref_logp_N": None, "clip_low": 0.2, "clip_high": 0.2, "kl_weight": 0.0, "mean": "answer",
}  # fmt: skip


def loss_of(ratios: list[float], advantages: list[float], answers: list[int], **changes: Any) -> GrpoLoss:
    """The loss of tokens whose probability has changed by `ratios` since they were drawn with probability 0.1."""
    old_logp_N = torch.full((len(ratios),), math.log(0.1))
    n_answers = len(set(answers))
    options = PLAIN | {"n_answers": n_answers, "n_all_answers": n_answers, "n_tokens": len(ratios)} | changes
    return grpo_loss(
        old_logp_N + torch.tensor(ratios).log(),
        old_logp_N=old_logp_N,
        advantages_N=torch.tensor(advantages),
        answer_N=torch.tensor(answers),
        **options,
    )


def test_one_right_one_wrong_gives_plus_and_minus_one():
    rewards_PG = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    want = torch.tensor([[1.0, -1.0], [0.0, 0.0], [0.0, 0.0]])
    assert torch.allclose(group_advantages(rewards_PG), want, atol=1e-4)


def test_one_right_of_four_stands_out_more_than_three_of_four():
    # mean 1/4, spread sqrt(3)/4: the right one gets 3/sqrt(3)
    one, three = group_advantages(torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 1, 0]]))
    assert one.tolist() == pytest.approx([math.sqrt(3)] + [-1 / math.sqrt(3)] * 3, abs=1e-4)
    assert three.tolist() == pytest.approx([1 / math.sqrt(3)] * 3 + [-math.sqrt(3)], abs=1e-4)


def test_without_the_deviation_only_the_mean_is_taken_away():
    advantages_PG = group_advantages(torch.tensor([[1.0, 0, 0, 0]]), divide_by_std=False)
    assert advantages_PG[0].tolist() == [0.75, -0.25, -0.25, -0.25]


def test_undecided_answers_get_nothing_and_shift_nobody():
    rewards_PG = torch.tensor([[1.0, 0.0, float("nan")], [float("nan")] * 3])
    advantages_PG = group_advantages(rewards_PG, valid_PG=~rewards_PG.isnan())
    assert advantages_PG[0].tolist() == pytest.approx([1.0, -1.0, 0.0], abs=1e-4)
    assert advantages_PG[1].tolist() == [0.0, 0.0, 0.0]


def test_at_the_first_step_the_loss_is_minus_the_mean_advantage():
    assert float(loss_of([1.0, 1.0], [1.0, -1.0], [0, 1]).loss) == pytest.approx(0.0, abs=1e-6)
    assert float(loss_of([1.0, 1.0, 1.0], [2.0, 2.0, -1.0], [0, 0, 1]).loss) == pytest.approx(-(2 - 1) / 2)


def test_the_clip_by_hand():
    # A right token that has become 1.5 times as likely counts as 1.2, one that fell to half counts as it is;
    # a wrong token that fell to half counts as 0.8, one that rose counts as it is.
    for ratio, advantage, objective, clipped in (
        (1.5, 1.0, 1.2, 1.0),
        (0.5, 1.0, 0.5, 0.0),
        (0.5, -1.0, -0.8, 1.0),
        (1.5, -1.0, -1.5, 0.0),
    ):
        found = loss_of([ratio], [advantage], [0])
        assert float(found.loss) == pytest.approx(-objective, abs=1e-5), (ratio, advantage)
        assert float(found.clip_share) == clipped, (ratio, advantage)


def test_the_upper_clip_can_be_raised_alone():
    found = loss_of([1.5, 0.5], [1.0, -1.0], [0, 1], clip_high=0.6)
    assert float(found.loss) == pytest.approx(-(1.5 - 0.8) / 2, abs=1e-5)
    assert float(found.clip_share) == 0.5


def test_a_clipped_token_has_no_gradient():
    for ratio, advantage, learns in ((1.5, 1.0, False), (0.5, 1.0, True), (0.5, -1.0, False), (1.5, -1.0, True)):
        logp_N = torch.tensor([math.log(0.1 * ratio)], requires_grad=True)
        grpo_loss(
            logp_N, old_logp_N=torch.tensor([math.log(0.1)]), advantages_N=torch.tensor([advantage]),
            answer_N=torch.tensor([0]), n_answers=1, n_all_answers=1, n_tokens=1, **PLAIN,
        ).loss.backward()  # fmt: skip
        assert logp_N.grad is not None
        # d ratio / d logp is the ratio itself
        assert float(logp_N.grad) == pytest.approx(-ratio * advantage if learns else 0.0, abs=1e-5)


def test_mean_over_answers_weighs_answers_alike_and_mean_over_tokens_weighs_tokens_alike():
    # a right answer of one token, a wrong one of three
    advantages, answers = [1.0, -1.0, -1.0, -1.0], [0, 1, 1, 1]
    assert float(loss_of([1.0] * 4, advantages, answers).loss) == pytest.approx(0.0, abs=1e-6)
    assert float(loss_of([1.0] * 4, advantages, answers, mean="token").loss) == pytest.approx(-(1 - 3) / 4)


@pytest.mark.parametrize("mean", ["answer", "token"])
def test_losses_of_parts_add_up_to_the_whole(mean: str):
    ratios, advantages, answers = [1.1, 0.9, 1.4, 0.7, 1.0], [1.0, 1.0, -1.0, -1.0, 0.5], [0, 0, 1, 1, 2]
    options: dict[str, Any] = {"mean": mean, "n_answers": 3, "n_all_answers": 3, "n_tokens": 5}
    whole = loss_of(ratios, advantages, answers, **options)
    first = loss_of(ratios[:2], advantages[:2], answers[:2], **options)
    second = loss_of(ratios[2:], advantages[2:], answers[2:], **options)
    assert float(first.loss + second.loss) == pytest.approx(float(whole.loss), abs=1e-6)


def test_the_kl_enters_with_its_weight():
    old_logp_N = torch.tensor([math.log(0.1)])
    found = loss_of([1.0], [0.0], [0], ref_logp_N=old_logp_N + math.log(2), kl_weight=0.5)
    assert float(found.kl) == pytest.approx(2 - math.log(2) - 1, abs=1e-6)
    assert float(found.loss) == pytest.approx(0.5 * (1 - math.log(2)), abs=1e-6)


def test_without_a_reference_there_is_no_kl():
    assert float(loss_of([1.3], [1.0], [0], kl_weight=0.5).kl) == 0.0
