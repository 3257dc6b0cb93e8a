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


def test_with_every_option_off_the_loss_is_the_plain_formula_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    logp_N, old_logp_N, ref_logp_N = (-torch.rand(50, generator=generator) * 4 for _ in range(3))
    advantages_N, answer_N = torch.randn(50, generator=generator), torch.arange(50) // 10
    found = grpo_loss(
        logp_N, old_logp_N=old_logp_N, ref_logp_N=ref_logp_N, advantages_N=advantages_N, answer_N=answer_N,
        n_answers=5, n_all_answers=5, n_tokens=50, clip_low=0.2, clip_high=0.3, kl_weight=0.1, mean="answer",
    )  # fmt: skip
    ratio_N = (logp_N - old_logp_N).exp()
    objective_N = torch.minimum(ratio_N * advantages_N, ratio_N.clamp(0.8, 1.3) * advantages_N)
    log_ratio_N = ref_logp_N - logp_N
    token_loss_N = 0.1 * (log_ratio_N.exp() - log_ratio_N - 1) - objective_N
    assert torch.equal(found.loss, (token_loss_N / torch.full((50,), 10)).sum() / 5)
    assert (float(found.importance_cut_share), int(found.n_off_policy)) == (0.0, 0)


def test_importance_weights_by_hand():
    """The trainer had 0.1 before the step. Drawn at 0.2: half of it counts. Drawn at 0.05: twice, cut at 1.5."""
    found = loss_of(
        [1.1, 1.1, 0.5], [1.0, 1.0, -1.0], [0, 0, 1],
        drawn_logp_N=torch.tensor([0.2, 0.05, 0.1]).log(), importance_cap=1.5,
    )  # fmt: skip
    # the clip is of the ratio to the trainer's own old policy, before it is weighed
    assert float(found.loss) == pytest.approx(-((0.5 * 1.1 + 1.5 * 1.1) / 2 - 0.8) / 2, abs=1e-5)
    assert float(found.importance_cut_share) == pytest.approx(1 / 3)
    assert float(found.clip_share) == pytest.approx(1 / 3)


def test_an_importance_weight_scales_the_gradient_and_has_none():
    logp_N = torch.tensor([math.log(0.11)], requires_grad=True)
    grpo_loss(
        logp_N, old_logp_N=logp_N.detach(), drawn_logp_N=torch.tensor([math.log(0.1)]), importance_cap=2.0,
        advantages_N=torch.tensor([3.0]), answer_N=torch.tensor([0]), n_answers=1, n_all_answers=1, n_tokens=1, **PLAIN,
    ).loss.backward()  # fmt: skip
    assert logp_N.grad is not None
    assert float(logp_N.grad) == pytest.approx(-1.1 * 3.0, rel=1e-5)


def test_the_kl_times_the_ratio_is_to_what_drew_the_token():
    # drawn at 0.05, the trainer had and has 0.1, the reference 0.2
    found = loss_of(
        [1.0], [0.0], [0], ref_logp_N=torch.tensor([0.2]).log(), kl_weight=0.5,
        drawn_logp_N=torch.tensor([0.05]).log(), unbiased=True,
    )  # fmt: skip
    assert float(found.kl) == pytest.approx(2 * (1 - math.log(2)), abs=1e-6)
    assert float(found.loss) == pytest.approx(1 - math.log(2), abs=1e-6)


def test_wrong_answers_that_the_policy_has_left_are_masked():
    """Answer 0 fell by log 4 and log 1, 0.69 a token on average; answer 1 fell less; answer 2 fell, but is right."""
    ratios, advantages, answers = [0.25, 1.0, 0.7, 0.25], [-1.0, -1.0, -1.0, 1.0], [0, 0, 1, 2]
    whole = loss_of(ratios, advantages, answers, clip_low=0.9, off_policy_mask=0.7)
    assert float(whole.loss) == pytest.approx(-((-0.25 - 1.0) / 2 - 0.7 + 0.25) / 3, abs=1e-5)
    assert int(whole.n_off_policy) == 0
    masked = loss_of(ratios, advantages, answers, clip_low=0.9, off_policy_mask=0.6)
    assert float(masked.loss) == pytest.approx(-(0.0 - 0.7 + 0.25) / 3, abs=1e-5)  # still a mean of three
    assert int(masked.n_off_policy) == 1


def test_a_masked_answer_keeps_its_kl_and_loses_its_gradient_from_the_reward():
    logp_N = torch.tensor([math.log(0.01), math.log(0.01)], requires_grad=True)
    options: dict[str, Any] = PLAIN | {"off_policy_mask": 0.5, "ref_logp_N": torch.tensor([0.02, 0.02]).log()}
    grpo_loss(
        logp_N, old_logp_N=torch.tensor([0.1, 0.1]).log(), advantages_N=torch.tensor([-1.0, 1.0]),
        answer_N=torch.tensor([0, 1]), n_answers=2, n_all_answers=2, n_tokens=2, **(options | {"kl_weight": 1.0}),
    ).loss.backward()  # fmt: skip
    assert logp_N.grad is not None
    # d k3 / d logp = 1 - ref/pi = -1, halved by the mean; the right answer adds minus its ratio of 0.1, halved
    assert logp_N.grad.tolist() == pytest.approx([-0.5, -0.5 - 0.05], abs=1e-5)


def test_engines_and_trainers_old_policy_count_together_in_what_is_off_policy():
    """The trainer's own ratio is 1; the distance is to the engine."""
    far = {"drawn_logp_N": torch.tensor([0.4]).log(), "importance_cap": 2.0, "off_policy_mask": 1.0}
    assert int(loss_of([1.0], [-1.0], [0], **far).n_off_policy) == 1  # log 4 is above 1
