"""What earlier requests left in the cache, and prompts in chunks: found, shared, never written, given up, forgotten."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import KINDS, random_prompts, small_model
from test_engine import GREEDY, plain, same
from test_scheduler import BLOCK, add, blocks_of, scheduler

from abyssal.engine import Engine
from abyssal.engine.blocks import BlockPool, block_keys, namespace_key
from abyssal.engine.scheduler import PrefixStats
from abyssal.types import SamplingParams

KEYS = [b"a", b"b", b"c", b"d"]


def found(pool: BlockPool, keys: list[bytes]) -> list[int]:
    return pool.find(keys).tolist()


def test_a_key_covers_its_block_and_all_before():
    ids = np.arange(10)
    assert len(block_keys(ids, 4)) == 2  # the third block is not full
    assert block_keys(ids, 4) == block_keys(ids[:8], 4)
    other = ids.copy()
    other[1] = 99
    assert not set(block_keys(ids, 4)) & set(block_keys(other, 4))
    other = ids.copy()
    other[5] = 99
    assert [a == b for a, b in zip(block_keys(ids, 4), block_keys(other, 4), strict=True)] == [True, False]


def test_a_key_belongs_to_a_namespace():
    ids = np.arange(8)
    ours, theirs = (block_keys(ids, 4, namespace_key(name)) for name in ("ours", "theirs"))
    assert not set(ours) & set(theirs) and ours == block_keys(ids, 4, namespace_key("ours"))
    assert {len(key) for key in ours} == {32}
    assert namespace_key("\ud800") != namespace_key("")  # half a character is a name too


def test_a_remembered_block_outlives_its_owner_until_room_is_needed():
    pool = BlockPool(6)
    first = pool.take(3)
    pool.remember(first[:2], KEYS[:2])
    pool.release(first)
    assert pool.n_free == 5 and found(pool, KEYS) == first[:2].tolist()
    assert found(pool, KEYS[1:2]) == first[1:2].tolist() and found(pool, [b"x", *KEYS]) == []
    second = pool.take(3)  # three are empty
    assert not set(second.tolist()) & set(first[:2].tolist()) and len(found(pool, KEYS)) == 2
    third = pool.take(1)  # now one must go: the end of the sequence
    assert third.tolist() == [first[1]] and found(pool, KEYS) == [first[0]]
    assert pool.n_free == 1


def test_the_longest_unused_goes_first_and_use_counts():
    pool = BlockPool(4)
    blocks = pool.take(3)
    pool.remember(blocks, KEYS[:3])
    for block in blocks:
        pool.release(np.array([block]))
    pool.share(blocks[:1])  # used again: now it is the youngest
    pool.release(blocks[:1])
    assert [pool.take(1).item() for _ in range(3)] == [blocks[1], blocks[2], blocks[0]]


def test_a_block_in_use_is_never_given_away_and_forgetting_frees_the_rest():
    pool = BlockPool(4)
    blocks = pool.take(3)
    pool.remember(blocks, KEYS[:3])
    pool.release(blocks)
    pool.share(blocks[:1])
    assert pool.n_free == 2 and pool.n_idle(blocks) == 2
    pool.forget()
    assert pool.n_free == 2 and found(pool, KEYS) == []
    assert sorted(pool.take(2).tolist()) == sorted(blocks[1:].tolist())
    pool.release(blocks)
    assert pool.n_free == 3 and found(pool, KEYS) == []


def test_two_blocks_of_the_same_tokens_are_one_memory():
    pool = BlockPool(4)
    one, other = pool.take(1), pool.take(1)
    pool.remember(one, KEYS[:1])
    pool.remember(other, KEYS[:1])
    pool.release(other)
    pool.release(one)
    assert found(pool, KEYS) == one.tolist() and pool.n_free == 3


def test_a_later_prompt_shares_full_blocks_and_computes_the_rest():
    s = scheduler(prefix_cache=True)
    [long] = random_prompts([11])
    first = add(s, long)
    s.computed(s.admit())
    second = add(s, long[:9] + [60, 61], request_id=1)  # two full blocks of four are the same
    admission = s.admit()
    [(prefix, chunk)] = admission.prefills
    assert chunk.start == 8 and chunk.ids.tolist() == [long[8], 60, 61]
    assert blocks_of(s, second)[:2] == blocks_of(s, first)[:2] and blocks_of(s, second)[2] != blocks_of(s, first)[2]
    assert s.stats == PrefixStats(n_tokens=22, n_found=8)


def test_a_prompt_of_full_blocks_still_computes_its_last():
    s = scheduler(prefix_cache=True)
    [prompt] = random_prompts([8])
    s.remove(admitted(s, prompt))
    admitted(s, prompt)
    assert s.stats == PrefixStats(n_tokens=16, n_found=4)  # without the last token there are no logits


def admitted(s, prompt):
    sequence = add(s, prompt)
    s.computed(s.admit())
    return sequence


def test_what_was_not_computed_is_not_found():
    s = scheduler(prefix_cache=True)
    [prompt] = random_prompts([12])
    add(s, prompt)
    s.admit()  # and `computed` is not called: the step was cut short
    s.preempt_all()
    admitted(s, prompt + [1])
    assert s.stats.n_found == 0


def test_a_chunked_prompt_takes_steps_and_waits_for_no_one():
    s = scheduler(prefill_chunk=5)
    long, short = random_prompts([12, 3])
    add(s, long)
    add(s, short, request_id=1)
    chunks = []
    for _ in range(4):
        admission = s.admit()
        chunks.append([(chunk.start, len(chunk.ids)) for _, chunk in admission.prefills])
    assert chunks == [[(0, 5)], [(5, 5)], [(10, 2), (0, 3)], []]


def test_a_half_computed_prompt_gives_way_to_running_answers_and_begins_again():
    s = scheduler(n_blocks=7, prefill_chunk=4)  # six usable
    short, long = random_prompts([4, 12])
    running = admitted(s, short)
    waiting = add(s, long, request_id=1)
    s.computed(s.admit())
    assert waiting.prefix.n_computed == 4 and s.pool.n_free == 2
    s.rows.length_R[running.row] = 13
    s.grow()  # takes one block a time
    s.rows.length_R[running.row] = 17
    s.grow()
    s.rows.length_R[running.row] = 21
    s.grow()
    assert waiting.prefix.blocks is None and waiting.prefix.n_computed == 0
    s.remove(running)
    for start in (0, 4, 8):
        [(_, chunk)] = s.admit().prefills
        assert chunk.start == start
    assert waiting.row is not None


def watched_writes(engine: Engine) -> list[int]:
    """Counts writes; fails on one into a block with two owners or one that can be found."""
    pool, runner, writes = engine._scheduler.pool, engine._runner, []
    native, run, hidden = runner._native, runner._native and runner._native._run, runner._hidden

    def checked(blocks):
        blocks = np.unique(blocks)
        for block in blocks[blocks > 0].tolist():
            assert pool._owners[block] == 1 and block not in pool._key_of
        writes.append(len(blocks))

    def run_checked(tokens, *args, **settings):
        checked(tokens.blocks_RN[tokens.rows_N, tokens.positions_N // runner.block_size])
        return run(tokens, *args, **settings)

    def hidden_checked(batch):
        checked(batch.slots_BT // runner.block_size)
        return hidden(batch)

    if native:
        native._run = run_checked
    else:
        runner._hidden = hidden_checked
    return writes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefill_chunk, native", [(None, True), (3, True), (8, True), (3, False)])
def test_answers_after_a_hit_equal_plain_ones_and_shared_blocks_are_not_written(
    kind: str, prefill_chunk: int | None, native: bool
):
    model = small_model(kind)
    [head] = random_prompts([20])
    prompts = [head + tail for tail in random_prompts([1, 4, 9], seed=1)]
    each = [SamplingParams(max_tokens=9, seed=i) for i in range(3)]
    want = [plain(model, p, own) for p, own in zip(prompts, each, strict=True)]
    engine = Engine(
        model, eos_ids=[], block_size=4, prefix_cache=True, prefill_chunk=prefill_chunk, native=native
    )
    writes = watched_writes(engine)
    first = engine.generate(prompts[:1], each[:1])
    assert engine.prefix_stats == PrefixStats(21, 0)
    rest = engine.generate(prompts[1:], each[1:])
    assert engine.prefix_stats == PrefixStats(21 + 24 + 29, 20 + 20)
    same(first + rest, want)
    again = engine.generate(prompts, each)
    assert engine.prefix_stats.n_found == 40 + 20 + 20 + 28
    same(again, want)
    for one, other in zip(first + rest, again, strict=True):
        assert one.experts is None or torch.equal(one.experts, other.experts)
    assert writes and engine.n_free_blocks == engine._scheduler.pool.n_usable


def test_a_conversation_finds_its_earlier_turns_answers_included():
    engine = Engine(small_model(), eos_ids=[], block_size=4, prefix_cache=True)
    [prompt] = random_prompts([9])
    answer = engine.generate([prompt], GREEDY)[0].ids
    engine.generate([prompt + answer + [5, 6, 7]], GREEDY)
    # of 9 + 12 ids the last drawn one was not computed: five full blocks
    assert engine.prefix_stats == PrefixStats(9 + 24, 20)


def test_a_small_cache_forgets_and_still_answers_rightly():
    model = small_model()
    engine = Engine(model, eos_ids=[], block_size=4, n_blocks=13, prefix_cache=True)
    prompts = random_prompts([20, 21, 22])
    for _ in range(2):
        for prompt in prompts:
            same(engine.generate([prompt], GREEDY), [plain(model, prompt, GREEDY)])
    assert engine.prefix_stats.n_found == 0  # 12 blocks hold one answer: the next request took them all
    for _ in range(2):
        engine.generate(prompts[:1], GREEDY)
    assert engine.prefix_stats.n_found > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_weights_find_nothing_of_the_old(dtype: torch.dtype):
    engine = Engine(small_model(dtype=dtype), eos_ids=[], block_size=4, prefix_cache=True)
    [prompt] = random_prompts([20])
    engine.generate([prompt], GREEDY)
    new = small_model(seed=1, dtype=dtype)
    engine.load_weights(new)
    got = engine.generate([prompt], GREEDY)
    assert engine.prefix_stats.n_found == 0
    assert got[0].logps == Engine(new, eos_ids=[], block_size=4).generate([prompt], GREEDY)[0].logps


@pytest.mark.parametrize("invariant", [False, True])
def test_where_it_is_left_open_the_cache_is_used_if_that_changes_no_bit(invariant: bool):
    engine = Engine(small_model(), eos_ids=[], block_size=4, native=False, invariant=invariant, prefix_cache=None)
    [prompt] = random_prompts([20])
    assert engine.generate([prompt], GREEDY) and engine.generate([prompt], GREEDY)
    assert engine.prefix_stats.n_found == (16 if invariant else 0)


def test_a_change_of_weights_that_is_cut_short_leaves_nothing_of_the_old_ones(monkeypatch: pytest.MonkeyPatch):
    old, new = small_model(), small_model(seed=1)
    engine = Engine(old, eos_ids=[], block_size=4, prefix_cache=True)
    prompt, other = random_prompts([20, 9])
    engine.generate([prompt], GREEDY)
    running = engine.add(other, SamplingParams(max_tokens=8, seed=1))
    engine.step()
    load_weights = engine._runner.load_weights

    def interrupted(model: torch.nn.Module) -> None:
        load_weights(model)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._runner, "load_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.load_weights(new)
    engine.add(prompt, GREEDY)
    finished: dict = {}
    while engine.n_unfinished:
        finished |= dict(engine.step())
    same([finished[running + 1]], [plain(new, prompt, GREEDY)])
    assert engine.prefix_stats.n_found == 0 and len(finished[running].ids) == 8


def test_a_step_cut_short_loses_no_answer_and_leaves_nothing_to_find():
    """Ctrl-C in the midst of a prefill, with one answer running and one to come."""
    model = small_model()
    engine = Engine(model, eos_ids=[], block_size=4, prefix_cache=True)
    prompts = random_prompts([9, 14])
    each = [SamplingParams(max_tokens=8, seed=i) for i in range(2)]
    requests = [engine.add(prompts[0], each[0])]
    engine.step()
    requests.append(engine.add(prompts[1], each[1]))
    prefill = engine._runner.prefill

    def interrupted(*args: object, **settings: object) -> torch.Tensor:
        raise KeyboardInterrupt

    engine._runner.prefill = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine._runner.prefill = prefill
    finished: dict = {}
    while engine.n_unfinished:
        finished |= dict(engine.step())
    assert engine.prefix_stats.n_found == 0
    same([finished[r] for r in requests], [plain(model, p, own) for p, own in zip(prompts, each, strict=True)])


def test_a_running_answer_draws_on_while_a_long_prompt_is_computed():
    model = small_model()
    engine = Engine(model, eos_ids=[], prefill_chunk=6)
    short, long = random_prompts([4, 40])
    running = engine.add(short, SamplingParams(max_tokens=20, seed=1))
    engine.step()
    late = engine.add(long, SamplingParams(max_tokens=5, seed=2))
    drawn = []
    while not engine.drawn(late):
        engine.step()
        drawn.append(len(engine.drawn(running)))
    assert len(drawn) == 7  # 40 tokens, 6 a step
    assert drawn == list(range(drawn[0], drawn[0] + 7))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefill_chunk", [1, 5, 16])
def test_chunks_of_any_size_give_what_whole_prompts_give(kind: str, prefill_chunk: int):
    model = small_model(kind)
    prompts = random_prompts([1, 17, 32, 45, 17])
    each = [SamplingParams(max_tokens=6, seed=i) for i in range(5)]
    engine = Engine(model, eos_ids=[], prefill_chunk=prefill_chunk, block_size=8)
    same(engine.generate(prompts, each), [plain(model, p, own) for p, own in zip(prompts, each, strict=True)])
    assert engine.n_free_blocks == engine._scheduler.pool.n_usable


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="prefill_chunk=0 must be at least 1"):
        Engine(small_model(), eos_ids=[], prefill_chunk=0)


def test_a_shared_block_stays_until_its_last_owner_goes():
    """Blocks that two requests found stay when one of them ends, and go only when the other does too."""
    s = scheduler(n_blocks=8, prefix_cache=True)
    [prompt] = random_prompts([9])
    first = admitted(s, prompt)
    second = admitted(s, prompt[:8] + [60])
    shared = blocks_of(s, first)[:2]
    s.remove(first)
    assert blocks_of(s, second)[:2] == shared and (s.pool._owners[shared] == 1).all()
    taken = s.pool.take(s.pool.n_free)
    assert not set(taken.tolist()) & set(shared) and BLOCK == 4


def test_a_namespace_finds_its_own_blocks_and_no_others():
    """The same question again: as fast as can be for who asked it before, and as slow as ever for everybody else."""
    engine = Engine(small_model(), eos_ids=[], block_size=4, prefix_cache=True)
    [prompt] = random_prompts([21])
    computed = counted_tokens(engine)
    answers = []
    for namespace in ("", "a", "b", "a", "b"):
        engine.add(prompt, GREEDY, namespace=namespace)
        while engine.n_unfinished:
            answers += engine.step()
    assert computed == [21, 21, 21, 1, 1]
    assert len({tuple(c.ids) for _, c in answers}) == 1


def counted_tokens(engine: Engine) -> list[int]:
    """Prompt tokens computed by each prefill from now on."""
    counts: list[int] = []
    prefill = engine._runner.prefill
    engine._runner.prefill = lambda chunks: counts.append(sum(len(c.ids) for c in chunks)) or prefill(chunks)
    return counts


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_siblings_in_flight_share_within_a_namespace_only(prefix_cache: bool):
    engine = Engine(small_model(), eos_ids=[], block_size=4, prefix_cache=prefix_cache)
    [prompt] = random_prompts([21])
    computed = counted_tokens(engine)
    for namespace in "aabab":
        engine.add(prompt, GREEDY, namespace=namespace)
    engine.step()
    assert computed == [42]
    rows = engine._rows
    held: dict[bytes, set[int]] = {}
    for row in rows.active.tolist():
        held.setdefault(rows.sequence_in(row).root, set()).update(rows.blocks_of(row).tolist())
    one, other = held.values()
    assert not one & other


class Shelf:
    """A tier that keeps keys alone, and can be told to fail."""

    def __init__(self) -> None:
        self.kept: set[bytes] = set()
        self.n_sound = self.most_blocks = 99

    def find(self, keys: list[bytes]) -> int:
        return next((n for n, key in enumerate(keys) if key not in self.kept), len(keys))

    def bring(self, keys: list[bytes], blocks: np.ndarray) -> int:
        assert len(keys) == len(blocks) and self.find(keys) == len(keys)
        self.kept -= set(keys[self.n_sound :])
        return min(self.n_sound, len(keys))

    def offer(self, keys: list[bytes], blocks: np.ndarray) -> None:
        assert len(keys) == len(blocks)
        self.kept |= set(keys)


@pytest.mark.parametrize("n_sound, start", [(99, 12), (1, 4), (0, 0)])
def test_a_tier_brings_what_the_cache_has_lost(n_sound: int, start: int):
    s = scheduler(prefix_cache=True, tier=Shelf())
    [prompt] = random_prompts([14])
    s.remove(admitted(s, prompt))
    assert len(s.tier.kept) == 3
    s.pool.forget()
    s.tier.n_sound = n_sound
    add(s, prompt)
    admission = s.admit()
    [(_, chunk)] = admission.prefills
    # what was promised and not kept waits for the next step, so that no step grows beyond what it had room for
    assert (chunk.start, len(chunk.ids)) == (start, 2) and s.stats.n_found == start
    s.computed(admission)
    while s.waiting:
        s.computed(s.admit())
    assert len(s.tier.kept) == 3  # what was not sound is computed anew and offered again


def test_a_tier_is_asked_after_the_cache_and_offered_nothing_stale():
    s = scheduler(prefix_cache=True, tier=Shelf())
    [prompt] = random_prompts([14])
    first = admitted(s, prompt[:9])  # two full blocks
    keys = block_keys(np.array(prompt), BLOCK)
    s.tier.kept.add(keys[2])
    add(s, prompt, request_id=1)
    [(_, chunk)] = s.admit().prefills
    assert chunk.start == 12 and blocks_of(s, first)[:2] == chunk.blocks[:2].tolist()
    s.rows.length_R[first.row] = 16  # it has grown past its third block when the weights change
    kept = set(s.tier.kept)
    s.preempt_all()
    assert s.tier.kept == kept


def test_a_tier_is_asked_for_no_more_than_a_step_may_bring():
    s = scheduler(prefix_cache=True, tier=Shelf())
    long, short = random_prompts([22, 9])  # five full blocks and two
    for prompt in (long, short):
        s.remove(admitted(s, prompt))
    s.pool.forget()
    s.tier.most_blocks = 3
    sequences = [add(s, prompt, request_id=i) for i, prompt in enumerate((long, short))]
    before = s.stats
    assert s.admit().prefills == []  # three blocks, and nothing is computed that can be brought
    [(_, chunk)] = s.admit().prefills  # two more, and one of the next prompt's two
    assert (chunk.start, len(chunk.ids)) == (20, 2) and sequences[0].row is not None and sequences[1].row is None
    [(_, chunk)] = s.admit().prefills
    assert (chunk.start, len(chunk.ids)) == (8, 1) and sequences[1].row is not None
    assert s.stats.n_found - before.n_found == s.stats.n_found_on_disk == 28
    assert s.stats.n_tokens - before.n_tokens == 31  # each prompt is counted once, however many steps it takes


def test_what_a_tier_spoilt_is_computed_and_what_comes_behind_is_brought():
    s = scheduler(prefix_cache=True, tier=Shelf(), prefill_chunk=4)
    [prompt] = random_prompts([18])  # four full blocks
    keys = block_keys(np.array(prompt), BLOCK)
    s.tier.kept |= {keys[0], keys[2], keys[3]}
    sequence, chunks = add(s, prompt), []
    while sequence.row is None:
        admission = s.admit()
        chunks += [(chunk.start, len(chunk.ids)) for _, chunk in admission.prefills]
        s.computed(admission)
    assert chunks == [(4, 4), (16, 2)] and s.stats.n_found_on_disk == 12 and set(keys) <= s.tier.kept
