"""Numbers worked out by hand, `transformers`' own penalties beside ours, and the same in a batch as alone."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import N_VOCAB, random_prompts, small_model
from test_engine import plain, same
from transformers import RepetitionPenaltyLogitsProcessor

from abyssal.engine import Engine
from abyssal.engine.penalties import Penalties
from abyssal.types import SamplingParams

LOGITS = [2.0, -1.0, 0.5, 0.0, 3.0]
EVERYTHING = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3,
              "logit_bias": {5: 2.0, 9: -3.0}}


def penalised(logits, prompt, drawn, **asked):
    """The logits of one row that read `prompt` and then drew `drawn`, id by id."""
    ids_RT = np.zeros((3, 16), np.int64)
    penalties = Penalties(n_rows=3, max_length=16)
    penalties.counts_RT[:] = 7  # of a request that was here before
    ids_RT[1, : len(prompt)] = prompt
    penalties.place(1, SamplingParams(**asked), ids_RT[1, : len(prompt)], n_prompt=len(prompt))
    rows = np.array([1])
    for position, token in enumerate(drawn, start=len(prompt)):
        ids_RT[1, position] = token
        penalties.drew(rows, ids_RT, np.array([position]))
    length = np.array([len(prompt) + len(drawn)])
    again = Penalties(n_rows=3, max_length=16)  # as after a preemption
    again.place(1, SamplingParams(**asked), ids_RT[1, : length[0]], n_prompt=len(prompt))
    assert again.counts_RT[1, : length[0]].tolist() == penalties.counts_RT[1, : length[0]].tolist()
    return penalties.apply(torch.tensor([logits]), rows, ids_RT, length)[0].tolist()


def test_each_penalty_by_hand():
    """0 and 1 were read, 1, 1 and 4 written."""
    prompt, drawn = [0, 1, 0], [1, 1, 4]
    got = penalised(LOGITS, prompt, drawn, repetition_penalty=2.0)
    assert got == [1.0, -2.0, 0.5, 0.0, 1.5]  # positive halved, negative doubled, 2 and 3 never seen
    assert penalised(LOGITS, prompt, drawn, presence_penalty=0.5) == [2.0, -1.5, 0.5, 0.0, 2.5]  # not what was read
    assert penalised(LOGITS, prompt, drawn, frequency_penalty=0.5) == [2.0, -2.0, 0.5, 0.0, 2.5]
    got = penalised(LOGITS, prompt, drawn, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=-1.0)
    assert got == [1.0, -2.0 - 0.25 + 2.0, 0.5, 0.0, 1.5 - 0.25 + 1.0]


def test_before_anything_is_drawn_only_the_prompt_counts():
    assert penalised(LOGITS, [4], [], presence_penalty=1.0, frequency_penalty=1.0) == LOGITS
    assert penalised(LOGITS, [4], [], repetition_penalty=1.5) == [2.0, -1.0, 0.5, 0.0, 2.0]


def test_a_bias_is_added_once_to_each_id_it_names():
    penalties, device, prompt = Penalties(n_rows=4, max_length=4), torch.device("cpu"), np.array([1])
    penalties.place(3, SamplingParams(logit_bias={4: 9.0}), prompt, n_prompt=1)
    penalties.place(3, SamplingParams(logit_bias={2: 1.5, 0: -100.0}), prompt, n_prompt=1)
    penalties.place(2, SamplingParams(logit_bias={1: 2}), prompt, n_prompt=1)
    bias = penalties.bias(np.array([0, 3, 2]), device)
    assert bias is not None
    logits_BV = torch.tensor([LOGITS] * 3).index_put((bias.rows_X, bias.ids_X), bias.values_X, accumulate=True)
    assert logits_BV.tolist() == [LOGITS, [-98.0, -1.0, 2.0, 0.0, 3.0], [2.0, 1.0, 0.5, 0.0, 3.0]]
    penalties.place(3, SamplingParams(), prompt, n_prompt=1)  # another request's row now
    assert penalties.bias(np.array([0, 3]), device) is None


@pytest.mark.parametrize("penalty", [0.7, 1.2])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float):
    generator = torch.Generator().manual_seed(0)
    theirs = RepetitionPenaltyLogitsProcessor(penalty=penalty)
    for length in (1, 2, 9, 15):
        logits_V = torch.randn(20, generator=generator)
        ids = torch.randint(0, 20, (length,), generator=generator).tolist()
        want = theirs(torch.tensor([ids]), logits_V[None])[0].tolist()
        half = (length + 1) // 2
        assert penalised(logits_V.tolist(), ids[:half], ids[half:], repetition_penalty=penalty) == pytest.approx(want)


def plain_penalised(model, prompt, params):
    """`plain` with everything counted anew for each token; greedy."""
    ids = list(prompt)
    for _ in range(params.max_tokens):
        with torch.no_grad():
            logits = model.logits(model.hidden(torch.tensor([ids]))[:, -1])[0].tolist()
        written = ids[len(prompt) :]
        for i, value in enumerate(logits):
            if i in ids:
                value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
            value -= params.frequency_penalty * written.count(i) + params.presence_penalty * (i in written)
            logits[i] = value + params.logit_bias.get(i, 0.0)
        ids.append(int(np.argmax(logits)))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["mla_moe", "gqa_dense"])
def test_a_batch_with_too_few_blocks_equals_the_plain_loop(kind: str):
    """Some rows ask and some do not; preempted ones count on; log-probs are the model's own."""
    model = small_model(kind)
    asked = [EVERYTHING, {}, {"repetition_penalty": 1.5}, {"frequency_penalty": 1.0}, {"logit_bias": {3: 4.0}}]
    prompts = random_prompts([9, 3, 12, 5, 7])
    each = [SamplingParams(max_tokens=20, temperature=0.0, **own) for own in asked]
    engine = Engine(model, eos_ids=[], n_blocks=11, block_size=8)
    preempted = []
    preempt = engine._scheduler.preempt
    engine._scheduler.preempt = lambda sequence: preempted.append(sequence.request_id) or preempt(sequence)
    completions = engine.generate(prompts, each)
    assert preempted and completions[0].ids != plain(model, prompts[0], each[1])[0]
    for completion, prompt, params in zip(completions, prompts, each, strict=True):
        assert completion.ids == plain_penalised(model, prompt, params)
        with torch.no_grad():
            logps_TV = model.logits(model.hidden(torch.tensor([prompt + completion.ids])))[0].log_softmax(-1)
        own = logps_TV[len(prompt) - 1 : -1].gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]
        assert completion.logps == pytest.approx(own.tolist(), abs=1e-5)


