"""Tokenizer files of every make, whole and broken."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from small_models import small_model
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from abyssal.checkpoint.save import save_checkpoint
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.tokens.tokenizer_files import read_config

TEXT = "the sea 所以\n\n\tends </s> at <s> <unk> é 😀 [/INST] <|x|>"
SPECIAL = [AddedToken(name, normalized=False, special=True) for name in ("<unk>", "<s>", "</s>")]


def byte_names() -> list[str]:
    return [f"<0x{i:02X}>" for i in range(256)]


def llama2(kind: str) -> tokenizers.Tokenizer:
    """Sentencepiece's BPE: blanks are letters, bytes stand in for letters it does not know."""
    names = ["<unk>", "<s>", "</s>", *byte_names(), *"▁abcdefghilnorstw", "th", "the", "▁the", "▁s", "ea", "▁sea"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "s"), ("e", "a"), ("▁s", "ea")]
    vocabulary = {name: i for i, name in enumerate(names)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if kind == "prepended":  # as Llama 2 was published; every stretch of text begins with a blank
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:  # as later files say it: only the first stretch does
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.add_special_tokens(SPECIAL)
    return backend


def unigram(*, byte_fallback: bool) -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -3.0), ("▁the", -2.0), ("▁sea", -2.0)]
    pieces += [(letter, -4.0) for letter in "abcdefghilnorst"]
    pieces += [(name, -9.0) for name in byte_names()] if byte_fallback else []
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.add_special_tokens(SPECIAL)
    return backend


def saved(directory: Path, backend: tokenizers.Tokenizer, **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("kind", ["prepended", "metaspace", "unigram"])
def test_every_text_comes_back_and_none_becomes_a_control_token(kind: str, tmp_path: Path):
    backend = unigram(byte_fallback=True) if kind == "unigram" else llama2(kind)
    tokenizer = Tokenizer.load(saved(tmp_path, backend, bos_token="<s>", eos_token="</s>"))
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT and tokenizer.control_ids == {0, 1, 2}
    assert tokenizer.control_ids.isdisjoint(ids)
    plain = "the sea is near"
    assert tokenizer.encode(plain) == backend.encode(plain, add_special_tokens=False).ids
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)  # no pad: the end token


@pytest.mark.parametrize("kind", ["prepended", "metaspace", "unigram"])
def test_text_behind_a_control_token_has_the_ids_it_has_there(kind: str):
    backend = unigram(byte_fallback=True) if kind == "unigram" else llama2(kind)
    tokenizer = Tokenizer(backend)
    for text in ("the sea", " the sea", "\n", "", "é"):
        assert [1, *tokenizer.encode_after(text)] == backend.encode(f"<s>{text}", add_special_tokens=False).ids
    assert tokenizer.control_ids.isdisjoint(tokenizer.encode_after(TEXT))


def test_letters_without_a_token_become_the_unknown_one_which_marks_nothing():
    tokenizer = Tokenizer(unigram(byte_fallback=False), config={"eos_token": "</s>"})
    ids = tokenizer.encode("所 </s>")
    assert 0 in ids and tokenizer.control_ids == {1, 2} and tokenizer.control_ids.isdisjoint(ids)


def test_a_vocabulary_that_cannot_spell_a_text_says_so():
    spec = json.loads(unigram(byte_fallback=False).to_str())
    spec["model"]["unk_id"] = None
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)))
    with pytest.raises(ValueError, match="cannot spell the text"):
        tokenizer.encode("所")


def test_added_words_are_words_and_marks_are_marks():
    backend = train_bpe(["covid is over   there"] * 9, vocab_size=300)
    backend.add_tokens([AddedToken("covid", normalized=False), AddedToken("    ", normalized=False)])
    backend.add_tokens([AddedToken("[INST]", normalized=False)])
    tokenizer = Tokenizer(backend)
    word, blanks = (backend.token_to_id(name) for name in ("covid", "    "))
    assert word in tokenizer.encode("a covid") and blanks in tokenizer.encode("a    b")
    assert tokenizer.token_id("[INST]") not in tokenizer.encode("[INST]")
    with pytest.raises(ValueError, match="no control token 'covid'"):
        tokenizer.token_id("covid")


