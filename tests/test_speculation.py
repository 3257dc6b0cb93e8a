"""Drafts change the time an answer takes, and nothing else: every answer here is compared with the one without them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import KINDS, N_VOCAB, random_prompts, small_model
from test_engine import plain, same

from abyssal.engine import Engine
from abyssal.engine.draft import Drafts, LookUpDrafter
from abyssal.engine.sequence import Rows
from abyssal.engine.verify import kept_counts
from abyssal.engine.vocabulary import Vocabulary
from abyssal.types import SamplingParams, ThinkingLimits

THINK, END_THINK = 57, 58
LETTERS = Vocabulary(bytes_of=[bytes([97 + i % 26]) for i in range(57)] + [b""] * 4, end_ids=frozenset(),
                     control_ids=frozenset({57, 58, 59, 60}), think_id=THINK, end_think_id=END_THINK)  # fmt: skip


class Scripted:
    """Drafts what the answers say, each id with so much probability, else a wrong one."""

    name, most = "script", 4

    def __init__(self, rows: Rows, answers: list[list[int]], share: float):
        self.rows, self.answers, self.share = rows, answers, share

    def begin(self, rows_B, hidden):
        pass

    def went_on(self, rows_B, counts_B, kept_B, hidden_XD):
        pass

    def draft(self, rows_B, most_B):
        ids_BK = np.zeros((len(rows_B), int(most_B.max())), np.int64)
        for row, length, ids_K in zip(rows_B, self.rows.length_R[rows_B], ids_BK, strict=True):
            so_far = self.rows.ids_RT[row, :length].tolist()
            whole = next(answer for answer in self.answers if answer[:length] == so_far)
            for k in range(len(ids_K)):
                right = np.random.default_rng((length, k, so_far[-1])).random() < self.share
                ids_K[k] = (whole[length + k] + (not right)) % N_VOCAB if length + k < len(whole) else 0
        return Drafts.of(ids_BK, most_B)


def scripted(engine: Engine, completions, share: float) -> Engine:
    script = Scripted(engine._rows, [c.prompt_ids + c.ids for c in completions], share)
    engine._speculation.drafter = script
    return engine


def same_completions(got, want, *, tolerance=1e-5):
    for one, other in zip(got, want, strict=True):
        assert one.ids == other.ids
        assert (one.finish_reason, one.stop, one.error) == (other.finish_reason, other.stop, other.error)
        assert one.logps == pytest.approx(other.logps, rel=0, abs=tolerance)
        assert one.thinking == other.thinking
        if other.experts is not None:
            assert torch.equal(one.experts.sort(-1).values, other.experts.sort(-1).values)
        if other.drawn_from is not None:
            assert one.drawn_from.logps == pytest.approx(other.drawn_from.logps, rel=0, abs=1e-5)
            if other.drawn_from.kept_counts is not None:
                assert torch.equal(one.drawn_from.kept_counts, other.drawn_from.kept_counts)
                assert torch.equal(one.drawn_from.kept_ids, other.drawn_from.kept_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_with_drafts_equal_plain_ones(kind):
    """Greedy, sampled and filtered rows side by side, whatever k, drafted by MTP where the model has it."""
    model = small_model(kind)
    prompts = random_prompts([3, 16, 50])
    each = [SamplingParams(max_tokens=8, seed=1), SamplingParams(max_tokens=12, seed=2, temperature=0.7, top_p=0.8),
            SamplingParams(max_tokens=30, seed=3, temperature=0.0)]
    want = [plain(model, p, own) for p, own in zip(prompts, each, strict=True)]
    for k in (1, 2, 4, "auto"):
        engine = Engine(model, eos_ids=[], speculate=k, block_size=16)
        same(engine.generate(prompts, each), want)
        assert engine.n_free_blocks == engine._scheduler.pool.n_usable
        assert engine.draft_stats.drafter == ("MTP" if kind == "mla_moe_query_latent" else "prompt look-up")


@pytest.mark.parametrize("native", [None, False])
def test_drafts_of_a_bfloat16_model(native):
    """Hidden states wait for MTP in the model's type, whatever type the runner hands them over in."""
    model = small_model("mla_moe_query_latent", dtype=torch.bfloat16)
    prompts, params = random_prompts([3, 16]), SamplingParams(max_tokens=12, temperature=0.0)
    without, drafting = (
        Engine(model, eos_ids=[], speculate=speculate, native=native, block_size=16) for speculate in ("off", 2)
    )
    want, got = without.generate(prompts, params), drafting.generate(prompts, params)
    assert drafting.draft_stats.error is None and drafting.draft_stats.n_drafted
    same_completions(got, want, tolerance=0.1 if native is False else 1e-5)  # plain BF16 rounds by the batch's size


