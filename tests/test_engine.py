from dataclasses import replace

import pytest
import torch
from small_models import KINDS, N_VOCAB, random_prompts, small_model

from abyssal.engine import Engine
from abyssal.engine.sampler import noise_key, sample, sampling
from abyssal.types import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


def plain(model, prompt_ids, params, eos_ids=()):
    """One sequence, no cache, everything computed anew for each token: what the engine must equal."""
    how = sampling(key_B=torch.tensor([noise_key(params.seed)]), temperature_B=torch.tensor([params.temperature]),
                   top_p_B=torch.tensor([params.top_p], dtype=torch.float64), top_k_B=torch.tensor([params.top_k]),
                   min_p_B=torch.tensor([params.min_p]))
    ids, logps = list(prompt_ids), []
    while len(logps) < params.max_tokens and len(ids) < model.config.max_position_embeddings:
        with torch.no_grad():
            logits_BV = model.logits(model.hidden(torch.tensor([ids]))[:, -1])
        drawn = sample(logits_BV, torch.tensor([len(ids)]), how)
        ids.append(drawn.ids_B.item())
        logps.append(drawn.logps_B.item())
        if ids[-1] in eos_ids:
            break
    return ids[len(prompt_ids):], logps


def same(completions, wanted):
    """Tokens equal, log-probs to 1e-5."""
    for completion, (ids, logps) in zip(completions, wanted, strict=True):
        assert completion.ids == ids
        assert completion.logps == pytest.approx(logps, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(max_tokens=12, seed=3),
                                    SamplingParams(max_tokens=12, seed=4, temperature=0.8, top_p=0.9, top_k=20,
                                                   min_p=0.01)],
                         ids=["greedy", "sampled", "filtered"])
def test_a_batch_equals_one_plain_sequence_after_another(kind, params):
    model = small_model(kind)
    prompts = random_prompts([1, 3, 16, 17, 30])
    each = [replace(params, seed=params.seed + i) for i in range(len(prompts))]
    engine = Engine(model, eos_ids=[])
    same(engine.generate(prompts, each), [plain(model, p, own) for p, own in zip(prompts, each, strict=True)])


@pytest.mark.parametrize("kind, dtype, tolerance", [
    ("gqa_dense", torch.float32, 0.0),
    ("mla_dense", torch.float32, 0.0),
    ("mla_moe", torch.bfloat16, 0.0),
    ("mla_moe", torch.float32, 2e-6),  # an expert with one to three rows takes another path in FP32
    ("mla_moe_query_latent", torch.float32, 2e-6),
])
def test_a_sample_depends_on_neither_neighbours_nor_order(kind, dtype, tolerance):
    engine = Engine(small_model(kind, dtype=dtype), eos_ids=[])
    prompts = random_prompts([5, 9, 33, 2, 14, 20, 7, 16, 11, 40])
    each = [SamplingParams(max_tokens=5 + i, seed=i) for i in range(len(prompts))]
    together = engine.generate(prompts, each)
    backwards = engine.generate(prompts[::-1], each[::-1])[::-1]
    alone = [engine.generate([p], [own])[0] for p, own in zip(prompts, each, strict=True)]
    for one, other in [*zip(together, backwards, strict=True), *zip(together, alone, strict=True)]:
        assert one.ids == other.ids
        assert one.logps == pytest.approx(other.logps, rel=0, abs=tolerance)


@pytest.mark.parametrize("n_prompt", [6, 16, 21])
def test_answers_to_one_prompt_share_it_and_equal_separate_ones(n_prompt):
    model = small_model()
    [prompt] = random_prompts([n_prompt])
    each = [SamplingParams(max_tokens=20, seed=i) for i in range(7)]
    engine = Engine(model, eos_ids=[], max_batch=3, block_size=8)  # more answers than rows: some siblings wait
    counts = counted_prefills(engine)
    same(engine.generate([prompt] * 7, each), [plain(model, prompt, own) for own in each])
    assert counts == [1]
    assert engine.n_free_blocks == engine._scheduler.pool.n_usable


def counted_prefills(engine):
    """Batch sizes of all prefills from now on."""
    counts, prefill = [], engine._runner.prefill
    engine._runner.prefill = lambda chunks: counts.append(len(chunks)) or prefill(chunks)
    return counts


