"""`abyssal convert` from a directory to directories, and everything a user can get wrong with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from small_models import small_model

from abyssal import cli
from abyssal.checkpoint.convert import model_type
from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.save import save_checkpoint
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer

WORDS = "one plus two is three and three plus four is seven so seven minus two is five".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gqa/, mla/ and no_tokenizer/ to convert, text/ to heal on and other.txt to measure on."""
    home = tmp_path_factory.mktemp("home")
    (home / "text").mkdir()
    for i in range(12):
        text = " ".join(WORDS[(i * k + k // 3) % len(WORDS)] for k in range(80))
        (home / "text" / f"{i}.txt").write_text(text)
    (home / "other.txt").write_text(" ".join(WORDS[::-1] * 8))
    tokenizer = Tokenizer(train_bpe([" ".join(WORDS)] * 5, vocab_size=290))
    gqa = small_model("gqa_dense", vocab_size=tokenizer.vocab_size, qkv_bias=False, num_hidden_layers=2)
    with torch.no_grad():
        gqa.embed_tokens.weight += 0.3
    save_checkpoint(home / "gqa", gqa, tokenizer)
    save_checkpoint(home / "no_tokenizer", gqa, None)
    save_checkpoint(home / "mla", small_model("mla_dense", vocab_size=tokenizer.vocab_size), tokenizer)
    return home


def converted(home: Path, *arguments: object, source: str = "gqa") -> None:
    small = ("--text", home / "text", "--held-out", home / "other.txt", "--row-len", 32, "--calibration-tokens", 256)
    cli.dispatch(["convert", str(home / source), *map(str, small), *map(str, arguments)])


def table(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()[1:]]


def test_exact(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    converted(home, "--to", "mla", "--out", tmp_path / "out")
    before, after = table(capsys)
    assert before[0] == "llama" and after[:3] == ["abyssal_mla_dense,", "exact", "16"]
    assert before[-1] == after[-1] and before[4] == after[5] == "128"  # perplexity; 2 layers x 32 numbers x 2 bytes
    ids_BT = torch.arange(40).view(2, 20)
    a, b = (load_checkpoint(path).model for path in (home / "gqa", tmp_path / "out"))
    torch.testing.assert_close(b.logits(b.hidden(ids_BT)), a.logits(a.hidden(ids_BT)), atol=1e-5, rtol=0)


def test_several_widths_healed(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    healing = ("--heal-steps", "2,6", "--heal-rows", 2, "--heal-lr", 3e-3)
    converted(home, "--to", "mla", "--latent", "4,12", *healing, "--out", tmp_path / "out")
    rows = table(capsys)
    assert [(row[0], row[1], row[3]) for row in rows] == [
        ("llama", "-", "0"), *[("deepseek_v3", latent, n) for latent in ("4", "12") for n in ("0", "2", "6")],
    ]  # fmt: skip
    assert [row[4] for row in rows[1::3]] == ["48", "80"]  # bytes: 2 layers x (latent + 8) x 2
    for at in (1, 4):
        raw, healed = float(rows[at][-1]), float(rows[at + 2][-1])
        assert healed < raw
    for latent in (4, 12):
        config = load_checkpoint(tmp_path / "out" / f"latent-{latent}").config
        assert model_type(config) == "deepseek_v3" and config.kv_lora_rank == latent


def test_experts_exact_and_with_latent_attention(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    converted(home, "--to", "moe", "--experts", 5, "--active", 5)
    before, after = table(capsys)
    assert after[:5] == ["abyssal_gqa_moe,", "exact", "-", "1+5/5", "0"] and before[-1] == after[-1]
    assert after[-2] == f"{int(before[-2].replace(',', '')) + 2 * 5 * 33:,}"  # a router and its bias in each layer
    split = ("--experts", 6, "--shared", 2, "--active", 3)
    converted(home, "--to", "mla,moe", "--latent", 12, *split, "--out", tmp_path / "out", "--heal-steps", 4)
    _, raw, healed = table(capsys)
    assert raw[:4] == ["deepseek_v3", "12", "2+3/6", "0"] and float(healed[-1]) < float(raw[-1])
    config = load_checkpoint(tmp_path / "out").config
    assert model_type(config) == "deepseek_v3" and config.n_routed_experts == 6


def test_text_that_is_used_again_is_said_to_be(home: Path, capsys: pytest.CaptureFixture[str]):
    converted(home, "--to", "mla", "--heal-steps", 3, "--heal-rows", 40)
    said = capsys.readouterr()
    n_rows = int(said.err.split(" rows of 32")[0].split()[-1])
    assert "healing uses each more than once" in said.err and 8 < n_rows < 128
    assert "abyssal_mla_dense, exact" in said.out.splitlines()[-1]


@pytest.mark.parametrize("source, arguments, says", [
    ("mla", ["--to", "mla"], "latent attention already"),
    ("gqa", ["--to", "gqa"], "--to gqa is no shape"),
    ("gqa", ["--to", "mla", "--latent", "26"], "use 2 to 25"),
    ("gqa", ["--to", "moe", "--latent", "8"], "add mla to --to"),
    ("gqa", ["--to", "mla", "--experts", "8"], "add moe to --to"),
    ("gqa", ["--to", "moe"], "give --experts 2 or more"),
    ("gqa", ["--to", "mla,moe", "--experts", "6", "--active", "2"], "do not divide"),
    ("gqa", ["--to", "mla", "--latent", "a,b"], "--latent a,b is no list"),
    ("gqa", ["--to", "mla", "--heal-steps", "50,20"], "write them in order"),
    ("gqa", ["--to", "mla", "--windows", "0"], "--windows 0 is less than one"),
    ("gqa", ["--to", "mla", "--text", "nowhere"], "corpus nowhere does not exist"),
    ("gqa", ["--to", "mla", "--held-out", "nowhere.txt"], "nowhere.txt"),
    ("gqa", ["--to", "mla", "--row-len", "65"], "longer than the model's max_position_embeddings=64"),
    ("gqa", ["--to", "mla", "--out", "text"], "text exists and is no checkpoint"),
    ("no_tokenizer", ["--to", "mla"], "no tokenizer.json"),
])  # fmt: skip
def test_what_a_user_gets_wrong_is_one_line(
    home: Path, source: str, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    given = ["abyssal", "convert", str(home / source), "--text", str(home / "text"), "--row-len", "32", *arguments]
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.count("\n") == 1 and says in said, said
