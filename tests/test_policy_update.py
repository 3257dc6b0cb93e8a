"""One GRPO update: where each value lands in the rows, and what moves, what does not, and in which direction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import N_VOCAB, random_prompts, small_model
from torch import Tensor

from abyssal.engine import Engine
from abyssal.loss.cross_entropy import token_logprobs
from abyssal.model.transformer import Transformer
from abyssal.stages.policy_update import AnswerBatch, GrpoConfig, answer_batch, update_policy
from abyssal.stages.sampled_policy import Kept, sampled_logits
from abyssal.stages.state import TrainState, build_optimizers
from abyssal.types import Completion, DrawnFrom, Message, Problem, Rollout, SamplingParams

KIND = "mla_moe_query_latent"  # with an MTP module
CPU = torch.device("cpu")
PLAIN = GrpoConfig(kl_weight=0.0, mtp_weight=0.0, router_replay=False)  # answers made by hand carry no experts


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
    assert answers.drawn_logp_BT[0].tolist() == pytest.approx([0, 0, 0, -0.4, -0.5, 0, 0, -0.8, 0, 0])
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
        assert answers.drawn_logp_BT[here].tolist() == pytest.approx(r.completion.logps)
        assert (answers.answer_BT[here] == i).all()
    assert int(answers.batch.mask_BT.sum()) == sum(len(r.completion.ids) for r in rollouts)


def test_a_part_of_the_rows_is_as_wide_as_its_longest_needs():
    """Answers of 20, 12 and 5 tokens, prompts included: the second and third share a row, or stand alone."""
    rollouts = [rollout([1] * 10, [2] * 10), rollout([3] * 4, [4] * 8, [-0.5] * 8), rollout([5, 6], [7, 8, 9])]
    answers = packed(rollouts, [1.0, 2.0, 3.0], row_len=0)
    assert answers.batch.ids_BT.shape == (2, 24)  # the longest, in eights
    assert answers.lengths_B.tolist() == [20, 17]
    alone = packed(rollouts[1:], [2.0, 3.0], row_len=14)
    assert alone.rows(torch.tensor([1, 0])).batch.ids_BT.shape == (2, 14)  # never wider than they were
    short = alone.rows(torch.tensor([1]))
    assert short.batch.ids_BT.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0]]
    for tensor in (short.batch.mask_BT, short.batch.segments_BT, short.drawn_logp_BT, short.advantage_BT):
        assert tensor is not None and tensor.shape == (1, 8)
    assert short.advantage_BT[0].tolist() == [0, 0, 3, 3, 3, 0, 0, 0]


def test_an_answer_longer_than_a_row_makes_the_rows_longer():
    """Half-way through a run is too late to learn that one answer did not fit."""
    answers = packed([rollout([1] * 5, [2] * 9), rollout([1], [2, 3])], [1.0, -1.0], row_len=8)
    assert answers.batch.ids_BT.shape == (2, 16) and int(answers.batch.mask_BT.sum()) == 11


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


# What the engine recorded: experts, and the distribution it drew from


NARROW = GrpoConfig(kl_weight=0.0, mtp_weight=0.0, clip_low=1e-4, clip_high=1e-4)  # clips whatever is not exactly 1


def drawn(model: Transformer, n: int = 8, *, vocab_size: int | None = None, **sampling: Any) -> list[Rollout]:
    """Answers of different lengths from the engine, with all that it can tell about them."""
    engine = Engine(model, eos_ids=[], record_sampling=True, vocab_size=vocab_size)
    each = [SamplingParams(max_tokens=3 + i, seed=i, **sampling) for i in range(n)]
    completions = engine.generate((random_prompts([5, 2, 7]) * n)[:n], each)
    return [replace(rollout([1], [1]), completion=completion) for completion in completions]


ADVANTAGES = [1.0, -1.0, 0.5, 0.2, -0.3, 0.7, -2.0, 1.1]


def test_experts_stand_at_the_tokens_that_were_computed():
    """Two layers, two experts each. The last drawn token was never computed, and padding never existed."""
    experts = [torch.arange(n, dtype=torch.uint8).view(-1, 2, 2) for n in (16, 8)]
    experts[1] += 100
    rollouts = [rollout([1, 2, 3], [4, 5]), rollout([6, 7], [8])]
    rollouts = [replace(r, completion=replace(r.completion, experts=e)) for r, e in zip(rollouts, experts, strict=True)]
    found_BTMK = packed(rollouts, [1.0, -1.0], row_len=10).experts_BTMK
    assert found_BTMK is not None and found_BTMK.shape == (1, 10, 2, 2)
    assert found_BTMK[0, :, 0, 0].tolist() == [0, 4, 8, 12, -1, 100, 104, -1, -1, -1]
    assert found_BTMK[0, 1].tolist() == [[4, 5], [6, 7]]
    with pytest.raises(ValueError, match="1 of 2 answers carry no experts"):
        packed([rollouts[0], rollout([1], [2])], [1.0, -1.0])


def test_replay_needs_experts_and_a_dense_model_has_none():
    answers = packed(some_rollouts(small_model(KIND)), ADVANTAGES[:4])
    with pytest.raises(ValueError, match="record_experts=True"):
        update(small_model(KIND), answers, replace(PLAIN, router_replay=True))
    update(small_model("gqa_dense"), answers, replace(PLAIN, router_replay=True))


def test_replay_changes_nothing_where_both_choose_alike():
    weights = []
    for router_replay in (True, False):
        model = small_model(KIND)
        answers = packed(drawn(model), ADVANTAGES)
        update(model, answers, replace(PLAIN, router_replay=router_replay), rows_per_pass=2)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(weights[0], weights[1], atol=1e-7)


def test_the_trainer_computes_with_the_experts_it_was_given():
    """Experts 0 and 1 everywhere: others get no gradient, their routers' rows neither, and the load shows it."""
    model = small_model("mla_moe")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rollouts = drawn(model)
    for i, r in enumerate(rollouts):
        experts = torch.arange(2, dtype=torch.uint8).expand_as(r.completion.experts)
        rollouts[i] = replace(r, completion=replace(r.completion, experts=experts))
    answers = packed(rollouts, ADVANTAGES)
    assert answers.experts_BTMK is not None and answers.batch.segments_BT is not None
    # what nobody computed chooses freely, and nothing that is learned depends on it
    metrics = update(model, answers, replace(PLAIN, router_replay=True))
    n_last = len(rollouts)
    n_computed = int((answers.batch.segments_BT > 0).sum()) - n_last
    fullest = 4 * n_computed / (n_computed + n_last)  # a quarter of 8 experts takes them all
    assert fullest - 1 <= metrics["max_violation"] < 3.001
    for layer in (1, 2):
        for name in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
            moved_E = (dict(model.named_parameters())[f"layers.{layer}.mlp.{name}"]
                       != before[f"layers.{layer}.mlp.{name}"]).flatten(1).any(1)  # fmt: skip
            assert moved_E.tolist() == [True] * 2 + [False] * 6, name