def test_repeated_prompts_draw_different_answers_and_a_seed_repeats_them():
    engine = Engine(small_model(), eos_ids=[])
    prompts = random_prompts([8]) * 4
    first = [c.ids for c in engine.generate(prompts, SamplingParams(max_tokens=10, seed=1))]
    assert len({tuple(ids) for ids in first}) == 4
    assert first == [c.ids for c in engine.generate(prompts, SamplingParams(max_tokens=10, seed=1))]
    assert first != [c.ids for c in engine.generate(prompts, SamplingParams(max_tokens=10, seed=2))]


def test_several_answers_to_each_prompt_begin_with_the_one_there_is_anyway():
    engine = Engine(small_model(), eos_ids=[])
    prompts, params = random_prompts([8, 5]), SamplingParams(max_tokens=10, seed=1)
    counts = counted_prefills(engine)
    three = [c.ids for c in engine.generate(prompts, params, n=3)]
    assert sum(counts) == 2 and len({tuple(ids) for ids in three}) == 6
    assert three[::3] == [c.ids for c in engine.generate(prompts, params)]
    assert [ids for i, ids in enumerate(three) if i % 3 < 2] == [c.ids for c in engine.generate(prompts, params, n=2)]
    each = [params, replace(params, seed=7)]
    assert [c.ids for c in engine.generate(prompts, each, n=2)][::2] == [c.ids for c in engine.generate(prompts, each)]
    for n in (0, 129):
        with pytest.raises(ValueError, match=f"n={n} answers to a prompt; ask for 1 to 128"):
            engine.generate(prompts, params, n=n)


@pytest.mark.parametrize("n_blocks", [6, 9, 14])
def test_too_few_blocks_change_no_token(n_blocks):
    model = small_model()
    prompts = random_prompts([9, 9, 3, 16, 12])
    prompts.append(prompts[2])
    each = [SamplingParams(max_tokens=24, seed=i) for i in range(len(prompts))]
    engine = Engine(model, eos_ids=[], n_blocks=n_blocks, block_size=8)
    preempted = []
    preempt = engine._scheduler.preempt
    engine._scheduler.preempt = lambda sequence: preempted.append(sequence.request_id) or preempt(sequence)
    same(engine.generate(prompts, each), [plain(model, p, own) for p, own in zip(prompts, each, strict=True)])
    assert preempted  # else the test shows nothing
    assert engine.n_free_blocks == n_blocks - 1


def test_prompts_beyond_the_prefill_budget_come_in_several_steps():
    model = small_model()
    prompts = random_prompts([20, 20, 20, 20])
    engine = Engine(model, eos_ids=[], prefill_tokens=50)
    counts = counted_prefills(engine)
    same(engine.generate(prompts, GREEDY), [plain(model, p, GREEDY) for p in prompts])
    assert counts == [2, 2]


def test_an_end_token_stops_and_is_part_of_the_answer():
    model = small_model()
    [prompt] = random_prompts([5])
    ids, _ = plain(model, prompt, GREEDY)
    eos = ids[4]
    [completion] = Engine(model, eos_ids=[eos]).generate([prompt], GREEDY)
    assert completion.ids == ids[: ids.index(eos) + 1] and completion.finish_reason == "stop"
    [cut] = Engine(model, eos_ids=[]).generate([prompt], replace(GREEDY, max_tokens=3))
    assert cut.ids == ids[:3] and cut.finish_reason == "length"
    [one] = Engine(model, eos_ids=[]).generate([prompt], replace(GREEDY, max_tokens=1))
    assert one.ids == ids[:1]


def test_an_answer_ends_where_the_context_does():
    model = small_model()
    prompts = random_prompts([60, 63])
    completions = Engine(model, eos_ids=[]).generate(prompts, GREEDY)
    assert [len(c.ids) for c in completions] == [4, 1]  # 64 positions in all
    assert {c.finish_reason for c in completions} == {"length"}
    same(completions, [plain(model, p, GREEDY) for p in prompts])


@pytest.mark.parametrize("kind", KINDS)
def test_the_recorded_experts_are_those_of_a_plain_forward(kind):
    model = small_model(kind)
    prompts = random_prompts([19, 4]) + random_prompts([19])
    for c in Engine(model, eos_ids=[], block_size=8).generate(prompts, SamplingParams(max_tokens=9)):
        routings = []
        model.hidden(torch.tensor([c.prompt_ids + c.ids[:-1]]), routings=routings)
        if not routings:
            assert c.experts is None
            continue
        assert c.experts.dtype == torch.uint8
        want_TMK = torch.stack([r.experts_NK for r in routings], dim=1)
        assert torch.equal(c.experts.long().sort(-1).values, want_TMK.sort(-1).values)


