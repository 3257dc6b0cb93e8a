from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from deepseek_files import v4_directory
from gguf_files import ALPHABET, small_vocabulary
from tokenizers import Regex, pre_tokenizers

from abyssal.checkpoint.gguf_cuts import CUTS, apply_cut, name_of_cut
from abyssal.checkpoint.gguf_tokenizer import tokenizer_from_gguf, tokenizer_to_gguf
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer


def from_gguf(**changes: Any) -> Tokenizer:
    metadata = small_vocabulary() | {f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"], np.int32)
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer is not None
    return tokenizer


def cut(name: str, text: str) -> list[str]:
    """The pieces, as text."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    apply_cut(CUTS[name], backend)
    return [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]


def test_tokens_merges_and_roles_come_back():
    tokenizer = from_gguf(chat_template="{{ messages }}", ggml__add_bos_token=True)
    the, space_the, x = 3 + 256 + 1, 3 + 256 + 2, 3 + ALPHABET.index("x")
    assert tokenizer.encode("the the thx") == [the, space_the, *tokenizer.encode(" "), 3 + 256, x]
    assert tokenizer.decode(tokenizer.encode("所以 é\n")) == "所以 é\n"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.adds_bos) == (0, 2, 2, True)
    assert tokenizer.is_chatml and tokenizer.control_names == ["<s>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.control_ids.isdisjoint(tokenizer.encode("<|im_start|>the<|im_end|><s>"))
    assert tokenizer.vocab_size == 262


@pytest.mark.parametrize(
    "name, pieces",
    [
        # each piece is merged on its own; | shows the cuts
        ("gpt-2", "it|'s| 1234|,| 一二|12|\n\n | x"),
        ("smollm", "it|'s| |1|2|3|4|,| 一二|1|2|\n\n | x"),
        ("llama-bpe", "it|'s| |123|4|,| 一二|12|\n\n| | x"),
        ("qwen2", "it|'s| |1|2|3|4|,| 一二|1|2|\n\n| | x"),
        ("deepseek-r1-qwen", "it|'s| |1|2|3|4|,| 一二|1|2|\n\n| | x"),
        ("deepseek-v3", "it|'s| |123|4|,| |一二|12|\n\n| | x"),
        ("deepseek-llm", "it|'|s| |1|2|3|4|,| |一二|1|2|\n|\n| | x"),
        ("default", "it|'|s| |123|4|,| 一二|12|\n\n | x"),
    ],
)
def test_each_name_is_a_cut(name: str, pieces: str):
    """Worked out by hand from the patterns, for one text with a contraction, digits, Chinese and blanks."""
    got = cut(name, "it's 1234, 一二12\n\n  x")
    assert "".join(got) == "it's 1234, 一二12\n\n  x"
    assert "|".join(got) == pieces


def test_names_that_say_the_same_as_other_spellings():
    """DeepSeek's, SmolLM's and Llama's own tokenizer files spell the cuts in another way."""
    end = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    official = [
        r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ]  # fmt: skip
    llama = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
             r"|\s+(?!\S)|\s+")  # fmt: skip

    def splits(patterns: list[str]) -> Any:
        each = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
        return pre_tokenizers.Sequence([*each, end])

    def named(stage: Any, **model: Any) -> str:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(**model))
        backend.pre_tokenizer = stage
        return name_of_cut(backend)

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert named(splits(official)) == "deepseek-v3"
    assert named(gpt2) == "gpt-2"
    assert named(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])) == "smollm"
    assert named(splits([llama]), ignore_merges=True) == "llama-bpe"
    assert named(splits([llama.replace("{1,3}", "")])) == "qwen2"
    for stage in (pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=True), splits([llama])):
        with pytest.raises(ValueError, match="has no name in GGUF .*; known are gpt-2, smollm"):
            named(stage)


@pytest.mark.parametrize("pre", [None, "qwen9", 7])
def test_a_cut_that_is_not_known_is_an_error(pre: Any):
    with pytest.raises(ValueError, match="known are gpt-2, smollm, llama-bpe|lacks tokenizer.ggml.pre"):
        from_gguf(ggml__pre=pre)


def test_llama_takes_a_piece_that_is_a_token_whole():
    """Llama 3 has tokens that no merges lead to; a piece that spells one is it."""
    tokens = [*small_vocabulary()["tokenizer.ggml.tokens"], "xyz"]
    kinds = [3] * 3 + [1] * (len(tokens) - 3)
    llama = from_gguf(ggml__pre="llama-bpe", ggml__tokens=tokens, ggml__token_type=kinds)
    other = from_gguf(ggml__pre="qwen2", ggml__tokens=tokens, ggml__token_type=kinds)
    assert llama.encode("xyz") == [len(tokens) - 1] and len(other.encode("xyz")) == 3
    assert llama.adds_bos and not other.adds_bos


