import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.engine.blocks import TRASH_BLOCK, BlockPool, blocks_for


def test_seventeen_tokens_need_two_blocks_of_sixteen():
    assert [blocks_for(n, 16) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_the_reserved_block_is_never_handed_out():
    pool = BlockPool(4)
    assert sorted(pool.take(3)) == [1, 2, 3]
    assert TRASH_BLOCK == 0 and pool.n_free == 0


def test_a_shared_block_is_free_only_when_both_owners_let_go():
    pool = BlockPool(3)
    block = pool.take(1)
    pool.share(block)
    pool.release(block)
    assert pool.n_free == 1
    pool.release(block)
    assert pool.n_free == 2


def test_releasing_a_free_block_is_caught():
    pool = BlockPool(3)
    block = pool.take(1)
    pool.release(block)
    with pytest.raises(AssertionError, match="released a free block"):
        pool.release(block)


def test_a_pool_of_one_block_is_refused():
    with pytest.raises(ValueError, match="n_blocks=1"):
        BlockPool(1)


@given(st.lists(st.tuples(st.sampled_from(["take", "share", "release"]), st.integers(0, 5)), max_size=60))
def test_no_block_leaks_or_has_two_keepers(actions):
    """Against plain lists: every holder's blocks are used, and free + held is always all."""
    pool, holders = BlockPool(9), []
    for action, n in actions:
        if action == "take" and n <= pool.n_free:
            taken = pool.take(n)
            held = {int(b) for holder in holders for b in holder}
            assert not held & set(taken.tolist())
            holders.append(taken)
        elif action == "share" and holders:
            pool.share(holders[n % len(holders)])
            holders.append(holders[n % len(holders)].copy())
        elif action == "release" and holders:
            pool.release(holders.pop(n % len(holders)))
        held = np.unique(np.concatenate([np.empty(0, np.int64), *holders]))
        assert pool.n_free == pool.n_usable - len(held)
