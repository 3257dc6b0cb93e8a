"""`abyssal export`: what it prints is what `abyssal perplexity` measures of what it wrote."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_models import small_model

from abyssal import cli
from abyssal.checkpoint.save import save_checkpoint
from abyssal.checkpoint.source import open_checkpoint
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer

TEXT = "one plus two is three, and three plus four is seven. "


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As a run leaves it: out/run/align/checkpoint, and a text beside."""
    tokenizer = Tokenizer(train_bpe([TEXT] * 20, vocab_size=300))
    path = tmp_path / "out" / "run" / "align" / "checkpoint"
    model = small_model("mla_moe_query_latent", vocab_size=tokenizer.vocab_size, q_lora_rank=32)
    save_checkpoint(path, model, tokenizer)
    (tmp_path / "text.txt").write_text(TEXT * 20)
    monkeypatch.chdir(tmp_path)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.dispatch(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("to", ["fp8", "int8", "int4"])
def test_perplexity_before_and_after_is_that_of_the_two_checkpoints(to: str, base: Path, capsys):
    text = ["--text", "text.txt", "--windows", "2", "--window", "32"]
    said = run(capsys, "export", "out/run/r1", "--to", to, "--out", "exported", "--dtype", "float32", *text)
    written, measured = said.splitlines()
    n_bytes = sum(tensor.nbytes for tensor in load_file("exported/model.safetensors").values())
    assert re.fullmatch(rf"exported: [\d.]+ MB of weights, 104 matrices in {to}", written)
    assert n_bytes / 1e6 == pytest.approx(float(written.split()[1]), abs=0.06)
    match = re.fullmatch(
        r"perplexity ([\d.]+) before, ([\d.]+) after \(([+-][\d.]+) %\), over 62 tokens of text.txt", measured
    )
    assert match, measured
    before = run(capsys, "perplexity", "out/run/r1", *text)
    after = run(capsys, "perplexity", "exported", "--weights", to, "--dtype", "float32", *text)
    assert before.startswith(f"perplexity {match[1]} ") and after.startswith(f"perplexity {match[2]} ")
    change = 100 * (float(match[2]) / float(match[1]) - 1)
    assert float(match[3]) == pytest.approx(change, abs=0.01) and change != 0


def test_activation_aware_scales_and_then_rounds(base: Path, capsys):
    options = ["--to", "int4", "--windows", "0", "--calibration", "text.txt"]
    said = run(capsys, "export", str(base), "--out", "plain", *options)
    assert said.endswith("perplexity not measured: 0 windows\n")
    run(capsys, "export", str(base), "--out", "scaled", "--activation-aware", *options)
    name = "model.layers.1.input_layernorm.weight"
    plain, scaled = (open_checkpoint(path) for path in ("plain", "scaled"))
    assert (plain.read(name) == 1).all() and (scaled.read(name) != 1).any()
    assert plain.tensors == scaled.tensors and plain.config == scaled.config


def test_bf16_says_its_size_and_no_more(base: Path, capsys):
    said = run(capsys, "export", str(base), "--to", "bf16", "--out", "copy")
    assert re.fullmatch(r"copy: [\d.]+ MB of weights\n", said)


def test_gguf_is_one_file_that_says_what_it_lost(base: Path, capsys):
    text = ["--text", "text.txt", "--windows", "2", "--window", "32"]
    said = run(capsys, "export", "out/run/r1", "--to", "gguf", "--quant", "Q8_0", "--out", "r1.gguf", *text)
    written, mtp, narrow, measured = said.splitlines()
    assert re.fullmatch(r"r1.gguf: [\d.]+ MB, Q8_0", written)
    assert mtp == "note: left out: 1 MTP layers, for which deepseek2 has no tensors"
    assert narrow.startswith("note: 11 tensors stay F16, among them blk.0.attn_k_b.weight")
    after = run(capsys, "perplexity", "r1.gguf", "--dtype", "auto", *text)
    assert f", {after.split()[1]} after" in measured
    said = run(capsys, "export", "r1.gguf", "--to", "gguf", "--out", "again.gguf")  # BF16, and nothing to measure
    assert re.fullmatch(r"again.gguf: [\d.]+ MB, BF16\n", said)
    assert open_checkpoint("again.gguf").config == open_checkpoint("r1.gguf").config


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "gguf"], "--out exported should be a file for gguf: exported.gguf"),
        (["--to", "bf16", "--quant", "Q8_0"], "--quant Q8_0 is a type of GGUF's; write --to gguf"),
        (["--to", "gguf", "--out", "m.gguf", "--quant", "Q3_K"], "--help lists what there is"),
        (["--to", "gguf", "--out", "m.gguf", "--activation-aware"], "for int8 and int4, not gguf"),
        (["--to", "gguf", "--out", "m.gguf", "--scale-format", "ue8m0"], "is for fp8, not gguf; leave it out"),
        (["--to", "fp8", "--activation-aware"], "--activation-aware is for int8 and int4, not fp8"),
        (["--to", "int3"], "--help lists what there is"),
        (["--to", "int4", "--shard-gb", "0"], "shard_gb=0.0 holds no tensor"),
        (["--to", "int4", "--windows", "-1"], "windows=-1 is less than none"),
    ],
)
def test_what_cannot_be_is_one_line(options: list[str], said: str, base: Path):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        cli.dispatch(["export", str(base), "--out", "exported", *options])
    assert "\n" not in str(error.value) and not Path("exported").exists()