@pytest.mark.parametrize("kind", ["mla_moe_query_latent", "gqa_dense"])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_accepted_drafts_save_steps_and_are_what_would_have_been_drawn(kind, share):
    model = small_model(kind)
    prompts = random_prompts([5, 9, 2])
    each = [SamplingParams(max_tokens=21, seed=i, temperature=0.8, top_k=[0, 12][i % 2]) for i in range(3)]
    want = Engine(model, eos_ids=[], record_sampling=True).generate(prompts, each)
    engine = scripted(Engine(model, eos_ids=[], record_sampling=True, speculate=4), want, share)
    same_completions(engine.generate(prompts, each), want)
    stats = engine.draft_stats
    if share == 1.0:  # the first id comes from the prompt, then four steps of five
        assert stats.tokens_per_step == 5.0 and stats.acceptance == (1.0, 1.0, 1.0, 1.0)
    elif share == 0.0:
        assert stats.tokens_per_step == 1.0 and set(stats.acceptance) == {0.0}
    else:
        assert 1.5 < stats.tokens_per_step < 3.5 and stats.acceptance[0] > stats.acceptance[3] > 0.0


def test_the_bits_are_the_same_in_invariant_mode():
    model = small_model("mla_moe")
    prompts = random_prompts([5, 9, 2])
    each = [SamplingParams(max_tokens=15, seed=i) for i in range(3)]
    want = Engine(model, eos_ids=[], invariant=True).generate(prompts, each)
    engine = scripted(Engine(model, eos_ids=[], invariant=True, speculate=3, block_size=4, n_blocks=12), want, 0.6)
    got = engine.generate(prompts, each)
    same_completions(got, want, tolerance=0.0)
    assert engine.draft_stats.n_accepted > 5
    assert all(torch.equal(a.experts, b.experts) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", ["mla_moe_query_latent", "gqa_dense"])
def test_the_bits_are_the_same_on_the_native_path(kind):
    model = small_model(kind)
    prompts = random_prompts([5, 9, 2])
    each = [SamplingParams(max_tokens=15, seed=i) for i in range(3)]
    off, own = (Engine(model, eos_ids=[], speculate=speculate) for speculate in ("off", 3))
    if own._runner._native is None:
        pytest.skip("no native path here")
    want = off.generate(prompts, each)
    same_completions(own.generate(prompts, each), want, tolerance=0.0)
    engine = scripted(Engine(model, eos_ids=[], speculate=3), want, 0.6)
    same_completions(engine.generate(prompts, each), want, tolerance=0.0)
    assert engine.draft_stats.n_accepted > 5


def test_a_drafter_that_raises_is_asked_no_more_and_costs_nobody_an_answer():
    model = small_model("gqa_dense")
    prompts = random_prompts([5, 9])
    params = SamplingParams(max_tokens=12, temperature=0.0)
    engine = Engine(model, eos_ids=[], speculate=2)
    engine._speculation.drafter.draft = lambda rows_B, most_B: 1 // 0
    same(engine.generate(prompts, params), [plain(model, p, params) for p in prompts])
    assert "ZeroDivisionError" in engine.draft_stats.error and engine.draft_stats.k == 0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_ends_of_every_kind_cut_an_accepted_run_where_they_stand(data):
    """End tokens, limits, stop strings, budgets, penalties and likeliest ids, alone and together."""
    model = small_model("gqa_dense")
    prompts, each, thinking = [], [], []
    for i in range(data.draw(st.integers(1, 3))):
        prompts.append([*random_prompts([4 + i])[0], THINK])
        each.append(SamplingParams(
            max_tokens=data.draw(st.integers(1, 16)), seed=i, temperature=data.draw(st.sampled_from([0.0, 1.0])),
            stop=data.draw(st.sampled_from([(), ("a",), ("ab", "c")])),
            repetition_penalty=data.draw(st.sampled_from([1.0, 1.0, 1.3])),
            logit_bias=data.draw(st.sampled_from([{}, {}, {END_THINK: 8.0}])),
            top_logprobs=data.draw(st.sampled_from([0, 0, 2])),
        ))
        thinking.append(data.draw(st.sampled_from([None, ThinkingLimits(budget=3, landing=(1, 2)),
                                                   ThinkingLimits(budget=7, landing=(5, 6, 7))])))
    eos_ids = data.draw(st.lists(st.integers(0, 56), max_size=3))
    k, share = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([0.3, 1.0]))

    def answers(engine):
        ids = [engine.add(p, own, thinking=limits) for p, own, limits in zip(prompts, each, thinking, strict=True)]
        done = {}
        while len(done) < len(ids):
            done |= {finished.request_id: finished.completion for finished in engine.step()}
        assert engine.n_free_blocks == engine._scheduler.pool.n_usable
        return [done[i] for i in ids]

    want = answers(Engine(model, eos_ids=eos_ids, vocabulary=LETTERS))
    engine = scripted(Engine(model, eos_ids=eos_ids, vocabulary=LETTERS, speculate=k), want, share)
    got = answers(engine)
    same_completions(got, want)
    for one, other in zip(got, want, strict=True):
        assert (one.top_logprobs is None) == (other.top_logprobs is None)
        for a, b in zip(one.top_logprobs or [], other.top_logprobs or [], strict=True):
            assert a == pytest.approx(b, abs=1e-5)


