import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abyssal.data.pack import Example, pack_isolated, pack_rows

PAD = 2


def example(length: int, first: int = 10) -> Example:
    """`length` ids from `first` on; the second half is to be learned."""
    return Example(list(range(first, first + length)), [int(i >= length // 2) for i in range(length)])


def test_documents_lie_end_to_end_and_the_tail_is_left_out():
    rows_BT = pack_rows([[1, 2], [3, 4, 5], [6], [7]], row_len=3)
    assert rows_BT.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_too_little_text_for_a_row_is_an_error():
    with pytest.raises(ValueError, match="2 tokens do not fill one row of 3"):
        pack_rows([[1, 2]], row_len=3)


def test_two_examples_share_a_row_and_are_told_apart():
    packed = pack_isolated([Example([5, 6], [0, 1]), Example([7, 8, 9], [0, 0, 1])], row_len=6, pad_id=PAD)
    assert packed.ids_BT.tolist() == [[7, 8, 9, 5, 6, PAD]]
    assert packed.segment_BT.tolist() == [[1, 1, 1, 2, 2, 0]]
    assert packed.position_BT.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert packed.mask_BT.tolist() == [[False, False, True, False, True, False]]
    assert packed.places == [(0, 3), (0, 0)]


def test_the_first_token_of_an_example_is_never_a_target():
    packed = pack_isolated([Example([5, 6], [1, 1]), Example([7, 8], [1, 1])], row_len=4, pad_id=PAD)
    assert packed.mask_BT.tolist() == [[False, True, False, True]]


def test_each_goes_where_the_least_room_is_left():
    # by size: 12 opens row 0 (room 8), 10 opens row 1, 9 fits there only (room 1), 1 fits both and fills row 1
    packed = pack_isolated([example(n) for n in (1, 10, 9, 12)], row_len=20, pad_id=PAD)
    assert packed.places == [(1, 19), (1, 0), (1, 10), (0, 0)]
    assert packed.ids_BT.shape == (2, 20)


@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_every_example_is_found_whole_at_its_place(lengths):
    examples = [example(length, first=100 * i) for i, length in enumerate(lengths)]
    packed = pack_isolated(examples, row_len=16, pad_id=-1)
    for (row, start), (ids, mask) in zip(packed.places, examples, strict=True):
        window = slice(start, start + len(ids))
        assert packed.ids_BT[row, window].tolist() == ids
        assert packed.mask_BT[row, window].tolist() == [False, *map(bool, mask[1:])]
        assert packed.position_BT[row, window].tolist() == list(range(len(ids)))
        assert len(packed.segment_BT[row, window].unique()) == 1
    assert int((packed.segment_BT > 0).sum()) == sum(lengths)
    assert not packed.mask_BT[packed.segment_BT == 0].any()
    assert (packed.ids_BT[packed.segment_BT == 0] == -1).all()
    for segments_T, positions_T in zip(packed.segment_BT, packed.position_BT, strict=True):
        numbers = [int(s) for s in segments_T.unique() if s > 0]
        assert numbers == list(range(1, len(numbers) + 1))
        assert int((positions_T[segments_T > 0] == 0).sum()) == len(numbers)  # each segment starts once


def test_thousands_fill_their_rows():
    rng = random.Random(0)
    examples = [example(rng.randint(8, 200)) for _ in range(5000)]
    packed = pack_isolated(examples, row_len=256, pad_id=PAD)
    assert float((packed.segment_BT > 0).float().mean()) > 0.97
    again = pack_isolated(examples, row_len=256, pad_id=PAD)
    assert torch.equal(packed.ids_BT, again.ids_BT) and packed.places == again.places


def test_an_example_longer_than_a_row_is_an_error_or_counted():
    examples = [example(3), example(9), example(4)]
    with pytest.raises(ValueError, match="example 1 has 9 tokens, a row holds 8"):
        pack_isolated(examples, row_len=8, pad_id=PAD)
    packed = pack_isolated(examples, row_len=8, pad_id=PAD, too_long="drop")
    assert packed.n_dropped == 1
    assert packed.places == [(0, 4), (-1, -1), (0, 0)]


def test_examples_without_sense_are_refused():
    with pytest.raises(ValueError, match="example 0 has 2 ids and 1 mask values"):
        pack_isolated([Example([1, 2], [1])], row_len=8, pad_id=PAD)
    with pytest.raises(ValueError, match="example 0 is empty"):
        pack_isolated([Example([], [])], row_len=8, pad_id=PAD)


def test_no_examples_make_no_rows():
    assert pack_isolated([], row_len=8, pad_id=PAD).ids_BT.shape == (0, 8)
