import json
import os
import resource

import pytest
import torch

from abyssal.data.loader import RowLoader, TokenShards, TokenWriter, shuffled_index

VOCAB = 1000


def write(directory, docs, *, vocab_size=VOCAB, shard_tokens=1 << 28):
    with TokenWriter(directory, vocab_size=vocab_size, shard_tokens=shard_tokens) as writer:
        for doc in docs:
            writer.add(*doc) if isinstance(doc, tuple) else writer.add(doc)
    return directory


@pytest.fixture
def tokens(tmp_path):
    """1,000 different tokens in documents of 10, over several shards: 300, 300, 300 and 100."""
    return write(tmp_path / "tokens", [range(i, i + 10) for i in range(0, 1000, 10)], shard_tokens=300)


def loader(directory, **options) -> RowLoader:
    return RowLoader(directory, **{"row_len": 8, "rows_per_step": 3, "seed": 0} | options)


def first_ids(rows_loader, n_steps):
    """Every row here starts with another token, so this names the rows."""
    return [int(i) for _ in range(n_steps) for i in rows_loader.next().ids_BT[:, 0]]


def test_what_was_written_is_read(tmp_path):
    write(tmp_path / "t", [([5, 6, 7], [0, 1, 1]), [8, 9], []])
    shards = TokenShards(tmp_path / "t")
    assert shards.tokens[0].tolist() == [5, 6, 7, 8, 9] and shards.tokens[0].dtype == "uint16"
    assert shards.masks[0].tolist() == [0, 1, 1, 1, 1]
    assert (shards.n_tokens, shards.vocab_size) == (5, VOCAB)
    assert sorted(os.listdir(tmp_path)) == ["t"]


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    write(tmp_path / "t", [[0, 129_279]], vocab_size=129_280)
    assert TokenShards(tmp_path / "t").tokens[0].tolist() == [0, 129_279]


def test_a_row_is_a_stretch_of_the_text_with_its_mask(tmp_path):
    write(tmp_path / "t", [(range(40), [i % 2 for i in range(40)])])
    ids_BT, mask_BT = loader(tmp_path / "t", rows_per_step=5).next()
    assert (ids_BT.dtype, mask_BT.dtype) == (torch.int64, torch.bool)
    assert sorted(ids_BT.tolist()) == torch.arange(40).view(5, 8).tolist()
    assert torch.equal(mask_BT, ids_BT % 2 == 1)


def test_an_epoch_deals_every_row_once_and_the_next_in_another_order(tokens):
    rows = loader(tokens, rows_per_step=1)
    assert rows.n_rows == 37 + 37 + 37 + 12  # no row crosses from one shard into the next
    first, second = first_ids(rows, rows.n_rows), first_ids(rows, rows.n_rows)
    assert len(set(first)) == rows.n_rows and set(first) == set(second)
    assert first != second and first != sorted(first)
    assert rows.epoch == 2
    assert first_ids(loader(tokens, rows_per_step=1, seed=1), rows.n_rows) != first


@pytest.mark.parametrize("stop", [0, 1, 17, 40, 41, 60])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(tokens, stop):
    whole = first_ids(loader(tokens), 90)  # 270 rows: into the third epoch
    before = loader(tokens)
    seen = first_ids(before, stop)
    state = json.loads(json.dumps(before.state_dict()))  # as it comes out of a checkpoint
    assert state["position"] == 3 * stop
    after = loader(tokens)
    after.load_state_dict(state)
    assert seen + first_ids(after, 90 - stop) == whole


def test_the_step_size_may_change_on_the_way(tokens):
    whole = first_ids(loader(tokens, rows_per_step=1), 40)
    small = loader(tokens, rows_per_step=2)
    seen = first_ids(small, 5)
    large = loader(tokens, rows_per_step=6)
    large.load_state_dict(small.state_dict())
    assert seen + first_ids(large, 5) == whole


