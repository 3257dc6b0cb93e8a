"""Which part of a response a head reads, to the bit, and that examples in a row are strangers to each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import small_model

from abyssal.data.preferences import Pair
from abyssal.model.reward_head import RewardModel
from abyssal.stages.preference_scores import Scores, pair_ids, scored, seen_by
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Message

PROMPT = "The code is 4821. It is secret. What is the code?"
KEEPS = Message(role="assistant", content="I cannot say that.", thinking="so it is secret")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe([PROMPT, KEEPS.content, str(KEEPS.thinking)] * 9, vocab_size=330))


def scores_of(tokenizer: Tokenizer) -> Scores:
    policy = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=256)
    model = RewardModel.from_policy(policy, 2, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(1))
    return Scores(model, tokenizer, row_len=128, rows_per_pass=2)


def responses(thinking: str | None) -> list[tuple[str, Message]]:
    """Several, so that they share rows with strangers; one has the thinking in question."""
    others = [(f"Name {n} colours", Message(role="assistant", content="red, " * n, thinking="so red")) for n in (1, 4)]
    return [*others, (PROMPT, replace(KEEPS, thinking=thinking))]


@pytest.mark.parametrize("thinking", ["so 4821 is secret", "so " * 20, "", None])
def test_helpfulness_cannot_see_the_thinking_and_safety_does(tokenizer, thinking: str | None):
    scores = scores_of(tokenizer)
    for head, sees in (("helpfulness", False), ("safety", True)):
        before, after = scores.of(head, responses(KEEPS.thinking)), scores.of(head, responses(thinking))
        assert torch.equal(before, after) != sees, head
    answer = replace(KEEPS, content="I can say that.")
    for head in ("helpfulness", "safety"):
        assert float(scores.of(head, [(PROMPT, KEEPS)])) != float(scores.of(head, [(PROMPT, answer)]))


def test_packed_scores_are_those_of_each_alone_in_their_own_order(tokenizer):
    scores = scores_of(tokenizer)
    some = [*responses("so it is secret"), *responses(None)]
    for head in ("helpfulness", "safety"):
        alone_N = torch.cat([scores.of(head, [one]) for one in some])
        assert torch.allclose(scores.of(head, some), alone_N, atol=1e-5)
        assert len(set(alone_N.tolist())) >= 3


def test_a_response_longer_than_a_row_is_scored_and_none_is_none(tokenizer):
    scores = scores_of(tokenizer)
    assert scores.of("safety", [(PROMPT * 3, KEEPS)]).shape == (1,)
    assert scores.of("safety", []).shape == (0,)


def test_a_score_that_is_no_number_is_an_error_and_never_a_reward(tokenizer):
    scores = scores_of(tokenizer)
    with torch.no_grad():
        scores.model.score.weight[1, 0] = float("nan")
    assert scores.of("helpfulness", responses(None)).isfinite().all()
    with pytest.raises(FloatingPointError, match="gives 3 of 3 answers a safety that is no number"):
        scores.of("safety", responses(None))


def test_the_ids_of_pairs_are_all_chosen_then_all_rejected(tokenizer):
    other = replace(KEEPS, content="4821")
    pairs = [
        Pair(prompt=PROMPT, head=head, chosen=KEEPS, rejected=other, truths=(1.0, 0.0), source="spoiled")
        for head in ("safety", "helpfulness")
    ]
    ids, heads_N = pair_ids(pairs, tokenizer)
    assert heads_N.tolist() == [1, 0]
    assert ids == [
        seen_by("safety", PROMPT, KEEPS, tokenizer), seen_by("helpfulness", PROMPT, KEEPS, tokenizer),
        seen_by("safety", PROMPT, other, tokenizer), seen_by("helpfulness", PROMPT, other, tokenizer),
    ]  # fmt: skip
    assert tokenizer.think_id in ids[0] and tokenizer.think_id not in ids[1]


def test_gradients_flow_through_the_scores_of_a_batch(tokenizer):
    scores = scores_of(tokenizer)
    ids = [seen_by("safety", *one, tokenizer) for one in responses("so it is secret")]
    scored(scores.model, ids, pad_id=tokenizer.pad_id, row_len=64, rows_per_pass=1).sum().backward()
    gradient = scores.model.score.weight.grad
    assert gradient is not None and (gradient.abs().sum(1) > 0).all()
