import numpy as np
from small_models import random_prompts

from abyssal.engine.blocks import BlockPool
from abyssal.engine.scheduler import Scheduler
from abyssal.engine.sequence import Rows, Sequence
from abyssal.types import SamplingParams

BLOCK = 4


def scheduler(*, n_blocks=20, n_rows=4, prefill_tokens=1000, **changes):
    return Scheduler(pool=BlockPool(n_blocks), rows=Rows(n_rows=n_rows, max_length=32, max_blocks=8), block_size=BLOCK,
                     prefill_tokens=prefill_tokens, **changes)


def add(s, prompt, *, request_id=0):
    sequence = Sequence(request_id, prompt, SamplingParams(), limit=32)
    s.add(sequence)
    return sequence


def draw(s, n=1):
    """What the engine does with a step, without a model: every running row gets a token."""
    for _ in range(n):
        s.rows.length_R[s.grow()] += 1


def blocks_of(s, sequence):
    return s.rows.blocks_of(sequence.row).tolist()


def test_siblings_share_full_blocks_and_own_their_last():
    s = scheduler()
    [prompt] = random_prompts([6])  # one full block and half a one
    first, second, third = (add(s, prompt, request_id=i) for i in range(3))
    admission = s.admit()
    assert len(admission.prefills) == 1 and len(admission.placed) == 3
    tables = [blocks_of(s, x) for x in (first, second, third)]
    assert len({t[0] for t in tables}) == 1
    assert len({t[1] for t in tables}) == 3
    _, (_, _, blocks, _) = admission.prefills[0]
    assert tables[2] == blocks.tolist()  # the last one needs no copy
    assert admission.copy_from == [blocks[1]] * 2
    assert admission.copy_to == [tables[0][1], tables[1][1]]
    assert s.pool.n_usable - s.pool.n_free == 4


def test_a_prompt_of_full_blocks_is_shared_without_copies():
    s = scheduler()
    [prompt] = random_prompts([8])
    sequences = [add(s, prompt, request_id=i) for i in range(3)]
    admission = s.admit()
    assert admission.copy_from == []
    assert len({tuple(blocks_of(s, x)) for x in sequences}) == 1
    s.rows.length_R[s.rows.active] += 1  # first token drawn
    draw(s)
    assert len({blocks_of(s, x)[2] for x in sequences}) == 3  # each goes on in a block of its own


def test_siblings_that_wait_for_a_row_find_the_prompt_computed():
    s = scheduler(n_rows=1)
    [prompt] = random_prompts([6])
    first = add(s, prompt)
    add(s, prompt, request_id=1)
    assert len(s.admit().prefills) == 1
    s.remove(first)
    admission = s.admit()
    assert admission.prefills == [] and len(admission.placed) == 1


def test_first_come_first_served_even_when_a_later_one_would_fit():
    s = scheduler(n_blocks=8)
    small, large, tiny = random_prompts([12, 20, 2])
    add(s, small)
    add(s, large, request_id=1)
    add(s, tiny, request_id=2)
    assert [x.request_id for x, _ in s.admit().placed] == [0]


def test_the_youngest_gives_way_and_goes_to_the_head_of_the_queue():
    s = scheduler(n_blocks=7, n_rows=3)
    old, young, late = (add(s, p, request_id=i) for i, p in enumerate(random_prompts([7, 6, 4])))
    s.admit()
    assert old.row is not None and young.row is not None and late.row is None
    s.rows.length_R[s.rows.active] += 1
    draw(s, 6)  # both grow beyond the blocks there are
    assert old.row is not None and young.row is None
    assert [x.request_id for x in s.waiting] == [1, 2]
    assert len(young.prefix.ids) == len(young.prompt_ids) + len(young.ids) > 6
    assert young.prefix.ids[:6].tolist() == young.prompt_ids


def test_kept_prompts_are_given_up_before_anyone_is_preempted():
    s = scheduler(n_blocks=6, n_rows=1)
    [prompt] = random_prompts([6])
    running = add(s, prompt)
    waiting = add(s, prompt, request_id=1)
    s.admit()
    assert waiting.prefix.blocks is not None
    s.rows.length_R[running.row] = 16
    draw(s, 3)
    assert running.row is not None and waiting.prefix.blocks is None


def test_a_sibling_takes_the_prompt_itself_when_no_block_is_left_to_copy_to():
    s = scheduler(n_blocks=3)  # two usable: exactly the prompt
    [prompt] = random_prompts([6])
    first, second = add(s, prompt), add(s, prompt, request_id=1)
    assert len(s.admit().placed) == 1
    s.remove(first)
    admission = s.admit()
    assert [x for x, _ in admission.placed] == [second] and len(admission.prefills) == 1
    s.remove(second)
    assert s.pool.n_free == s.pool.n_usable


def test_an_aborted_waiting_sibling_frees_the_prompt_it_kept():
    s = scheduler(n_rows=1)
    [prompt] = random_prompts([6])
    first, second = add(s, prompt), add(s, prompt, request_id=1)
    s.admit()
    s.remove(second)
    s.remove(first)
    assert s.pool.n_free == s.pool.n_usable


def test_new_weights_send_all_back_in_order():
    s = scheduler()
    for i, prompt in enumerate(random_prompts([3, 5, 7, 4, 6])):
        add(s, prompt, request_id=i)
    s.admit()
    s.rows.length_R[s.rows.active] += 1
    s.preempt_all()
    assert [x.request_id for x in s.waiting] == [0, 1, 2, 3, 4]
    assert s.pool.n_free == s.pool.n_usable
    assert s.rows.n_free == 4 and not np.any(s.rows.blocks_RN)


def test_the_prefill_budget_counts_padding_and_always_lets_one_through():
    s = scheduler(n_blocks=30, prefill_tokens=16)
    for i, prompt in enumerate(random_prompts([20, 3, 5, 8])):
        add(s, prompt, request_id=i)
    assert [len(prefix.ids) for prefix, _ in s.admit().prefills] == [20]
    assert [len(prefix.ids) for prefix, _ in s.admit().prefills] == [3, 5]  # a third would make 3 x 8 tokens
    assert [len(prefix.ids) for prefix, _ in s.admit().prefills] == [8]
