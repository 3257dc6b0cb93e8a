from dataclasses import replace

import pytest
import torch
from small_models import KINDS, random_prompts, small_model

from abyssal.engine import Engine
from abyssal.rollout import agreement, sample_answers
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.chat import parse, render
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Message, Problem, RequestError, SamplingParams

PROBLEMS = [Problem(prompt="1 + 2 = ?", answer="3"), Problem(prompt="name a colour", answer="red")]
PARAMS = SamplingParams(max_tokens=8)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(train_bpe(["one plus two is three", "name a colour: red"] * 20, vocab_size=400))


@pytest.fixture
def engine(tokenizer):
    return Engine(small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=128), eos_ids=[tokenizer.eos_id])


def test_answers_come_problem_by_problem_with_their_text(engine, tokenizer):
    rollouts = sample_answers(engine, tokenizer, PROBLEMS, answers_per_problem=3, params=PARAMS, seed=0,
                              system="Think.")
    assert [r.problem for r in rollouts] == [PROBLEMS[0]] * 3 + [PROBLEMS[1]] * 3
    for r in rollouts:
        conversation = [Message(role="system", content="Think."), Message(role="user", content=r.problem.prompt)]
        assert r.completion.prompt_ids == render(conversation, tokenizer, add_generation_prompt=True).ids
        assert r.message == parse(r.completion.ids, tokenizer)
    assert len({tuple(r.completion.ids) for r in rollouts}) == 6


def test_an_answer_is_fixed_by_seed_problem_and_number(engine, tokenizer):
    def ids(seed, n, params=PARAMS):
        rollouts = sample_answers(engine, tokenizer, PROBLEMS, answers_per_problem=n, params=params, seed=seed)
        return [r.completion.ids for r in rollouts]

    three = ids(0, 3)
    assert three == ids(0, 3) == ids(0, 3, replace(PARAMS, seed=99))
    assert ids(0, 2) == three[:2] + three[3:5]
    assert ids(1, 3) != three


def test_thinking_can_be_opened_by_the_prompt(engine, tokenizer):
    [r] = sample_answers(engine, tokenizer, PROBLEMS[:1], answers_per_problem=1, params=PARAMS, seed=0, thinking="on")
    assert r.completion.prompt_ids[-1] == tokenizer.think_id
    assert r.message.thinking is not None


def test_an_answer_that_ended_with_an_error_is_none_to_learn_from(tokenizer):
    model = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=128)
    with torch.no_grad():
        model.embed_tokens.weight[tokenizer.encode("name")] = float("nan")
    engine = Engine(model, eos_ids=[tokenizer.eos_id])
    with pytest.raises(RequestError, match="ended with an error: the model's logits are not finite"):
        sample_answers(engine, tokenizer, PROBLEMS, answers_per_problem=2, params=PARAMS, seed=0)


