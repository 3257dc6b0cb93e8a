"""One GRPO update: where each value lands in the rows, and what moves, what does not, and in which direction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import N_VOCAB, small_model
from torch import Tensor

from abyssal.loss.cross_entropy import token_logprobs
from abyssal.model.transformer import Transformer
from abyssal.stages.policy_update import AnswerBatch, GrpoConfig, answer_batch, update_policy
from abyssal.stages.state import TrainState, build_optimizers
from abyssal.types import Completion, Message, Problem, Rollout

KIND = "mla_moe_query_latent"  # with an MTP module
CPU = torch.device("cpu")
PLAIN = GrpoConfig(kl_weight=0.0, mtp_weight=0.0)


def rollout(prompt: list[int], ids: list[int], logps: list[float] | None = None) -> Rollout:
    completion = Completion(
        prompt_ids=prompt, ids=ids, logps=[-1.0] * len(ids) if logps is None else logps, finish_reason="stop"
    )
    return Rollout(
        problem=Problem(prompt="", answer=""), completion=completion, message=Message(role="assistant", content="")
    )


def answer_logps(model: Transformer, r: Rollout) -> Tensor:
    """The log-probs of an answer's tokens, alone in a row."""
    ids_BT = torch.tensor([r.completion.prompt_ids + r.completion.ids])
    logits_TV = model.logits(model.hidden(ids_BT))[0].detach()
    first = len(r.completion.prompt_ids) - 1
    return token_logprobs(logits_TV[first:-1], ids_BT[0, first + 1 :])


def as_drawn(model: Transformer, r: Rollout) -> Rollout:
    """The rollout with the log-probs that this model gives it."""
    return replace(r, completion=replace(r.completion, logps=answer_logps(model, r).tolist()))


def some_rollouts(model: Transformer) -> list[Rollout]:
    generator = torch.Generator().manual_seed(3)
    lengths = [(3, 5), (4, 2), (6, 7), (3, 1)]
    return [
        as_drawn(model, rollout(*(torch.randint(0, N_VOCAB, (n,), generator=generator).tolist() for n in pair)))
        for pair in lengths
    ]


def update(model: Transformer, answers: AnswerBatch, config: GrpoConfig, **changes: Any) -> dict[str, float]:
    lr = changes.pop("lr", 1e-3)
    optimizers = build_optimizers(model, kind="adamw", lr=0.0, adamw_lr=lr, weight_decay=0.0)
    options: dict[str, Any] = {
        "reference": None, "lr_fraction": 1.0, "rows_per_pass": 8, "shuffle": torch.Generator().manual_seed(0),
    }  # fmt: skip
    return update_policy(TrainState(model, optimizers), answers, config=config, **(options | changes))


def packed(rollouts: list[Rollout], advantages: list[float], row_len: int = 24) -> AnswerBatch:
    return answer_batch(rollouts, advantages, row_len=row_len, pad_id=0, device=CPU)


def test_every_value_stands_at_its_token():
    rollouts = [rollout([1, 2, 3], [4, 5], [-0.4, -0.5]), rollout([6, 7], [8], [-0.8])]
    answers = packed(rollouts, [2.0, -3.0], row_len=10)
    assert answers.batch.ids_BT.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 0, 0]]
    assert answers.batch.mask_BT[0].nonzero()[:, 0].tolist() == [3, 4, 7]
    assert answers.batch.segments_BT is not None
    assert answers.batch.segments_BT.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2, 0, 0]]
    assert answers.old_logp_BT[0].tolist() == pytest.approx([0, 0, 0, -0.4, -0.5, 0, 0, -0.8, 0, 0])
    assert answers.advantage_BT[0].tolist() == [0, 0, 0, 2, 2, 0, 0, -3, 0, 0]
    assert answers.answer_BT[0].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]
    assert answers.n_answers == 2


def test_many_answers_keep_their_own_values_however_they_are_packed():
    generator = torch.Generator().manual_seed(0)
    rollouts = []
    for _ in range(30):
        n_prompt, n_answer = torch.randint(1, 6, (2,), generator=generator).tolist()
        rollouts.append(
            rollout([1] * n_prompt, torch.randint(2, N_VOCAB, (n_answer,), generator=generator).tolist(),
                    (-torch.rand(n_answer, generator=generator)).tolist())
        )  # fmt: skip
    answers = packed(rollouts, [float(i + 1) for i in range(30)], row_len=16)
    for i, r in enumerate(rollouts):
        here = answers.batch.mask_BT & (answers.advantage_BT == i + 1)
        assert answers.batch.ids_BT[here].tolist() == r.completion.ids
        assert answers.old_logp_BT[here].tolist() == pytest.approx(r.completion.logps)
        assert (answers.answer_BT[here] == i).all()
    assert int(answers.batch.mask_BT.sum()) == sum(len(r.completion.ids) for r in rollouts)


