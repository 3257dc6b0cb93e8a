"""`abyssal import --check`: all that can be known of a checkpoint without its weights, of 671B from an index alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_files import fp8_checkpoint
from gguf_files import converted, described, small_vocabulary, write_file
from official_configs import OFFICIAL
from safetensors.torch import load_file, save_file
from small_models import small_model

from abyssal.checkpoint.export_hf import export_hf
from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.save import save_checkpoint
from abyssal.checkpoint.shard_index import INDEX
from abyssal.checkpoint.source import open_checkpoint
from abyssal.checkpoint.survey import survey, survey_index
from abyssal.cli import dispatch, main
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
SCALED = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
SWIGLU = ("gate_proj", "up_proj", "down_proj")


def official_v3_names() -> list[str]:
    """Every tensor of DeepSeek-V3 as published: FP8 projections each with a scale, and layer 61 for MTP."""
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]

    def scaled(*linears: str) -> list[str]:
        return [f"{linear}.{kind}" for linear in linears for kind in ("weight", "weight_scale_inv")]

    for layer in range(62):
        prefix = f"model.layers.{layer}."
        names += [f"{prefix}{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm",
                                                        "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm")]
        names += scaled(*(f"{prefix}self_attn.{linear}" for linear in SCALED))
        if layer < 3:
            names += scaled(*(f"{prefix}mlp.{linear}" for linear in SWIGLU))
            continue
        names += [f"{prefix}mlp.gate.weight", f"{prefix}mlp.gate.e_score_correction_bias"]
        ffns = [f"{prefix}mlp.experts.{expert}." for expert in range(256)] + [f"{prefix}mlp.shared_experts."]
        names += scaled(*(f"{ffn}{linear}" for ffn in ffns for linear in SWIGLU))
    names += [f"model.layers.61.{name}.weight" for name in ("embed_tokens", "enorm", "hnorm", "eh_proj",
                                                            "shared_head.norm", "shared_head.head")]
    return names


def write_index(path: Path, names: list[str], config: dict[str, Any]) -> Path:
    shards = [f"model-{k:05d}-of-000163.safetensors" for k in range(1, 164)]
    weight_map = {name: shards[i * 163 // len(names)] for i, name in enumerate(names)}
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 688586727753}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(config))
    return index


@pytest.fixture(scope="module")
def v3_names() -> list[str]:
    return official_v3_names()


def test_the_671b_index_goes_through_on_a_laptop(
    v3_names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert len(v3_names) == 91_991  # as many as the published index has
    index = write_index(tmp_path, v3_names, OFFICIAL["v3"] | {"quantization_config": FP8})
    assert dispatch(["import", "--check", str(index)]) == 0
    said = capsys.readouterr().out
    for fact in (
        "deepseek_v3: MLA, moe", "61 layers (3 dense)", "8 of 256 experts and 1 shared", "vocabulary 129,280",
        "context 163,840: that of v3 and r1\n",
        "671,026,419,200, active 36,625,618,432, and 11,610,068,224 for MTP", "163 files", "70,272 bytes a token",
        "FP32 masters 2,730", "BF16 1,365", "fp8 68", "int4 367", "the names fit; shapes and types could not be",
    ):
        assert fact in said, (fact, said)


def test_one_missing_expert_of_671b_is_named(v3_names: list[str], tmp_path: Path):
    gone = "model.layers.60.mlp.experts.255.up_proj.weight"
    names = [name for name in v3_names if name != gone]
    names[names.index("model.layers.3.mlp.experts.0.up_proj.weight")] = "model.layers.3.mlp.experts.256.up_proj.weight"
    found = survey_index(write_index(tmp_path, names, OFFICIAL["v3"] | {"quantization_config": FP8}))
    assert found.faults["missing"] == ["model.layers.3.mlp.experts.0.up_proj.weight", gone]
    assert found.faults["unexpected"] == ["model.layers.3.mlp.experts.256.up_proj.weight"]
    assert found.faults["scales without an FP8 weight"] == [
        "model.layers.3.mlp.experts.0.up_proj.weight_scale_inv", f"{gone}_scale_inv"]


@pytest.fixture()
def checkpoint(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(train_bpe(["one two three"] * 20, vocab_size=300))
    model = small_model("mla_moe_query_latent", vocab_size=tokenizer.vocab_size)
    save_checkpoint(tmp_path / "base", model, tokenizer, max_shard_bytes=60_000)
    return tmp_path / "base"


def test_a_good_directory_says_what_it_is(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    found = survey(open_checkpoint(checkpoint))
    model = small_model("mla_moe_query_latent", vocab_size=found.config.vocab_size)
    files = list(checkpoint.glob("*.safetensors"))
    assert found.verdict == "" and found.kind == "deepseek_v3" and found.n_files == len(files) > 1
    assert found.n_bytes == sum(file.stat().st_size for file in files)
    main_and_mtp = sum(tensor.numel() for tensor in model.state_dict().values())
    assert found.n_parameters + found.n_mtp == main_and_mtp
    copies = 2 * found.config.vocab_size * 32  # MTP's embedding and head
    assert found.stored == {"BF16": main_and_mtp + copies - 3 * 8, "F32": 3 * 8}  # three routers' biases
    cast = small_model("mla_moe_query_latent", vocab_size=found.config.vocab_size, dtype=torch.bfloat16).cast_weights()
    assert found.memory["BF16"] == sum(tensor.nbytes for tensor in cast.state_dict().values())
    assert found.memory["FP32 masters"] == 4 * main_and_mtp
    for weights in ("fp8", "int8", "int4"):
        loaded = load_checkpoint(checkpoint, dtype="bfloat16", weights=weights).model
        n_bytes = sum(tensor.nbytes for tensor in loaded.state_dict().values())
        assert found.memory[weights] == n_bytes
    assert dispatch(["import", str(checkpoint), "--check"]) == 0
    said = capsys.readouterr().out
    assert "285 ids, a chat template" in said and said.endswith("it would load\n")


def test_packed_integers_are_one_tensor_each(checkpoint: Path, tmp_path: Path):
    export_hf(open_checkpoint(checkpoint), tmp_path / "int4", to="int4", max_shard_bytes=20_000)
    found, by_name = survey(open_checkpoint(tmp_path / "int4")), survey_index(tmp_path / "int4" / INDEX)
    assert found.verdict == by_name.verdict == "" and found.n_tensors == by_name.n_tensors
    assert found.memory == survey(open_checkpoint(checkpoint)).memory and set(found.stored) == {"BF16", "F32", "INT4"}
    index = tmp_path / "int4" / INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["model.layers.0.mlp.up_proj.weight_scale"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert survey_index(index).faults["missing"] == ["model.layers.0.mlp.up_proj.weight"]


def test_every_tensor_that_does_not_fit_has_a_line(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    weight_map = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    shard = checkpoint / weight_map["model.norm.weight"]
    save_file(load_file(shard) | {"model.norm.weight": torch.ones(33)}, shard)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"n_routed_experts": 12}))
    monkeypatch.setattr("sys.argv", ["abyssal", "import", "--check", str(checkpoint)])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert end.value.code == 1
    assert "missing: 36" in out and "    model.layers.2.mlp.experts.11.down_proj.weight\n" in out
    assert "    model.norm.weight (33,) instead of (32,)\n" in out and "would load" not in out
    assert err.count("\n") == 1 and "would not load: 36 missing (" in err and "and 26 more)" in err


def test_an_absent_mtp_layer_is_a_note(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    model = small_model(vocab_size=300)
    save_checkpoint(checkpoint, model, None)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    assert dispatch(["import", "--check", str(checkpoint)]) == 0
    out, err = capsys.readouterr()
    assert "note: " in out and "promises 1 MTP layers" in out and "none: it loads, but cannot be talked to" in out
    assert err == ""


def test_of_an_fp8_checkpoint_the_scales_are_read_and_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tensors = fp8_checkpoint(tmp_path / "fp8")
    weights = sum(tensor.numel() for tensor in tensors.values() if tensor.dtype == torch.float8_e4m3fn)
    assert dispatch(["import", "--check", str(tmp_path / "fp8")]) == 0
    assert f"F8_E4M3 {weights:,}" in capsys.readouterr().out
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"].view(torch.uint8).fill_(0xFF)  # NaN, but nobody looks
    save_file(tensors, tmp_path / "fp8" / "model.safetensors")
    assert dispatch(["import", "--check", str(tmp_path / "fp8")]) == 0
    tensors["model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"][1, 1] = torch.nan
    save_file(tensors, tmp_path / "fp8" / "model.safetensors")
    with pytest.raises(ValueError, match="experts.2.up_proj.weight_scale_inv has 1 scales that are no positive number"):
        dispatch(["import", "--check", str(tmp_path / "fp8")])


def test_what_is_imported_is_a_bf16_directory_with_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fp8_checkpoint(tmp_path / "fp8")
    assert dispatch(["import", str(tmp_path / "fp8"), "--out", str(tmp_path / "plain")]) == 0
    assert "bytes of weights in BF16" in capsys.readouterr().out
    before, after = open_checkpoint(tmp_path / "fp8"), open_checkpoint(tmp_path / "plain")
    assert before.config == after.config and before.tensors.keys() == after.tensors.keys()
    assert {info.stored for info in after.tensors.values()} == {"BF16", "F32"}
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)
    for arguments, said in ((["--check"], "--check writes nothing"), ([], "holds what is to be exported")):
        with pytest.raises(ValueError, match=said):
            dispatch(["import", str(tmp_path / "plain"), "--out", str(tmp_path / "plain"), *arguments])
    index = write_index(tmp_path, list(before.tensors), json.loads((tmp_path / "fp8" / "config.json").read_text()))
    with pytest.raises(ValueError, match="has no weights to write"):
        dispatch(["import", str(index), "--out", str(tmp_path / "third")])
    assert not (tmp_path / "third").exists()


def test_a_gguf_file_goes_through_the_same_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = small_model("gqa_dense", vocab_size=262, qkv_bias=False, head_dim=8)
    tensors, words = converted(model, "llama"), described(model, "llama") | small_vocabulary()
    file = write_file(tmp_path / "m.gguf", "llama", words, tensors)
    assert dispatch(["import", "--check", str(file)]) == 0
    said = capsys.readouterr().out
    assert "llama: GQA, dense" in said and "262 ids, a chat template" in said and "F32 " in said and "1 files" in said
    gone = tensors.pop("blk.2.ffn_up.weight")
    write_file(file, "llama", words, tensors | {"blk.2.ffn_gate.weight": gone[:40]})
    with pytest.raises(ValueError, match=r"not load: 1 missing \(model.layers.2.mlp.up_proj.weight\); 1 of wrong"):
        dispatch(["import", "--check", str(file)])


def test_an_index_beside_a_broken_config_is_one_line(tmp_path: Path):
    index = write_index(tmp_path, ["model.norm.weight"] * 200, OFFICIAL["v3"] | {"rope_scaling": 5})
    with pytest.raises(ValueError, match="config.json.* of the wrong type"):
        dispatch(["import", "--check", str(index)])


@pytest.mark.parametrize(("argument", "said"), [
    ("nowhere", "is no checkpoint"), ("model.bin", "run code"), ("x.safetensors.index.json", "has no config.json")])
def test_what_is_no_checkpoint_is_one_line(argument: str, said: str, tmp_path: Path):
    (tmp_path / "model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises((ValueError, OSError), match=said):
        dispatch(["import", "--check", str(tmp_path / argument)])