def test_in_bf16_the_ratio_starts_nearer_to_one_with_replay():
    """What is left is rounding; the share outside of 1 +- 2 % is that of tokens whose experts changed."""
    clipped = {}
    for router_replay in (True, False):
        model = small_model(KIND, dtype=torch.bfloat16)
        config = replace(PLAIN, router_replay=router_replay, clip_low=0.04, clip_high=0.04)
        answers = packed(drawn(model, 40), ADVANTAGES * 5, row_len=64)
        clipped[router_replay] = update(model, answers, config)["clip_share"]
    assert clipped[True] < 0.5 * clipped[False], clipped


@pytest.mark.parametrize("sampling", [{"temperature": 0.7}, {"top_k": 5}, {"temperature": 1.4, "top_p": 0.8}],
                         ids=["tempered", "cut", "both"])  # fmt: skip
def test_the_ratio_is_of_the_policy_that_was_drawn_from(sampling: dict[str, Any]):
    """It starts at 1, KL to itself is 0, and the model's own log-probs would have been off."""
    model = small_model(KIND)
    rollouts = drawn(model, **sampling)
    metrics = update(model, packed(rollouts, ADVANTAGES), replace(NARROW, kl_weight=0.1), reference=small_model(KIND))
    assert metrics["clip_share"] == 0.0
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-7)
    assert metrics["loss"] == pytest.approx(-sum(ADVANTAGES) / 8, abs=1e-5)
    assert 1.0 < metrics["entropy"] < 4.2  # the model's own, of 61 ids at most log 61
    own = [replace(r, completion=replace(r.completion, drawn_from=None)) for r in rollouts]
    drawn_logp_BT = packed(rollouts, ADVANTAGES).drawn_logp_BT
    assert (packed(own, ADVANTAGES).drawn_logp_BT - drawn_logp_BT).abs().max() > 0.1


