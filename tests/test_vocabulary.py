"""The bytes of each id: joined, they are the text that was encoded."""

from __future__ import annotations

import pytest
import tokenizers
from deepseek_files import v4_directory
from hypothesis import given
from hypothesis import strategies as st
from test_any_tokenizer import TEXT, llama2, unigram
from test_gguf_tokenizer import from_gguf
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from abyssal.engine.vocabulary import Vocabulary
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.token_bytes import byte_letters
from abyssal.tokens.tokenizer import Tokenizer

OURS = Tokenizer(train_bpe(["the sea 所以 é 😀 covid"] * 9, vocab_size=330))


@given(st.text())
def test_the_bytes_of_the_ids_are_the_text(text: str):
    assert Vocabulary.of(OURS).bytes_from(OURS.encode(text)) == text.encode()


def test_control_tokens_write_nothing_and_are_named():
    vocabulary = Vocabulary.of(OURS)
    assert len(vocabulary.bytes_of) == OURS.vocab_size
    assert vocabulary.bytes_of[OURS.eos_id] == vocabulary.bytes_of[OURS.think_id] == b""
    assert {i for i, written in enumerate(vocabulary.bytes_of) if not written} == vocabulary.control_ids
    assert (vocabulary.think_id, vocabulary.end_think_id) == (OURS.think_id, OURS.end_think_id)
    assert vocabulary.end_ids == {OURS.eos_id}
    assert Vocabulary.of(OURS).bytes_of is vocabulary.bytes_of  # worked out once


def test_the_letters_of_bytes_are_gpt2s():
    """ "Ġ" is the blank and "Ċ" the newline, "é" (which is in the alphabet) the byte 0xE9 and no é."""
    assert "ĠaĊé".translate(byte_letters()).encode("latin-1") == b" a\n\xe9"
    assert len(byte_letters()) == 2 * (256 - 188)  # 188 letters stand for themselves


def test_an_added_word_is_written_as_it_is():
    backend = train_bpe(["a b"] * 9, vocab_size=300)
    backend.add_tokens([AddedToken("所以 ok", normalized=False)])
    tokenizer = Tokenizer(backend)
    [word] = tokenizer.encode("所以 ok")
    assert tokenizer.bytes_of[word] == "所以 ok".encode()


def test_the_vocabulary_of_a_gguf_file():
    tokenizer = from_gguf()
    assert b"".join(tokenizer.bytes_of[i] for i in tokenizer.encode(TEXT)) == TEXT.encode()


@pytest.mark.parametrize("kind", ["prepended", "metaspace", "unigram"])
def test_sentencepiece_letters_bytes_and_blanks(kind: str):
    tokenizer = Tokenizer(unigram(byte_fallback=True) if kind == "unigram" else llama2(kind))
    assert tokenizer.bytes_of[tokenizer.token_id("</s>")] == b""
    assert b"".join(tokenizer.bytes_of[i] for i in tokenizer.encode_after(TEXT)).lstrip() == TEXT.encode()
    the, sea = tokenizer.encode("the sea")
    assert (tokenizer.bytes_of[the], tokenizer.bytes_of[sea]) == (b" the", b" sea")  # as after other text


def test_word_pieces_are_written_as_they_follow_a_word():
    vocabulary = {"[UNK]": 0, "sea": 1, "##s": 2, ",": 3, "the": 4}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    assert Tokenizer(backend).bytes_of == [b" [UNK]", b" sea", b"s", b",", b" the"]


def test_every_id_of_the_deepseek_vocabulary_says_what_its_decoder_says():
    tokenizer = Tokenizer.load(v4_directory())
    whole = 0
    for i in range(0, tokenizer.vocab_size, 37):
        written = tokenizer.bytes_of[i]
        if i in tokenizer.control_ids:
            assert written == b""
            continue
        assert tokenizer.decode([i]) == written.decode(errors="replace")
        whole += b"\xef\xbf\xbd" not in tokenizer.decode([i]).encode()
    assert whole > 3000
    text = "所以 é 😀 \x00\n\t12345 <think>"
    assert b"".join(tokenizer.bytes_of[i] for i in tokenizer.encode(text)) == text.encode()
