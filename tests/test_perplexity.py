"""Perplexity: by hand, as transformers' loss has it, and as the command prints it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import VOCAB, randomize, some_ids
from small_models import small_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from abyssal import cli
from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.save import save_checkpoint
from abyssal.evals.perplexity import calibration_text, cut_windows, held_out_text, perplexity
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer

TEXT = "one plus two is three, and three plus four is seven. "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe([TEXT] * 20, vocab_size=300))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    path = tmp_path_factory.mktemp("measured") / "base"
    model = small_model("mla_moe_query_latent", vocab_size=tokenizer.vocab_size, max_position_embeddings=32)
    save_checkpoint(path, model, tokenizer)
    return path


class Guesser(torch.nn.Module):
    """Gives the next even id probability 1/2 and the others the rest, whatever came before."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(4, 1)

    def inference_copy(self) -> Guesser:
        return self

    def hidden(self, ids_BT: Tensor) -> Tensor:
        return ids_BT

    def logits(self, ids_BT: Tensor) -> Tensor:
        return torch.tensor([0.5, 0.125, 0.25, 0.125]).log().expand(*ids_BT.shape, 4)


def test_by_hand():
    """Ids 0, 2 and 1 were given 1/2, 1/4 and 1/8: -log2 p is 1, 2 and 3. The first of a window is not foreseen."""
    found = perplexity(Guesser(), torch.tensor([[3, 0, 2, 1], [3, 2, 2, 2]]))  # type: ignore[arg-type]
    assert found.n_tokens == 6 and found.loss == pytest.approx((1 + 2 + 3 + 2 + 2 + 2) / 6 * math.log(2))
    assert found.perplexity == pytest.approx(4.0)


def test_it_is_transformers_loss_in_fp32(tmp_path: Path):
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    theirs = randomize(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    theirs.save_pretrained(tmp_path)
    windows_WT = some_ids(batch=5, length=24)
    with torch.no_grad():
        losses = [float(theirs(ids_T[None], labels=ids_T[None]).loss) for ids_T in windows_WT]
    found = perplexity(load_checkpoint(tmp_path).model, windows_WT)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5) and found.perplexity > 50


def test_windows_are_the_texts_beginning_and_the_rest_is_left_out(tokenizer: Tokenizer):
    ids = tokenizer.encode(TEXT * 5)
    windows_WT = cut_windows(TEXT * 5, tokenizer, length=10, most=99)
    assert windows_WT.flatten().tolist() == ids[: len(ids) // 10 * 10] and len(ids) % 10
    assert torch.equal(cut_windows(TEXT * 5, tokenizer, length=10, most=2), windows_WT[:2])
    # a model that always began with the begin token does so in every window
    official = tokenizer.with_control([], add_bos_token=True)  # type: ignore[arg-type]
    windows_WT = cut_windows(TEXT * 5, official, length=11, most=99)
    assert windows_WT[:, 0].tolist() == [official.bos_id] * len(windows_WT)
    assert windows_WT[:, 1:].flatten().tolist() == ids[: len(ids) // 10 * 10]


def test_too_little_text_says_so(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="a text of 1 tokens fills no window of 16; use shorter ones or more text"):
        cut_windows("one", tokenizer, length=16, most=4)
    with pytest.raises(ValueError, match="windows of 1 tokens foresee nothing"):
        cut_windows(TEXT, tokenizer, length=1, most=4)


def test_the_text_that_comes_with_python():
    text = held_out_text()
    assert len(text) > 300_000 and "The \"for\" statement is used to iterate over the elements" in text
    assert len(calibration_text()) > 20_000 and calibration_text() not in text


@pytest.mark.parametrize("how", [[], ["--weights", "int4"], ["--dtype", "bfloat16"]])
def test_the_command_prints_it(how: list[str], checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path, capsys):
    (tmp_path / "text.txt").write_text(TEXT * 20)
    options = ["--text", str(tmp_path / "text.txt"), "--windows", "3", "--window", "500", *how]
    assert cli.dispatch(["perplexity", str(checkpoint), *options]) == 0
    said = capsys.readouterr().out
    windows_WT = cut_windows(TEXT * 20, tokenizer, length=32, most=3)  # the context is 32
    model = load_checkpoint(checkpoint).model
    with torch.no_grad():
        logits = model.logits(model.hidden(windows_WT))
    exact = float(F.cross_entropy(logits[:, :-1].flatten(0, 1), windows_WT[:, 1:].flatten()).exp())
    pattern = r"perplexity ([\d.]+) \(loss ([\d.]+)\) over 93 tokens in 3 windows of 32, \S+text.txt; [\d,]+ tokens/s\n"
    match = re.fullmatch(pattern, said)
    assert match, said
    assert float(match[1]) == pytest.approx(exact, rel=0.3 if how else 1e-5)
    assert float(match[1]) == pytest.approx(math.exp(float(match[2])), rel=1e-4)


def test_weights_that_are_no_numbers_are_an_error(checkpoint: Path, tokenizer: Tokenizer):
    model = load_checkpoint(checkpoint).model.requires_grad_(False)
    model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is no number"):
        perplexity(model, cut_windows(TEXT, tokenizer, length=8, most=1))