def test_ids_beyond_the_tokenizers_are_neither_drawn_nor_trained():
    model = small_model(KIND)
    before = model.lm_head.weight.detach().clone()
    rollouts = drawn(model, vocab_size=40)
    assert max(i for r in rollouts for i in r.completion.ids) < 40
    answers = answer_batch(rollouts, ADVANTAGES, row_len=24, pad_id=0, device=CPU, vocab_size=40)
    metrics = update(model, answers, NARROW)
    assert metrics["clip_share"] == 0.0
    assert (model.lm_head.weight != before).any(-1).tolist() == [True] * 40 + [False] * (N_VOCAB - 40)
    whole = update(small_model(KIND), packed(rollouts, ADVANTAGES), NARROW)
    assert whole["clip_share"] > 0.3  # a policy over all 61 ids is another one


def test_kept_ids_stand_at_their_tokens():
    """Answers of two tokens and of one."""
    kept = Kept(torch.tensor([3, 5, 4, 0, 1, 2]), start_BT=torch.tensor([[0, 2, 0], [0, 0, 3]]),
                count_BT=torch.tensor([[2, 1, 0], [0, 0, 3]]))  # fmt: skip
    mask_NV = kept.mask(torch.tensor([[True, True, False], [False, False, True]]), 6)
    assert [row.nonzero()[:, 0].tolist() for row in mask_NV] == [[3, 5], [4], [0, 1, 2]]


def test_what_was_cut_gets_no_probability_and_no_gradient():
    logits_NV = torch.tensor([[0.8, 0.1, 0.1], [0.5, 0.3, 0.2]]).log().requires_grad_()
    kept_NV = torch.tensor([[True, True, False], [True, True, True]])
    logp_N = token_logprobs(sampled_logits(logits_NV, temperature=0.5, kept_NV=kept_NV), torch.tensor([0, 1]))
    # temperature one half squares the odds: 64 to 1, and 9 in 25 + 9 + 4
    assert logp_N.exp().tolist() == pytest.approx([64 / 65, 9 / 38], rel=1e-5)
    logp_N.sum().backward()
    assert logits_NV.grad is not None and logits_NV.grad[0, 2] == 0
    assert logits_NV.grad[0, :2].tolist() == pytest.approx([2 / 65, -2 / 65], abs=1e-6)  # twice (1 - p), twice -p
    assert sampled_logits(logits_NV, temperature=1.0, kept_NV=None) is logits_NV


def test_answers_of_different_distributions_are_refused():
    model = small_model(KIND)
    plain, cold, cut, greedy = (
        drawn(model, 1, **how)[0] for how in ({}, {"temperature": 0.5}, {"top_k": 3}, {"temperature": 0.0})
    )
    with pytest.raises(ValueError, match=r"temperatures \[0.5, 1.0\]"):
        packed([plain, cold], [1.0, -1.0])
    with pytest.raises(ValueError, match="1 of 2 answers were drawn from all ids"):
        packed([plain, cut], [1.0, -1.0])
    with pytest.raises(ValueError, match="temperature=0"):
        packed([greedy, greedy], [1.0, -1.0])


