"""Exports: what is read back is what was rounded, bit by bit; what other tools read is the same model."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import random_prompts, small_model
from torch import Tensor

from abyssal.checkpoint import shards
from abyssal.checkpoint.export_hf import ExportFormat, export_hf
from abyssal.checkpoint.gguf_write import write_gguf
from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.save import save_checkpoint
from abyssal.checkpoint.source import open_checkpoint
from abyssal.checkpoint.tensor_names import IN_FEW_BITS
from abyssal.kernels.quantize import QuantFormat, are_powers_of_two, dequantize_ref, quantize_ref
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer

MTP = "mla_moe_query_latent"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLA, experts and an MTP layer, with a tokenizer and its defaults."""
    tokenizer = Tokenizer(train_bpe(["one plus two is three"] * 20, vocab_size=300))
    path = tmp_path_factory.mktemp("export") / "base"
    model = small_model(MTP, vocab_size=tokenizer.vocab_size, q_lora_rank=32)
    model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.randn(8) / 100)
    save_checkpoint(path, model, tokenizer, generation={"temperature": 0.6})
    return path


def export(base: Path, out: Path, to: ExportFormat, **options: Any) -> Path:
    export_hf(open_checkpoint(base), out, to=to, **options)
    return out


def tensors(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_bf16_is_bitwise_and_in_shards(base: Path, tmp_path: Path):
    out = export(base, tmp_path / "bf16", "bf16", max_shard_bytes=40_000)
    files = {file.name: file.stat().st_size for file in out.glob("*.safetensors")}
    assert len(files) > 2 and max(files.values()) < 60_000
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    before, after = tensors(base), tensors(out)
    assert before.keys() == after.keys() == index["weight_map"].keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name])
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes(), name


@pytest.mark.parametrize("to", ["fp8", "int8", "int4"])
def test_few_bits_come_back_as_they_were_rounded(to: QuantFormat, base: Path, tmp_path: Path):
    """Into shards, back through the reader, against the plain twins; all else is the BF16 of before."""
    out = export(base, tmp_path / to, to, max_shard_bytes=20_000)
    source, before = open_checkpoint(out), open_checkpoint(base)
    assert source.config == before.config and source.tensors.keys() == before.tensors.keys()
    n_rounded = 0
    for name in before.tensors:
        stored, plain = source.read_quantized(name), before.read(name)
        assert (stored is not None) == bool(IN_FEW_BITS.search(name)), name
        if stored is None:
            assert torch.equal(source.read(name), plain) and source.read(name).dtype == plain.dtype
            continue
        want = quantize_ref(plain, to, group=128 if to == "fp8" else 16)  # 16 columns are the fewest
        n_rounded += 1
        assert torch.equal(stored.codes.view(torch.uint8), want.codes.view(torch.uint8))
        assert torch.equal(stored.scales, want.scales) and (stored.shape, stored.group) == (want.shape, want.group)
        assert torch.equal(source.read(name), dequantize_ref(want, torch.bfloat16))
    assert n_rounded == 5 + 3 + 3 * (5 + 9 * 3)  # attention and dense; three layers of 8 experts and a shared one


def test_fp8_is_laid_out_as_deepseek_does(base: Path, tmp_path: Path):
    out = export(base, tmp_path / "fp8", "fp8")
    assert json.loads((out / "config.json").read_text())["quantization_config"] == {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    }  # fmt: skip
    types = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors(out).items()}
    assert types["model.layers.0.mlp.down_proj.weight"] == ("float8_e4m3fn", (32, 48))
    assert types["model.layers.0.mlp.down_proj.weight_scale_inv"] == ("float32", (1, 1))
    assert types["model.layers.3.mlp.experts.7.up_proj.weight_scale_inv"] == ("float32", (1, 1))  # of the MTP layer
    for name in ("eh_proj", "mlp.gate", "enorm", "shared_head.head", "embed_tokens", "self_attn.kv_a_layernorm"):
        assert types[f"model.layers.3.{name}.weight"][0] == "bfloat16"
    assert types["model.layers.1.mlp.gate.e_score_correction_bias"][0] == "float32"