def test_an_answer_longer_than_a_row_makes_the_rows_longer():
    """Half-way through a run is too late to learn that one answer did not fit."""
    answers = packed([rollout([1] * 5, [2] * 9), rollout([1], [2])], [1.0, -1.0], row_len=8)
    assert answers.batch.ids_BT.shape == (2, 14) and int(answers.batch.mask_BT.sum()) == 10


def test_packing_changes_no_log_probability():
    """On the model that drew them the ratio is 1: nothing is clipped, and the distance to itself is 0."""
    model = small_model(KIND)
    answers = packed(some_rollouts(model), [1.0, -1.0, 0.5, 0.2])
    metrics = update(model, answers, replace(PLAIN, kl_weight=0.1), reference=small_model(KIND))
    assert metrics["clip_share"] == 0.0
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["loss"] == pytest.approx(-(1.0 - 1.0 + 0.5 + 0.2) / 4, abs=1e-5)


def test_without_advantages_only_the_mtp_module_moves():
    model = small_model(KIND)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    metrics = update(model, packed(some_rollouts(model), [0.0] * 4), replace(PLAIN, mtp_weight=0.1))
    assert metrics["mtp_loss"] > 0
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("mtp.") for name in moved)


def test_refitting_the_mtp_module_leaves_the_policys_step_as_it_is():
    models = [small_model(KIND), small_model(KIND)]
    for model, mtp_weight in zip(models, (0.0, 50.0), strict=True):
        config = replace(PLAIN, mtp_weight=mtp_weight, clip_gradient=1e-2)  # a clip that both would share
        update(model, packed(some_rollouts(model), [1.0, -1.0, 0.5, 0.2]), config)
    alone, beside = (dict(model.named_parameters()) for model in models)
    for name, p in alone.items():
        assert torch.equal(p, beside[name]) == (not name.startswith("mtp.")), name


def test_a_rewarded_answer_becomes_likelier_and_a_punished_one_less_likely():
    model = small_model(KIND)
    rollouts = some_rollouts(model)
    before = [float(answer_logps(model, r).sum()) for r in rollouts]
    update(model, packed(rollouts, [1.0, -1.0, 1.0, -1.0]), PLAIN, lr=1e-4)
    change = [float(answer_logps(model, r).sum()) - b for r, b in zip(rollouts, before, strict=True)]
    assert change[0] > 0 > change[1] and change[2] > 0 > change[3], change


def test_the_reference_holds_the_policy_back():
    """Advantages of zero: what is left is the pull towards the reference."""
    model, reference = small_model(KIND), small_model(KIND, seed=1)
    answers = packed(some_rollouts(model), [0.0] * 4)
    kls = [update(model, answers, replace(PLAIN, kl_weight=1.0), reference=reference)["kl"] for _ in range(4)]
    assert kls[0] > kls[1] > kls[2] > kls[3] > 0
    assert all(p.grad is None for p in reference.parameters())


@pytest.mark.parametrize("mean", ["answer", "token"])
def test_rows_in_one_pass_or_one_by_one_give_the_same_step(mean: Any):
    found, weights = [], []
    for rows_per_pass in (8, 1):
        model = small_model(KIND)
        answers = packed(some_rollouts(model), [1.0, -1.0, 0.5, 0.2], row_len=13)
        assert len(answers.batch.ids_BT) == 3
        config = replace(PLAIN, kl_weight=0.1, mean=mean, mtp_weight=0.1)
        found.append(
            update(model, answers, config, reference=small_model(KIND, seed=1), rows_per_pass=rows_per_pass, lr=1e-5)
        )
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for name in ("loss", "kl", "entropy", "clip_share", "grad_norm"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4, abs=1e-6), name
    # Adam's first step is a sign: where a gradient is nearly 0, rounding may turn it
    assert ((weights[0] - weights[1]).abs() > 1e-6).float().mean() < 0.01


def test_balance_of_experts_is_told_for_a_mixture_and_not_for_a_dense_model():
    answers = packed(some_rollouts(small_model(KIND)), [1.0, -1.0, 0.5, 0.2])
    assert update(small_model(KIND), answers, PLAIN)["max_violation"] > 0
    assert "max_violation" not in update(small_model("gqa_dense"), answers, PLAIN)


def test_minibatches_take_one_step_each():
    model = small_model(KIND)
    answers = packed(some_rollouts(model), [1.0, -1.0, 0.5, 0.2], row_len=13)
    optimizers = build_optimizers(model, kind="adamw", lr=0.0, adamw_lr=1e-3, weight_decay=0.0)
    update_policy(
        TrainState(model, optimizers), answers, reference=None, config=replace(PLAIN, minibatches=3),
        lr_fraction=1.0, rows_per_pass=8, shuffle=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert int(optimizers["adamw"].state[model.embed_tokens.weight]["step"]) == 3