def lowered(rollouts: list[Rollout], by: float) -> list[Rollout]:
    """As an engine would have drawn them that found each token less likely."""
    return [
        replace(r, completion=replace(r.completion, logps=[logp - by for logp in r.completion.logps])) for r in rollouts
    ]


def test_the_importance_cap_puts_the_engines_error_into_a_weight():
    """The engine found each token half as likely: twice the weight, at most 1.5; the ratio itself is 1."""
    model = small_model(KIND)
    answers = packed(lowered(drawn(model), 0.6931472), ADVANTAGES)
    metrics = update(model, answers, replace(NARROW, importance_cap=1.5))
    assert metrics["importance_cut_share"] == pytest.approx(1.0)
    assert metrics["clip_share"] == 0.0
    assert metrics["loss"] == pytest.approx(-1.5 * sum(ADVANTAGES) / 8, abs=1e-5)
    below = update(small_model(KIND), answers, replace(NARROW, importance_cap=3.0))
    assert below["importance_cut_share"] == 0.0
    assert below["loss"] == pytest.approx(-2.0 * sum(ADVANTAGES) / 8, abs=1e-5)
    without = update(small_model(KIND), answers, NARROW)
    assert without["clip_share"] > 0.3 and "importance_cut_share" not in without


def test_with_minibatches_the_ratio_is_to_the_trainer_before_the_first_step():
    model = small_model(KIND)
    answers = packed(lowered(drawn(model), 0.6931472), ADVANTAGES, row_len=13)
    config = replace(NARROW, importance_cap=1.5, minibatches=4)
    still = update(small_model(KIND), answers, config, lr=0.0)
    assert still["clip_share"] == 0.0 and still["importance_cut_share"] == pytest.approx(1.0)
    moving = update(small_model(KIND), answers, config, lr=1e-3)
    assert 0.1 < moving["clip_share"] < 0.8  # all but the first minibatch meet a policy that has moved


def test_wrong_answers_far_from_the_policy_are_counted_out():
    """The engine found each token e times as likely: one nat a token."""
    model = small_model(KIND)
    answers = packed(lowered(drawn(model), -1.0), ADVANTAGES)
    near, far = (
        update(small_model(KIND), answers, replace(PLAIN, router_replay=True, off_policy_mask=delta))
        for delta in (1.01, 0.99)
    )
    assert near["off_policy_share"] == 0.0
    assert far["off_policy_share"] == pytest.approx(3 / 8)  # those with a negative advantage
    wrong = sum(a for a in ADVANTAGES if a < 0)
    # unmasked, a ratio of 1/e counts as the clip's 0.8 for a wrong answer
    assert far["loss"] - near["loss"] == pytest.approx(0.8 * wrong / 8, abs=1e-5)


@pytest.mark.parametrize("wrong, message", [
    ({"importance_cap": 0.5}, "importance_cap=0.5 .* at least 1"),
    ({"importance_cap": float("nan")}, "importance_cap=nan"),
    ({"off_policy_mask": -1.0}, "off_policy_mask=-1.0"),
    ({"unbiased_kl": True, "kl_weight": 0.0}, "kl_weight=0"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        GrpoConfig(**wrong)


def test_what_an_answer_was_drawn_from_has_its_own_log_probs():
    r = rollout([1, 2], [3, 4], [-0.5, -0.6])
    r = replace(r, completion=replace(r.completion, drawn_from=DrawnFrom(temperature=0.5, logps=[-0.1, -0.2])))
    answers = packed([r], [1.0], row_len=4)
    assert answers.drawn_logp_BT[0].tolist() == pytest.approx([0, 0, -0.1, -0.2]) and answers.temperature == 0.5