def test_sampled_answers_are_the_same_in_a_batch_alone_and_after_new_weights():
    model = small_model()
    prompts = random_prompts([5, 9, 14, 2])
    each = [SamplingParams(max_tokens=15, seed=i, top_p=0.9, **(EVERYTHING if i % 2 else {})) for i in range(4)]
    together = Engine(model, eos_ids=[]).generate(prompts, each)
    alone = [Engine(model, eos_ids=[]).generate([p], [own])[0] for p, own in zip(prompts, each, strict=True)]
    same(together, [(c.ids, c.logps) for c in alone])
    engine = Engine(model, eos_ids=[], max_batch=3)
    order = [engine.add(p, own) for p, own in zip(prompts, each, strict=True)]
    done = {}
    while engine.n_unfinished:
        done |= dict(engine.step())
        if len(done) < 3:
            engine.load_weights(model)  # all are recomputed and count anew
    assert [done[i].ids for i in order] == [c.ids for c in together]
    engine.abort(engine.add(prompts[1], each[1]))
    assert engine.generate(prompts[:1], each[:1])[0].ids == together[0].ids  # nothing of an aborted one stays


def test_a_prompt_may_hold_ids_that_no_tokenizer_has():
    prompt = [N_VOCAB - 1, 3]
    params = SamplingParams(max_tokens=8, temperature=0.0, repetition_penalty=1.4)
    [completion] = Engine(small_model(), eos_ids=[], vocab_size=50).generate([prompt], [params])
    assert max(completion.ids) < 50 and len(completion.ids) == 8


