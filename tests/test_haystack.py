"""Needle documents and copies: what is hidden can be found, what is learned is the answer, every length is exact."""

from __future__ import annotations

import random
import re

import pytest

from abyssal.data.haystack import NeedleMix, copy_document, long_row, needle_document
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer

WORDS = "the sea is deep and the light is far away so we go down slowly\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe([WORDS, "The code of amber is 12.\n", "Again:"] * 20, vocab_size=330))


@pytest.fixture
def hay_of(tokenizer: Tokenizer):
    words = iter(tokenizer.encode(WORDS * 400))
    return lambda n: [next(words) for _ in range(n)]


@pytest.mark.parametrize(("n_keys", "n_asked"), [(1, 1), (3, 1), (3, 3)])
def test_the_answer_is_what_the_hidden_line_says(tokenizer, hay_of, n_keys, n_asked):
    document = needle_document(hay_of, tokenizer, random.Random(5), length=300, n_keys=n_keys, n_asked=n_asked)
    assert len(document.ids) == len(document.mask) == 300
    text = tokenizer.decode(document.ids)
    lines = dict(re.findall(r"The code of (\w+) is (\d{4})\.", text))
    asked = re.findall(r"\nThe code of (\w+) is (\d{4})(?=\n|<)", text)
    assert len(lines) == n_keys and len(asked) == len(document.answers) == n_asked
    assert all(lines[name] == code for name, code in asked)
    for (first, end), (_, code) in zip(document.answers, asked, strict=True):
        assert tokenizer.decode(document.ids[first:end]) == f" {code}"
    learned = [token for token, is_learned in zip(document.ids, document.mask, strict=True) if is_learned]
    assert tokenizer.decode(learned) == "".join(f" {code}" for _, code in asked) + "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, None), (1.0, None)])
def test_the_line_stands_at_the_depth_that_was_asked_for(tokenizer, hay_of, depth, place):
    document = needle_document(hay_of, tokenizer, random.Random(2), length=200, n_keys=1, n_asked=1, depth=depth)
    text = tokenizer.decode(document.ids)
    before, line = text.split("\nThe code of ")[0], re.search(r"\nThe code of \w+ is \d{4}\.\n", text)
    assert line is not None
    n_line, n_before = len(tokenizer.encode(line[0])), len(tokenizer.encode(before))
    n_hay = document.answers[0][0] - len(tokenizer.encode(line[0].split(" is")[0] + " is")) - n_line
    assert n_before == pytest.approx(depth * n_hay, abs=1)


def test_a_copy_is_two_halves_that_are_the_same(tokenizer, hay_of):
    for length in (60, 61):
        document = copy_document(hay_of, tokenizer, length=length)
        assert len(document.ids) == length
        (first, end), mark = document.answers[0], len(tokenizer.encode("\nAgain:\n"))
        n = end - first
        assert document.ids[first:end] == document.ids[first - mark - n : first - mark]
        assert document.mask == [0] * first + [1] * (n + 1) and document.ids[-1] == tokenizer.eos_id


def test_rows_are_full_and_come_in_the_shares_asked_for(tokenizer):
    words = tokenizer.encode(WORDS * 10)
    mix, rng = NeedleMix(share=0.5, copies=0.2, keys=1, shortest=60), random.Random(0)
    rows = [long_row(mix, lambda n: words[:n], tokenizer, rng, row_len=160) for _ in range(400)]
    full = [row for row in rows if row is not None]
    assert {(len(ids), len(mask)) for ids, mask in full} == {(160, 160)}
    copies = sum("Again:" in tokenizer.decode(ids) for ids, _ in full)
    assert len(full) / 400 == pytest.approx(0.7, abs=0.07) and copies / 400 == pytest.approx(0.2, abs=0.06)
    several = sum(ids.count(tokenizer.eos_id) > 1 for ids, _ in full)
    assert 0 < several < len(full) - copies  # some needle rows hold two documents, some one of the row's length
    assert long_row(NeedleMix(), lambda n: words[:n], tokenizer, rng, row_len=160) is None


def test_what_cannot_be_built_is_named(tokenizer, hay_of):
    with pytest.raises(ValueError, match="document of 30 tokens has no room for 2 lines and 1 questions"):
        needle_document(hay_of, tokenizer, random.Random(0), length=30, n_keys=2, n_asked=1)
    with pytest.raises(ValueError, match="a copy of 4 tokens has no room"):
        copy_document(hay_of, tokenizer, length=4)
    for wrong, said in (
        ({"share": 0.7, "copies": 0.4}, "share=0.7, copies=0.4"), ({"keys": 0}, "keys=0"),
        ({"shortest": 0}, "shortest=0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            NeedleMix(**wrong)