def test_a_forced_landing_is_verified_in_one_step():
    """Six ids that a control forces come with one pass of the model, without any drafter's help."""
    model = small_model("gqa_dense")
    limits = ThinkingLimits(budget=8, landing=(1, 2, 3, 4, 5))

    def run(speculate):
        engine = Engine(model, eos_ids=[], vocabulary=LETTERS, speculate=speculate)
        steps, decode = [], engine._runner.decode
        engine._runner.decode = lambda *tokens: steps.append(int(tokens[3].sum())) or decode(*tokens)
        request = engine.add([3, THINK], SamplingParams(max_tokens=16, seed=2), thinking=limits)
        done = []
        while not done:
            done = engine.step()
        assert done[0].request_id == request
        return done[0].completion, steps

    (want, single), (got, steps) = run("off"), run("auto")
    same_completions([got], [want])
    where = want.ids.index(END_THINK)
    assert want.ids[where - 5 : where] == [1, 2, 3, 4, 5] and len(single) == len(want.ids) - 1
    assert max(steps) == 7 and len(steps) == len(single) - 6


@pytest.mark.parametrize("changes", [{"n_blocks": 9, "block_size": 8}, {"prefill_chunk": 3, "block_size": 4},
                                     {"prefix_cache": True, "block_size": 4}, {"step_tokens": 9, "max_batch": 4}],
                         ids=["preempted", "chunks", "prefix cache", "budget"])
@pytest.mark.parametrize("kind", ["mla_moe_query_latent", "gqa_dense"])
def test_drafts_go_with_everything_else(kind, changes):
    model = small_model(kind)
    prompts = random_prompts([9, 9, 3, 16, 12])
    prompts.append(prompts[2])
    each = [SamplingParams(max_tokens=24, seed=i, temperature=[0.0, 1.0][i % 2]) for i in range(len(prompts))]
    want = Engine(model, eos_ids=[]).generate(prompts, each)
    engine = scripted(Engine(model, eos_ids=[], speculate=3, **changes), want, 0.7)
    same_completions(engine.generate(prompts, each), want)
    same_completions(engine.generate(prompts, each), want)
    assert engine.draft_stats.n_accepted > 40
    assert engine.n_free_blocks == engine._scheduler.pool.n_usable
    own = Engine(model, eos_ids=[], speculate=2, **changes)
    same_completions(own.generate(prompts, each), want)