def test_padding_rows_are_no_tokens_and_user_defined_ones_are_kept():
    tokens = [*small_vocabulary()["tokenizer.ggml.tokens"], "<think>", "[PAD263]", "[PAD264]"]
    kinds = [3] * 3 + [1] * (len(tokens) - 6) + [4, 5, 5]
    tokenizer = from_gguf(ggml__tokens=tokens, ggml__token_type=kinds)
    assert tokenizer.vocab_size == 263 and tokenizer.find("<think>") == 262 and tokenizer.find("[PAD263]") is None


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"ggml__model": "llama"}, "model='llama' is not supported; gpt2, byte-level BPE, is"),
        ({"ggml__tokens": None}, "lacks tokenizer.ggml.tokens"),
        ({"ggml__merges": ["t h", "x"]}, "merges holds something that is no pair"),
        ({"ggml__merges": ["t ho"]}, "merges do not fit tokenizer.ggml.tokens"),
        ({"ggml__token_type": [1, 2]}, "does not hold one number for each of 262 tokens"),
        ({"ggml__eos_token_id": 262}, "eos_token_id=262 is none of 262 tokens"),
        ({"ggml__eos_token_id": None}, "lacks tokenizer.ggml.eos_token_id"),
        ({"ggml__token_type": [3] * 262}, "text can become the control token"),
        ({"ggml__tokens": ["<s>"] * 262}, "has one token twice"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_one_line(changes: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said) as error:
        from_gguf(**changes)
    assert "\n" not in str(error.value)


def as_stored(metadata: dict[str, Any]) -> dict[str, Any]:
    return metadata | {"tokenizer.ggml.token_type": np.array(metadata["tokenizer.ggml.token_type"], np.int32)}


TEXT = "def f(x):\n    return x**2  # 所以 12345 é 😀 it's\r\n\t<think> <｜User｜> [PAD5]"


def test_our_own_tokenizer_there_and_back(tmp_path: Path):
    ours = Tokenizer(train_bpe(["the sea is deep 12 所以\n" * 30], vocab_size=320))
    metadata = tokenizer_to_gguf(ours, n_rows=330)
    assert metadata["tokenizer.ggml.pre"] == "deepseek-v3"
    assert len(metadata["tokenizer.ggml.tokens"]) == len(metadata["tokenizer.ggml.token_type"]) == 330
    kinds = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    assert [kinds[name] for name in ("<｜User｜>", "<think>", "<|EOT|>", "[PAD329]")] == [3, 4, 3, 5]
    again = tokenizer_from_gguf(as_stored(metadata))
    assert again is not None and again.vocab_size == ours.vocab_size
    assert again.encode(TEXT) == ours.encode(TEXT) and again.decode(again.encode(TEXT)) == TEXT
    assert {name: again.find(name) for name in ours.control_names} == {n: ours.find(n) for n in ours.control_names}
    assert (again.bos_id, again.eos_id, again.pad_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert again.template == ours.template and again.adds_bos == ours.adds_bos
    assert tokenizer_to_gguf(again, n_rows=330) == metadata
    with pytest.raises(ValueError, match="ids and the model rows for 270"):
        tokenizer_to_gguf(ours, n_rows=270)


@pytest.mark.parametrize("pre", list(CUTS))
def test_every_cut_there_and_back(pre: str):
    tokenizer = from_gguf(ggml__pre=pre)
    metadata = tokenizer_to_gguf(tokenizer, n_rows=262)
    found = metadata["tokenizer.ggml.pre"]
    assert found == pre or {found, pre} == {"qwen2", "deepseek-r1-qwen"}  # the same cut under two names
    again = tokenizer_from_gguf(as_stored(metadata))
    assert again is not None and again.encode(TEXT) == tokenizer.encode(TEXT)
    spec, back = (json.loads(t.backend.to_str()) for t in (tokenizer, again))
    assert spec == back


@pytest.mark.slow
def test_deepseeks_own_vocabulary_there_and_back():
    theirs = Tokenizer.load(v4_directory())
    metadata = tokenizer_to_gguf(theirs, n_rows=129280)
    assert metadata["tokenizer.ggml.pre"] == "deepseek-v3" and len(metadata["tokenizer.ggml.merges"]) == 127741
    again = tokenizer_from_gguf(as_stored(metadata))
    assert again is not None and again.vocab_size == theirs.vocab_size == 129280
    text = Path(json.__file__).read_text(encoding="utf-8") + TEXT
    assert again.encode(text) == theirs.encode(text)
    assert [again.find(name) for name in theirs.control_names] == list(map(theirs.find, theirs.control_names))


def test_tokenizers_that_gguf_cannot_hold_are_refused():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(ValueError, match="of type WordLevel has no place in GGUF here; byte-level BPE has"):
        tokenizer_to_gguf(Tokenizer(words), n_rows=2)