def test_fp8_of_fp8_keeps_every_code_and_ue8m0_is_kept_or_made(base: Path, tmp_path: Path):
    first = export(base, tmp_path / "first", "fp8", scale_format="ue8m0")
    assert json.loads((first / "config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"
    scales = [tensor for name, tensor in tensors(first).items() if name.endswith("_scale_inv")]
    assert all(are_powers_of_two(scale) for scale in scales)
    again = export(first, tmp_path / "again", "fp8")
    assert (again / "config.json").read_bytes() == (first / "config.json").read_bytes()
    codes, same = tensors(first), tensors(again)
    for name, tensor in codes.items():
        assert torch.equal(tensor.view(torch.uint8), same[name].view(torch.uint8)), name
    # FP32 scales can't be called powers of two: they are made anew
    made = export(export(base, tmp_path / "fp32", "fp8"), tmp_path / "made", "fp8", scale_format="ue8m0")
    assert all(are_powers_of_two(t) for name, t in tensors(made).items() if name.endswith("_scale_inv"))


@pytest.mark.parametrize("to", ["fp8", "int8", "int4"])
def test_the_exported_model_is_the_one_that_loading_rounds(to: QuantFormat, base: Path, tmp_path: Path):
    out = export(base, tmp_path / to, to)
    ids_BT = torch.tensor(random_prompts([20, 20]))
    with torch.inference_mode():
        rounded, exported, plain = (
            model.logits(model.hidden(ids_BT))
            for model in (
                load_checkpoint(base, weights=to).model,
                load_checkpoint(out, weights=to).model,
                load_checkpoint(out, weights="compute").model,
            )
        )
    assert torch.equal(rounded, exported)
    # as plain numbers the weights are rounded once more, to BF16; a few tokens may be sent to another expert
    assert 0 < (plain - exported).abs().median() < 0.1 * exported.std()


def test_no_more_than_a_shard_is_in_memory(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, most = open_checkpoint(base), 20_000
    read, alive, seen = source.read, list[tuple[weakref.ref, int]](), list[int]()

    def watched(name: str) -> Tensor:
        tensor = read(name)
        alive.append((weakref.ref(tensor), tensor.nbytes))
        seen.append(sum(n_bytes for ref, n_bytes in alive if ref() is not None))
        return tensor

    monkeypatch.setattr(source, "read", watched)
    done: list[tuple[int, int]] = []
    export_hf(source, tmp_path / "out", to="bf16", max_shard_bytes=most, on_bytes=lambda *n: done.append(n))
    assert max(seen) <= 2 * most < done[-1][1] / 5  # a shard, and the tensor that did not fit into it
    assert done[-1][0] == done[-1][1] and len(done) == len(source.tensors)


def test_an_interrupted_export_leaves_what_was_there(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = export(base, tmp_path / "out", "bf16")
    before = tensors(out)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(base, out, "int4")
    assert tensors(out).keys() == before.keys() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_target_that_is_no_checkpoint_or_the_source_itself_is_left_alone(base: Path, tmp_path: Path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is no checkpoint"):
        export(base, tmp_path / "notes", "fp8")
    with pytest.raises(ValueError, match="holds what is to be exported; name another folder"):
        export(base, base, "fp8")


def test_tied_tables_and_columns_that_no_group_divides(tmp_path: Path):
    """40 columns of the feed-forward: those matrices stay BF16 for integers, FP8 has blocks for them."""
    save_checkpoint(tmp_path / "base", small_model("gqa_dense", intermediate_size=40), None)
    source = open_checkpoint(tmp_path / "base")
    done = export_hf(source, tmp_path / "int4", to="int4")
    assert done.kept == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)] and done.n_rounded == 3 * 6
    config = json.loads((tmp_path / "int4" / "config.json").read_text())
    assert "model.layers.2.mlp.down_proj" in config["quantization_config"]["ignore"]
    read = open_checkpoint(tmp_path / "int4")
    assert torch.equal(read.read(done.kept[0]), source.read(done.kept[0])) and "lm_head.weight" not in read.tensors
    assert read.tokenizer() is None and not export_hf(source, tmp_path / "fp8", to="fp8").kept


def test_a_foreign_grouping_is_not_rounded_a_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_checkpoint(tmp_path / "base", small_model("gqa_dense"), None)
    export(tmp_path / "base", tmp_path / "int4", "int4")
    monkeypatch.setattr("abyssal.checkpoint.export_hf.common_group", lambda tensors, format: 8)  # as others may choose
    with pytest.raises(ValueError, match="is in int4 already, in groups of 16; copy it"):
        export(tmp_path / "int4", tmp_path / "again", "int4")
    assert not (tmp_path / "again").exists()


def test_from_a_gguf_file_it_is_the_same_checkpoint(tmp_path: Path):
    """Dense, for a GGUF file holds no MTP layer; its tables and norms are BF16 and FP32."""
    tokenizer = Tokenizer(train_bpe(["one plus two is three"] * 20, vocab_size=300))
    save_checkpoint(tmp_path / "base", small_model("gqa_dense", vocab_size=tokenizer.vocab_size), tokenizer)
    write_gguf(open_checkpoint(tmp_path / "base"), tmp_path / "base.gguf", quant="BF16")
    export_hf(open_checkpoint(tmp_path / "base.gguf"), tmp_path / "from_gguf", to="int4")
    export_hf(open_checkpoint(tmp_path / "base"), tmp_path / "from_hf", to="int4")
    from_gguf, from_hf = (tensors(tmp_path / name) for name in ("from_gguf", "from_hf"))
    assert from_gguf.keys() == from_hf.keys()
    for name, tensor in from_hf.items():
        assert torch.equal(tensor, from_gguf[name]), name
    loaded = load_checkpoint(tmp_path / "from_gguf", weights="int4")
    assert loaded.tokenizer is not None and loaded.tokenizer.encode("one plus") == tokenizer.encode("one plus")
    assert loaded.tokenizer.eos_id == tokenizer.eos_id
