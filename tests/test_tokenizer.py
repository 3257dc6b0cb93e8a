import errno
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.tokens.bpe import CONTROL_TOKENS, train_bpe
from abyssal.tokens.tokenizer import Tokenizer

TRICKY = ".split(x)\n 中文ひら cafe\u0301 a1b22 (x)\r\n\n  x__y \t\n<think"
TEXTS = ["Think <think>aloud</think>: User, Assistant, begin of sentence", TRICKY, "<|EOT|> <｜User｜>"] * 20

# control tokens, whole and in pieces, between any characters: what an attacker would type
typed = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(CONTROL_TOKENS),
        st.sampled_from(["<", "<｜", "｜>", "think>", "</", "<｜User", "▁", "<|", "EOT", "\u200b", "\x00", "\r\n"]),
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe(TEXTS, vocab_size=400))


@given(text=typed)
def test_no_text_becomes_a_control_token_and_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.control_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == text


@given(texts=st.lists(typed, max_size=5))
def test_a_batch_is_its_texts_one_by_one(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_control_tokens_are_reached_by_name_only(tokenizer):
    assert [tokenizer.token_id(name) for name in CONTROL_TOKENS] == list(range(20))
    named = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.think_id, tokenizer.end_think_id]
    assert named == [0, 1, 2, 3, 4]
    assert [tokenizer.fim_hole_id, tokenizer.fim_begin_id, tokenizer.fim_end_id] == [5, 6, 7]
    assert [tokenizer.user_id, tokenizer.assistant_id] == [8, 9]
    with pytest.raises(ValueError, match="no control token 'a'"):
        tokenizer.token_id("a")  # a token, but an ordinary one


def test_a_token_that_is_not_there_is_none_where_that_is_an_answer(tokenizer):
    assert tokenizer.find("<think>") == 3 and tokenizer.find("a") is None
    assert (tokenizer.role_id("bos_token"), tokenizer.role_id("unk_token")) == (0, None)


def test_decoding_shows_control_tokens_or_leaves_them_out(tokenizer):
    ids = [tokenizer.user_id, *tokenizer.encode("hi"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "<｜User｜>hi<｜end▁of▁sentence｜>"
    assert tokenizer.decode(ids, skip_special=True) == "hi"


def test_half_a_character_is_refused_with_its_place(tokenizer):
    with pytest.raises(ValueError, match="surrogate pair at 2"):
        tokenizer.encode("ab\ud83d")


def test_saving_and_loading_changes_nothing(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "one", model_max_length=512)
    again = Tokenizer.load(tmp_path / "one")
    again.save(tmp_path / "two")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert again.encode(TRICKY) == tokenizer.encode(TRICKY)
    assert again.vocab_size == tokenizer.vocab_size
    assert again.encode("<think>") == tokenizer.encode("<think>")  # the promise survives the file
    assert sorted(os.listdir(tmp_path / "one")) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("model_type", [None, "deepseek_v3", "llama"])
def test_transformers_loads_the_directory_and_reads_the_same_ids(tokenizer, tmp_path, model_type):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path, model_max_length=512)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = TRICKY + " and 12345 more"
    assert theirs(plain)["input_ids"] == tokenizer.encode(plain)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert theirs.model_max_length == 512
    assert theirs("<think>")["input_ids"] == [tokenizer.think_id]  # there a typed control token counts; in ours never
    thought = [tokenizer.think_id, *tokenizer.encode("x"), tokenizer.end_think_id, tokenizer.eos_id]
    assert theirs.decode(thought, skip_special_tokens=True) == "<think>x</think>"


def test_end_and_pad_are_those_of_the_files(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"pad_token": {"content": "<｜end▁of▁sentence｜>"}, "eos_token": "<|EOT|>"}
    path.write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.pad_id, loaded.eos_id) == (1, tokenizer.token_id("<|EOT|>"))


def test_a_directory_without_a_tokenizer_or_with_a_broken_one_is_named(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json is missing; name the directory"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text()[:1000])
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer file"):
        Tokenizer.load(tmp_path)


def test_a_full_disk_leaves_the_old_files(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot write .*tokenizer.json: No space left on device; free some space"):
        Tokenizer(train_bpe(["other"], vocab_size=300)).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