def test_what_is_told_of_the_likeliest_ids_is_the_models_own_distribution():
    model = small_model()
    prompts = random_prompts([9, 3, 12, 5])
    asked = (3, 0, 20, 1)
    each = [SamplingParams(max_tokens=20, seed=i, top_logprobs=n, **EVERYTHING) for i, n in enumerate(asked)]
    completions = Engine(model, eos_ids=[], n_blocks=10, block_size=8).generate(prompts, each)
    for c, n in zip(completions, asked, strict=True):
        if n == 0:
            assert c.top_logprobs is None
            continue
        assert c.top_logprobs is not None and len(c.top_logprobs) == len(c.ids)
        with torch.no_grad():
            logps_TV = model.logits(model.hidden(torch.tensor([c.prompt_ids + c.ids])))[0].log_softmax(-1)
        for logps_V, told, token, logp in zip(
            logps_TV[len(c.prompt_ids) - 1 : -1], c.top_logprobs, c.ids, c.logps, strict=True
        ):
            want = logps_V.topk(n)
            assert list(told) == want.indices.tolist()
            assert list(told.values()) == pytest.approx(want.values.tolist(), abs=1e-5)
            if token in told:
                assert told[token] == logp


@pytest.mark.parametrize("wrong, message", [
    ({"repetition_penalty": 0.0}, r"repetition_penalty=0.0 is outside \[0.01, 100\]; use 1 for none"),
    ({"repetition_penalty": math.nan}, "repetition_penalty=nan"),
    ({"presence_penalty": 2.5}, r"presence_penalty=2.5 is outside \[-2, 2\]"),
    ({"frequency_penalty": -math.inf}, "frequency_penalty=-inf"),
    ({"logit_bias": {3: 101.0}}, r"logit_bias of id 3 is 101.0, outside \[-100, 100\]"),
    ({"logit_bias": {3: math.nan}}, "logit_bias of id 3 is nan"),
    ({"logit_bias": {-1: 1.0}}, "logit_bias names -1, which is no id"),
    ({"logit_bias": {i: 1.0 for i in range(1025)}}, "logit_bias has 1025 ids; give at most 1024"),
    ({"stop": tuple("abcdefghijklmnopq")}, "stop has 17 strings; give at most 16"),
    ({"stop": ("",)}, "a stop string of 0 bytes"),
    ({"stop": ("所" * 200,)}, "a stop string of 600 bytes; give 1 to 512"),
    ({"stop": "abc"}, "stop='abc' is no tuple"),
    ({"top_logprobs": 21}, r"top_logprobs=21 is outside 0..20"),
    ({"temperature": math.nan}, "temperature=nan"),
    ({"temperature": math.inf}, "temperature=inf"),
    ({"top_k": 2**40}, "top_k=1099511627776 is outside"),
    ({"seed": 0.5}, "seed=0.5 is not a whole number"),
])
def test_what_makes_no_sense_is_refused_in_one_line(wrong: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        SamplingParams(**wrong)
    assert "\n" not in str(error.value)


def test_what_this_engine_cannot_do_is_refused_when_asked():
    engine = Engine(small_model(), eos_ids=[], vocab_size=50, record_sampling=True)
    plain_params = SamplingParams(max_tokens=3)
    for wrong, message in (({"logit_bias": {50: 1.0}}, "logit_bias contains the id 50, outside the vocabulary of 50"),
                           ({"presence_penalty": 1.0}, "leave penalties and logit_bias out"),
                           ({"stop": ("a",)}, r"give it vocabulary=Vocabulary.of\(tokenizer\)")):
        with pytest.raises(ValueError, match=message):
            engine.add([1, 2], replace(plain_params, **wrong))
    assert engine.n_unfinished == 0