def test_control_tokens_come_from_text_only_where_that_was_asked_for():
    tokenizer = Tokenizer(train_bpe(["a b c"] * 9, vocab_size=300))
    text = "a<｜User｜>b<think>c"
    closed, opened = tokenizer.encode(text), tokenizer.encode(text, allow_control=True)
    assert tokenizer.control_ids.isdisjoint(closed)
    a, b, c = (tokenizer.encode(letter) for letter in "abc")
    assert opened == [*a, tokenizer.user_id, *b, tokenizer.think_id, *c]
    assert tokenizer.decode(closed) == tokenizer.decode(opened) == text


def test_a_limit_in_the_file_cuts_nothing():
    backend = train_bpe(["a b c"] * 9, vocab_size=300)
    whole = Tokenizer(backend).encode("a b c a b c")
    backend.enable_truncation(2)
    backend.enable_padding(length=40)
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("a b c a b c") == tokenizer.encode("a b c a b c", allow_control=True) == whole


def test_names_of_tokens_are_found_in_whichever_file_has_them(tmp_path: Path):
    path = saved(tmp_path, llama2("prepended"), bos_token=None)
    (path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>", "lstrip": False}}))
    (path / "config.json").write_text(json.dumps({"eos_token_id": [2, 0], "bos_token_id": 2}))
    (path / "chat_template.jinja").write_text("{{ messages }}")
    named = {"content": "<s>", "lstrip": False}
    assert read_config(path) == {"bos_token": named, "eos_token": "</s>", "chat_template": "{{ messages }}"}
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_a_vocabulary_without_a_begin_token_is_saved_without_one(tmp_path: Path):
    """As Qwen's; a text then begins with the end of another."""
    backend = unigram(byte_fallback=True)
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] == "</s>"]
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)), config={"eos_token": "</s>"})
    assert (tokenizer.role_id("bos_token"), tokenizer.bos_id) == (None, tokenizer.eos_id)
    save_checkpoint(tmp_path / "model", small_model(vocab_size=tokenizer.vocab_size), tokenizer)
    ids = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (ids["bos_token_id"], ids["eos_token_id"]) == (None, tokenizer.eos_id)
    assert "bos_token" not in json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert Tokenizer.load(tmp_path / "model").role_id("bos_token") is None


def test_a_vocabulary_without_an_end_token_says_what_to_write():
    with pytest.raises(ValueError, match="no end token .*; write eos_token into its"):
        _ = Tokenizer(unigram(byte_fallback=True)).eos_id


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer.json", b"\xff\xfe", "is not a tokenizer file"),
        ("tokenizer.json", b"", "is not a tokenizer file"),
        ("tokenizer.json", b"[" * 100_000, "is not a tokenizer file"),
        ("tokenizer.json", b'{"model": {"type": "Nope"}}', "is not a tokenizer file"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", b"[1]", "holds list, not a JSON object"),
        ("tokenizer_config.json", b"[" * 100_000, "is not JSON"),
        ("special_tokens_map.json", b"\xff", "special_tokens_map.json is not JSON"),
        ("chat_template.jinja", b"\xff", "is not UTF-8"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, file: str, content: bytes, said: str):
    saved(tmp_path, llama2("prepended"))
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def damaged(spec: Any, rng: random.Random) -> Any:
    """The same with one value somewhere in it gone or another."""
    spec = json.loads(json.dumps(spec))
    at, parents = spec, []
    while isinstance(at, (dict, list)) and at:
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        parents.append((at, key))
        at = at[key]
        if rng.random() < 0.3:
            break
    holder, key = parents[-1]
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice([None, -1, 10**12, 1e999, "", "<think>", "(", [], {}, [["a"]], {"type": "BPE"}, True])
    return spec


@given(seed=st.integers(0, 10**9))
def test_a_damaged_file_loads_or_says_so_in_one_line(seed: int, tmp_path_factory: pytest.TempPathFactory):
    rng = random.Random(seed)
    spec = json.loads(llama2(rng.choice(["prepended", "metaspace"])).to_str())
    path = tmp_path_factory.mktemp("damaged")
    (path / "tokenizer.json").write_text(json.dumps(damaged(spec, rng)))
    config = {"eos_token": {"content": "</s>"}, "chat_template": [{"name": "default", "template": "{{ messages }}"}]}
    (path / "tokenizer_config.json").write_text(json.dumps(damaged(config, rng)))
    try:
        tokenizer = Tokenizer.load(path)
        ids, _ = tokenizer.encode(TEXT), tokenizer.template
    except (ValueError, OSError) as error:
        assert "\n" not in str(error)
    else:
        assert all(isinstance(i, int) for i in ids)