def test_resuming_on_other_rows_is_refused(tokens, tmp_path):
    state = loader(tokens).state_dict()
    with pytest.raises(ValueError, match="cannot resume .*: seed was 0 and is 1; put it back"):
        loader(tokens, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="row_len was 8 and is 10"):
        loader(tokens, row_len=10).load_state_dict(state)
    other = write(tmp_path / "other", [range(999, -1, -1)])
    with pytest.raises(ValueError, match="tokens_sha256 was"):
        loader(other).load_state_dict(state)


def test_a_truncated_file_is_named(tokens):
    path = tokens / "tokens-00001.bin"
    os.truncate(path, 598)
    with pytest.raises(ValueError, match=r"tokens-00001.bin has 598 bytes instead of 600; delete its folder"):
        loader(tokens)


@pytest.mark.parametrize("name", ["tokens-00002.bin", "mask-00000.bin"])
def test_one_altered_byte_is_noticed(tokens, name):
    content = bytearray((tokens / name).read_bytes())
    content[100] ^= 1
    (tokens / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} was altered"):
        loader(tokens)
    loader(tokens, check="size")  # the quick look does not see it


def test_a_missing_file_is_named(tokens):
    (tokens / "mask-00003.bin").unlink()
    with pytest.raises(FileNotFoundError, match="mask-00003.bin is missing"):
        loader(tokens)


def test_a_missing_or_broken_index_is_named(tokens, tmp_path):
    with pytest.raises(FileNotFoundError, match="index.json is missing; run the stage"):
        loader(tmp_path)
    (tokens / "index.json").write_text('{"dtype": "uint16"')
    with pytest.raises(ValueError, match="index.json is damaged"):
        loader(tokens)


def test_too_few_tokens_for_a_row_are_an_error(tmp_path):
    write(tmp_path / "t", [range(5)])
    with pytest.raises(ValueError, match="5 tokens do not fill one row of 8"):
        loader(tmp_path / "t")
    write(tmp_path / "none", [])
    with pytest.raises(ValueError, match="0 tokens do not fill one row of 8"):
        loader(tmp_path / "none")


def test_an_error_on_the_way_leaves_what_was_there(tokens):
    before = {path.name: path.read_bytes() for path in tokens.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        with TokenWriter(tokens, vocab_size=VOCAB) as writer:
            writer.add([1, 2, 3])
            raise KeyboardInterrupt
    assert {path.name: path.read_bytes() for path in tokens.iterdir()} == before
    assert sorted(os.listdir(tokens.parent)) == ["tokens"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the kernel refuses a longer file, as a full disk would
    try:
        with pytest.raises(OSError, match=r"cannot write tokens to .*/t: .*; free some space"):
            write(tmp_path / "t", [range(1000)] * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_leftovers_of_a_killed_process_do_not_matter(tmp_path):
    (tmp_path / "t.partial").mkdir()
    (tmp_path / "t.partial" / "tokens-00000.bin").write_bytes(b"half")
    write(tmp_path / "t", [range(20)])
    assert loader(tmp_path / "t").n_rows == 2
    assert os.listdir(tmp_path) == ["t"]


def test_writing_again_replaces_the_whole_folder(tokens):
    write(tokens, [range(20)])
    assert sorted(os.listdir(tokens)) == ["index.json", "mask-00000.bin", "tokens-00000.bin"]
    assert TokenShards(tokens).n_tokens == 20


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 100, 257])
def test_shuffling_moves_each_index_to_one_place(n):
    moved = [shuffled_index(i, n, key="0:0") for i in range(n)]
    assert sorted(moved) == list(range(n))
    assert n < 100 or moved != [shuffled_index(i, n, key="0:1") for i in range(n)]


def test_the_shuffle_stays_the_same_for_ever():
    # a resumed run depends on it: if this changes, every run in progress skips and repeats data
    assert [shuffled_index(i, 10, key="0:0") for i in range(10)] == [6, 7, 2, 3, 9, 8, 4, 5, 0, 1]