def test_no_answers_are_refused(engine, tokenizer):
    with pytest.raises(ValueError, match="answers_per_problem=0"):
        sample_answers(engine, tokenizer, PROBLEMS, answers_per_problem=0, params=PARAMS, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_engine_and_trainer_agree(kind):
    model = small_model(kind)
    prompts = random_prompts([20, 3, 9]) * 3
    completions = Engine(model, eos_ids=[], block_size=8).generate(prompts, SamplingParams(max_tokens=20))
    found = agreement(model, completions, tokens_per_batch=100)
    assert found.n_tokens == 9 * 20
    assert found.n_compared == found.n_tokens and found.n_flipped == 0
    assert 0 <= found.mean <= found.max < 1e-5
    n_moe = 0 if "dense" in kind else 2
    assert found.n_choices == n_moe * 3 * ((20 + 3 + 9) + 3 * 19)


def test_a_changed_log_prob_is_found():
    model = small_model()
    [c] = Engine(model, eos_ids=[]).generate(random_prompts([5]), SamplingParams(max_tokens=6))
    off = replace(c, logps=[*c.logps[:3], c.logps[3] + 0.5, *c.logps[4:]])
    assert agreement(model, [off]).max == pytest.approx(0.5, abs=1e-4)
    assert agreement(model, [off]).mean == pytest.approx(0.5 / 6, abs=1e-4)


def test_tokens_after_a_flip_are_not_compared_and_the_flip_is_counted():
    model = small_model()
    [c] = Engine(model, eos_ids=[]).generate(random_prompts([5]), SamplingParams(max_tokens=6))
    experts = c.experts.clone()
    # position 6 is the second answer token; it is read when the third is drawn
    experts[6, 1] = torch.tensor([e for e in range(8) if e not in experts[6, 1].tolist()][:2], dtype=torch.uint8)
    found = agreement(model, [replace(c, experts=experts)])
    assert (found.n_tokens, found.n_compared, found.n_flipped, found.n_choices) == (6, 2, 1, 20)
    assert found.flip_share == 1 / 20
    swapped = c.experts.flip(-1)  # the order of the chosen is no difference
    assert agreement(model, [replace(c, experts=swapped)]).n_flipped == 0


def test_nothing_to_compare_is_no_error():
    assert agreement(small_model(), []) == (0.0, 0.0, 0, 0, 0, 0, 0.0, 0.0)
    assert agreement(small_model(), [], replay=True) == (0.0, 0.0, 0, 0, 0, 0, 0.0, 0.0)


def test_sharp_attention_does_not_part_engine_and_trainer():
    """In plain FP32 the two forms of MLA part by more than 1e-5 here; FP64 inside attention keeps them together."""
    model = small_model("mla_moe")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "self_attn" in name and parameter.ndim == 2:
                parameter.mul_(6)
    engine = Engine(model, eos_ids=[], block_size=8)
    completions = engine.generate(random_prompts([20, 3, 9] * 4), SamplingParams(max_tokens=40))
    found = agreement(model, completions)
    assert found.n_compared > 400 and found.max < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_with_replay_every_token_agrees_in_fp32(kind):
    model = small_model(kind)
    completions = Engine(model, eos_ids=[], block_size=8).generate(random_prompts([20, 3, 9] * 3),
                                                                   SamplingParams(max_tokens=20))
    found = agreement(model, completions, replay=True, tokens_per_batch=100)
    assert found.n_compared == found.n_tokens == 9 * 20
    assert found.max < 1e-5


def test_replay_follows_an_engine_that_chose_otherwise():
    """The log-probs of an engine with its own mind about one token: gone with replay, plain to see without."""
    model = small_model()
    completions = Engine(model, eos_ids=[]).generate(random_prompts([5, 8]), SamplingParams(max_tokens=6))
    experts = completions[0].experts.clone()
    experts[6, 1] = torch.tensor([e for e in range(8) if e not in experts[6, 1].tolist()][:2], dtype=torch.uint8)
    ids = torch.tensor([completions[0].prompt_ids + completions[0].ids])
    with torch.no_grad():
        logits = model.logits(model.hidden(ids[:, :-1], experts_BTMK=experts[None].long()))[0, 4:]
    logps = logits.log_softmax(-1).gather(-1, ids[0, 5:, None])[:, 0].tolist()
    completions[0] = replace(completions[0], experts=experts, logps=logps)
    replayed, free = (agreement(model, completions, replay=replay) for replay in (True, False))
    assert replayed.n_compared == 12 and replayed.max < 1e-5
    assert free.n_compared < 12 and free.max < 1e-5  # up to the flip
    assert replayed.free_max == free.free_max > 1e-3
    assert replayed.n_flipped == free.n_flipped >= 1


def test_in_bf16_choices_flip_and_replay_takes_their_part_out_of_the_gap():
    model = small_model(dtype=torch.bfloat16, n_routed_experts=16, num_experts_per_tok=4)
    prompts = random_prompts([20, 3, 9, 14] * 6)
    completions = Engine(model, eos_ids=[]).generate(prompts, SamplingParams(max_tokens=40))
    found = agreement(model, completions, replay=True)
    assert found.n_flipped > 0 and found.n_compared == found.n_tokens
    assert found.mean < 0.8 * found.free_mean and found.max < found.free_max


def test_replay_without_experts_is_refused():
    model = small_model()
    completions = Engine(model, eos_ids=[], record_experts=False).generate(random_prompts([5]), PARAMS)
    with pytest.raises(ValueError, match="record_experts=True"):
        agreement(model, completions, replay=True)
    dense = small_model("gqa_dense")
    completions = Engine(dense, eos_ids=[]).generate(random_prompts([5]), PARAMS)
    assert agreement(dense, completions, replay=True).n_compared == 8  # nothing to replay


def test_ids_that_the_tokenizer_does_not_have_count_on_neither_side():
    model = small_model()
    completions = Engine(model, eos_ids=[], vocab_size=40).generate(random_prompts([5, 9]), PARAMS)
    assert agreement(model, completions, vocab_size=40).max < 1e-5
    assert agreement(model, completions).max > 0.05  # a third of the ids shared the probability