def test_nobody_gives_way_for_a_guess_and_lent_blocks_come_back():
    """Three rows of one block each and one block free: drafts that need a second block find room for one row's only;
    when another row must grow, the lent block is taken back before anybody is preempted."""
    model = small_model("gqa_dense")
    engine = Engine(model, eos_ids=[], block_size=8, n_blocks=8, speculate=4)
    preempted = []
    preempt = engine._scheduler.preempt
    engine._scheduler.preempt = lambda sequence: preempted.append(sequence.request_id) or preempt(sequence)
    prompts = [random_prompts([5])[0], random_prompts([3])[0], random_prompts([2], seed=3)[0]]
    each = [SamplingParams(max_tokens=3, temperature=0.0), SamplingParams(max_tokens=8, temperature=0.0),
            SamplingParams(max_tokens=6, temperature=0.0)]
    want = [plain(model, p, own) for p, own in zip(prompts, each, strict=True)]
    same(engine.generate(prompts, each), want)
    assert preempted == [] and engine.n_free_blocks == 7
    rows, scheduler = engine._rows, engine._scheduler
    for prompt in random_prompts([7, 7, 7]):
        engine.add(prompt, SamplingParams(max_tokens=20))
    engine.step()
    rows_B = rows.active
    for row in rows_B.tolist():  # as if nothing but one block each were held
        scheduler.pool.release(rows.blocks_of(row)[1:])
        rows.n_blocks_R[row], rows.length_R[row] = 1, 8
    scheduler.pool.take(scheduler.pool.n_free - 1)
    assert scheduler.fit_drafts(rows_B[:1], np.array([4])).tolist() == [4]
    assert scheduler.fit_drafts(rows_B[1:], np.array([4, 4])).tolist() == [0, 0]
    rows.length_R[rows_B[2]] = 9
    assert scheduler.grow().tolist() == rows_B.tolist() and preempted == []
    assert rows.n_blocks_R[rows_B].tolist() == [1, 1, 2]


def test_weights_may_change_and_requests_be_aborted_while_drafts_run():
    model, other = small_model("mla_moe_query_latent"), small_model("mla_moe_query_latent", seed=1)
    prompts = random_prompts([9, 4, 12])
    each = [SamplingParams(max_tokens=20, seed=i) for i in range(3)]

    def run(speculate, share):
        engine = Engine(model, eos_ids=[], speculate=speculate)
        ids = [engine.add(p, own) for p, own in zip(prompts, each, strict=True)]
        while len(engine.drawn(ids[0])) < 8:  # with drafts the others may be further or not: only this one is compared
            engine.step()
        seen = engine.drawn(ids[0])
        engine.abort(ids[1])
        engine.load_weights(other)
        done = {}
        while engine.n_unfinished:
            done |= {finished.request_id: finished.completion for finished in engine.step()}
        return seen, done[ids[0]].ids, engine

    seen, ids, engine = run(2, 0.5)
    assert engine.n_free_blocks == engine._scheduler.pool.n_usable
    # what was drawn before the change stays, and the rest is what the new weights draw after it
    rest, _ = plain(other, prompts[0] + seen, replace(each[0], max_tokens=20 - len(seen)))
    assert ids == seen + rest
    before, _ = plain(model, prompts[0], replace(each[0], max_tokens=len(seen)))
    assert seen == before


@pytest.mark.parametrize("n_modules", [1, 2])
@pytest.mark.parametrize("changes", [{}, {"prefill_chunk": 5, "prefix_cache": True, "block_size": 4},
                                     {"invariant": True}], ids=["plain", "chunks", "invariant"])
def test_mtp_drafts_are_those_of_the_whole_model_without_a_cache(n_modules, changes):
    """Each draft of each step computed again from all ids so far; further drafts run the last module on itself."""
    model = small_model("mla_moe_query_latent", num_nextn_predict_layers=n_modules)
    prompts = random_prompts([11, 6])
    engine = Engine(model, eos_ids=[], speculate=3, **changes)
    drafter, seen = engine._speculation.drafter, []
    draft = drafter.draft

    def watched(rows_B, most_B):
        drafts = draft(rows_B, most_B)
        for b, row in enumerate(rows_B):
            ids = engine._rows.ids_RT[row, : engine._rows.length_R[row]].tolist()
            seen.append((ids, drafts.ids_BK[b, : drafts.counts_B[b]].tolist()))
        return drafts

    drafter.draft = watched
    engine.generate(prompts, SamplingParams(max_tokens=10, temperature=0.0))
    n_exact = 0
    for ids, drafts in seen:
        wanted = wanted_drafts(model, ids, len(drafts))
        n_exact += drafts[: len(wanted)] == wanted
    # of two modules the second lacks one entry of the prompt, whose next but one id came too late
    assert len(seen) > 15 and n_exact >= len(seen) * (1.0 if n_modules == 1 else 0.8)