def test_abort_stops_waiting_and_running_requests_and_frees_their_blocks():
    engine = Engine(small_model(), eos_ids=[], max_batch=2)
    prompts = random_prompts([20, 20, 20])
    running, other, waiting = (engine.add(p, SamplingParams(max_tokens=30, seed=i)) for i, p in enumerate(prompts))
    for _ in range(3):
        assert engine.step() == []
    stopped = engine.abort(running)
    assert stopped.finish_reason == "aborted" and len(stopped.ids) == len(stopped.logps) == 4
    assert len(stopped.experts) == 20 + 4 - 1
    assert engine.abort(waiting).ids == []
    assert engine.abort(running) is None
    finished = []
    while engine.n_unfinished:
        finished += engine.step()
    assert [f.request_id for f in finished] == [other]
    same([finished[0].completion], [plain(small_model(), prompts[1], SamplingParams(max_tokens=30, seed=1))])
    assert engine.n_free_blocks == engine._scheduler.pool.n_usable


def test_generate_leaves_others_answers_for_the_next_step():
    engine = Engine(small_model(), eos_ids=[])
    short, long = random_prompts([4, 6])
    request = engine.add(short, replace(GREEDY, max_tokens=2))
    engine.generate([long], GREEDY)
    assert [f.request_id for f in engine.step()] == [request]


def test_a_failing_generate_leaves_nothing_behind():
    engine = Engine(small_model(), eos_ids=[])
    with pytest.raises(ValueError, match="has 64 tokens and leaves no room"):
        engine.generate(random_prompts([4, 64]), GREEDY)
    assert engine.n_unfinished == 0 and engine.step() == []
    assert engine.n_free_blocks == engine._scheduler.pool.n_usable


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_weights_are_used_at_once_and_nothing_stale_is_read(dtype):
    old, new = small_model(seed=0, dtype=dtype), small_model(seed=1, dtype=dtype)
    [prompt] = random_prompts([10])
    params = SamplingParams(max_tokens=12, seed=5)
    engine = Engine(old, eos_ids=[])
    request = engine.add(prompt, params)
    for _ in range(4):
        engine.step()
    engine.load_weights(new)
    finished = []
    while not finished:
        finished = engine.step()
    [(got, completion)] = finished
    assert got == request
    begun = Engine(old, eos_ids=[]).generate([prompt], [params])[0].ids[:5]
    continued = Engine(new, eos_ids=[]).generate([prompt + begun], [replace(params, max_tokens=7)])[0]
    assert completion.ids == begun + continued.ids
    assert completion.logps[5:] == pytest.approx(continued.logps, abs=1e-6)


def test_a_prompt_kept_for_a_sibling_is_computed_again_by_new_weights():
    old, new = small_model(seed=0), small_model(seed=1)
    prompts = random_prompts([10]) * 2
    engine = Engine(old, eos_ids=[], max_batch=1)
    first, second = (engine.add(p, SamplingParams(max_tokens=4, seed=i)) for i, p in enumerate(prompts))
    engine.step()
    engine.load_weights(new)
    finished = {}
    while engine.n_unfinished:
        finished |= dict(engine.step())
    same([finished[second]], [plain(new, prompts[1], SamplingParams(max_tokens=4, seed=1))])


def test_weights_changed_in_place_are_loaded_in_bfloat16():
    model = small_model(dtype=torch.bfloat16)
    engine = Engine(model, eos_ids=[])
    [prompt] = random_prompts([10])
    before = engine.generate([prompt], GREEDY)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    assert engine.generate([prompt], GREEDY)[0].logps == before.logps  # a copy, until told
    engine.load_weights(model)
    assert engine.generate([prompt], GREEDY)[0].logps == Engine(model, eos_ids=[]).generate([prompt], GREEDY)[0].logps


def test_weights_of_another_shape_are_refused():
    engine = Engine(small_model(), eos_ids=[])
    with pytest.raises(ValueError, match="build a new Engine"):
        engine.load_weights(small_model("gqa_dense"))


