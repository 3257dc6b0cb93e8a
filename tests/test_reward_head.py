"""The reward model: its shapes, where it reads, and that it starts as the policy's body."""

from __future__ import annotations

import torch
from small_models import N_VOCAB, random_prompts, small_model

from abyssal.model.reward_head import RewardModel

KIND = "mla_moe_query_latent"  # with an MTP module, which a reward model has no use for


def reward_model(**changes: object) -> RewardModel:
    model = RewardModel.from_policy(small_model(KIND, **changes), 2, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


def test_two_scores_an_example_in_fp32():
    model = RewardModel.from_policy(small_model(KIND), 2, dtype=torch.bfloat16)
    scores_NK = model(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([1, 3, 7]))
    assert scores_NK.shape == (3, 2) and scores_NK.dtype == torch.float32
    assert (scores_NK == 0).all()  # heads of 0 prefer nothing


def test_it_reads_the_last_token_and_nothing_behind_it():
    model = reward_model()
    (ids,) = random_prompts([6])
    alone = model(torch.tensor([ids]), torch.tensor([5]))
    hidden_D = model.body.hidden(torch.tensor([ids]))[0, -1]
    assert torch.allclose(alone[0], model.score.weight @ hidden_D)
    followed = model(torch.tensor([ids + [9, 9]]), torch.tensor([5]))
    assert torch.allclose(alone, followed, atol=1e-5)
    other = model(torch.tensor([[*ids[:-1], (ids[-1] + 1) % N_VOCAB]]), torch.tensor([5]))
    assert not torch.allclose(alone, other, atol=1e-3)


def test_the_body_is_the_policys_and_nothing_is_left_that_predicts_tokens():
    policy = small_model(KIND)
    model = RewardModel.from_policy(policy, 2, dtype=torch.float32)
    theirs, ours = policy.state_dict(), model.body.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert {name for name in theirs if name not in ours} == {
        name for name in theirs if name.startswith("mtp.") or name == "lm_head.weight"
    }
    with torch.no_grad():
        model.body.embed_tokens.weight.zero_()
    assert policy.embed_tokens.weight.abs().sum() > 0  # a copy: training it leaves the policy alone


def test_every_weight_learns():
    model = reward_model()
    model(torch.tensor(random_prompts([40], seed=2)), torch.tensor([39])).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == set()