@torch.no_grad()
def wanted_drafts(model, ids, n_drafts):
    ids, drafts, n = list(ids), [], len(ids)
    main_BTD = model.hidden(torch.tensor([ids]))
    for _ in range(min(n_drafts, len(model.mtp))):
        hidden_BTD = model.mtp_hidden(main_BTD, torch.tensor([ids]))[len(drafts)] if len(ids) == n else None
        if hidden_BTD is None:  # main hidden states are known up to the last id but one, module k reads k further
            padded_BTD = torch.cat((main_BTD, main_BTD.new_zeros(1, len(ids) - n, main_BTD.shape[2])), dim=1)
            hidden_BTD = model.mtp_hidden(padded_BTD, torch.tensor([ids]))[len(drafts)]
        drafts.append(int(model.logits(hidden_BTD)[0, n - 2].argmax()))
        ids.append(drafts[-1])
    if len(drafts) == len(model.mtp) == 1:  # on its own output: hidden states of the place before stand for the model's
        states_BTD = main_BTD[:, : n - 1]
        while len(drafts) < n_drafts:
            new_D = model.mtp_hidden(torch.cat((states_BTD, states_BTD[:, :1]), dim=1), torch.tensor([ids[:-1]]))[0]
            states_BTD = torch.cat((states_BTD, new_D[:, -1:]), dim=1)
            again_BTD = torch.cat((states_BTD, states_BTD[:, :1]), dim=1)
            hidden_BTD = model.mtp_hidden(again_BTD, torch.tensor([ids]))[0]
            drafts.append(int(model.logits(hidden_BTD)[0, -1].argmax()))
            ids.append(drafts[-1])
    return drafts


def test_what_counts_of_a_run():
    """Right, wrong, right: what follows the wrong one does not count, though it is right; an end is the last."""
    drafts = Drafts(np.array([[5, 6, 7], [5, 6, 7], [5, 6, 7], [5, 9, 9]]), np.array([3, 3, 3, 1]))
    drawn_BT = np.array([[5, 1, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [5, 9, 0, 0]])
    assert kept_counts(drawn_BT, drafts, drawn_BT == 99).tolist() == [2, 4, 4, 2]
    assert kept_counts(drawn_BT, drafts, drawn_BT == 6).tolist() == [2, 2, 2, 2]


def test_look_up_copies_what_followed_the_same_ids():
    rows = Rows(n_rows=3, max_length=32, max_blocks=1)
    drafter = LookUpDrafter(rows)
    texts = [[1, 2, 3, 4, 9, 8, 7, 5, 2, 3, 4, 6, 1, 2, 3, 4],  # four ids stood before; the last three elsewhere too
             [7, 7, 7],  # a run copies itself
             [1, 2, 3, 4, 5]]  # nothing to find
    for row, text in enumerate(texts):
        rows.ids_RT[row, : len(text)], rows.length_R[row] = text, len(text)
    rows_B = np.arange(3)
    drafter.begin(rows_B, [])
    drafts = drafter.draft(rows_B, np.array([3, 5, 4]))
    assert drafts.counts_B.tolist() == [3, 5, 0]
    assert drafts.ids_BK[0, :3].tolist() == [9, 8, 7] and drafts.ids_BK[1].tolist() == [7] * 5
    # row 2 ends, and a sequence begins there in which the old index is not true
    rows.ids_RT[2, :4], rows.length_R[2] = [4, 5, 4, 5], 4
    drafter.begin(rows_B[2:], [])
    assert drafter.draft(rows_B[2:], np.array([3])).ids_BK[0].tolist() == [4, 5, 4]
    rows.ids_RT[0, 16:20], rows.length_R[0] = [6, 1, 2, 3], 20
    assert drafter.draft(rows_B[:1], np.array([2])).ids_BK[0].tolist() == [4, 6]  # the later of two places


def test_a_number_of_drafts_that_nobody_can_make_is_refused():
    with pytest.raises(ValueError, match="speculate=9: give 1..4 drafts of MTP, 'auto' or 'off'"):
        Engine(small_model("mla_moe_query_latent"), eos_ids=[], speculate=9)
    assert Engine(small_model(), eos_ids=[]).draft_stats is None