@pytest.mark.parametrize("prompt, changes, message", [
    ([], {}, "the prompt is empty"),
    (list(range(60)) + [1] * 40, {}, "has 100 tokens and leaves no room for an answer in a context of 64"),
    ([3, N_VOCAB], {}, f"contains the id {N_VOCAB}"),
    ([-1], {}, "contains the id -1"),
    ([1] * 30, {"max_tokens": 30}, "need 8 cache blocks of 8; there are 5; .* give the engine n_blocks=9"),
])
def test_what_cannot_be_served_is_refused_with_a_remedy(prompt, changes, message):
    engine = Engine(small_model(), eos_ids=[], n_blocks=6, block_size=8)
    with pytest.raises(ValueError, match=message):
        engine.add(prompt, replace(SamplingParams(max_tokens=4), **changes))
    assert engine.n_unfinished == 0


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="eos_ids contains the id 99"):
        Engine(small_model(), eos_ids=[99])
    with pytest.raises(ValueError, match="max_batch=0"):
        Engine(small_model(), eos_ids=[], max_batch=0)
    with pytest.raises(ValueError, match="2 prompts but 1 sampling params"):
        Engine(small_model(), eos_ids=[]).generate([[1], [2]], [GREEDY])


def test_ids_beyond_the_tokenizers_are_never_drawn():
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight[50:] *= 5  # what a vocabulary's padding would never be
    prompts = random_prompts([5, 9, 14])
    unmasked = Engine(model, eos_ids=[]).generate(prompts, SamplingParams(max_tokens=20))
    assert max(i for c in unmasked for i in c.ids) >= 50
    for params in (SamplingParams(max_tokens=20), GREEDY, SamplingParams(max_tokens=20, temperature=2.0, top_p=0.9)):
        completions = Engine(model, eos_ids=[], vocab_size=50).generate(prompts, params)
        assert max(i for c in completions for i in c.ids) < 50
        for c in completions:
            with torch.no_grad():
                logits = model.logits(model.hidden(torch.tensor([c.prompt_ids + c.ids])))[0, len(c.prompt_ids) - 1 : -1]
            logps = logits[:, :50].log_softmax(-1).gather(-1, torch.tensor(c.ids)[:, None])[:, 0]
            assert c.logps == pytest.approx(logps.tolist(), abs=1e-5)
    for wrong, message in ((0, "vocab_size=0"), (7, "eos_ids contains the id 9")):
        with pytest.raises(ValueError, match=message):
            Engine(model, eos_ids=[9], vocab_size=wrong)


def test_an_answer_tells_what_it_was_drawn_from():
    """Several ways to draw side by side, with too few blocks, so that some are preempted in the middle."""
    model = small_model()
    ways = [{}, {"temperature": 0.5}, {"top_k": 3}, {"temperature": 1.5, "top_p": 0.7}, {"temperature": 0.0}] * 2
    each = [SamplingParams(max_tokens=20, seed=i, **way) for i, way in enumerate(ways)]
    prompts = random_prompts([9, 3, 16, 5, 7] * 2)
    engine = Engine(model, eos_ids=[], n_blocks=12, block_size=8, record_sampling=True)
    completions = engine.generate(prompts, each)
    assert [c.ids for c in completions] == [c.ids for c in Engine(model, eos_ids=[]).generate(prompts, each)]
    for c, params in zip(completions, each, strict=True):
        found = c.drawn_from
        if params.is_plain:
            assert found is None
            continue
        assert found is not None and found.temperature == params.temperature and len(found.logps) == 20
        if params.temperature == 0:
            assert found.logps == [0.0] * 20 and found.kept_ids is None
            continue
        with torch.no_grad():
            logits_TV = model.logits(model.hidden(torch.tensor([c.prompt_ids + c.ids])))[0, len(c.prompt_ids) - 1 : -1]
        logits_TV = logits_TV / params.temperature
        assert (found.kept_ids is not None) == params.cuts == (found.kept_counts is not None)
        if params.cuts:
            assert len(found.kept_counts) == 20 and int(found.kept_counts.sum()) == len(found.kept_ids)
            if params.top_k:
                assert found.kept_counts.tolist() == [3] * 20
            for logits_V, ids in zip(logits_TV, found.kept_ids.long().split(found.kept_counts.tolist()), strict=True):
                probs_V = logits_V.softmax(-1)
                order = probs_V.argsort(descending=True).tolist()
                assert sorted(order[: len(ids)]) == ids.tolist()  # the likeliest
                if params.top_p < 1:
                    assert probs_V[ids].sum() >= 0.7 > probs_V[ids].sum() - probs_V[ids].min()
                logits_V[[i for i in order if i not in ids.tolist()]] = -torch.inf
        logps = logits_TV.log_softmax(-1).gather(-1, torch.tensor(c.ids)[:, None])[:, 0]
        assert found.logps == pytest.approx(logps.tolist(), abs=1e-5)
    assert all(c.drawn_from is None for c in Engine(model, eos_ids=[]).generate(prompts, each))  # unless asked
