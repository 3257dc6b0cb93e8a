"""Packed integers: by hand, as the compressed-tensors package packs and unpacks them, and through transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import TOLERANCE, our_logits, randomize, some_ids
from safetensors.torch import load_file, save_file
from small_models import random_prompts, small_model
from transformers import AutoModelForCausalLM, LlamaConfig

from abyssal.checkpoint.compressed_tensors import pack, packed_bytes
from abyssal.checkpoint.export_hf import export_hf
from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.save import save_checkpoint
from abyssal.checkpoint.source import open_checkpoint
from abyssal.kernels.quantize import QuantFormat, dequantize, quantize

helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
FORMATS: list[QuantFormat] = ["int8", "int4"]
LLAMA = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, rope_theta=10000.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In BF16, made by transformers; groups of 32 columns, since 96 have none of 64."""
    path = tmp_path_factory.mktemp("packed") / "llama"
    torch.manual_seed(0)
    model = randomize(AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA), dtype=torch.float32))
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def exported(llama: Path, out: Path, format: QuantFormat) -> Path:
    export_hf(open_checkpoint(llama), out, to=format)
    return out


def test_packing_by_hand():
    """Codes 7, -8, 0, 1 of four bits are f, 0, 8, 9 with 8 added; of eight bits 87, 78, 80, 81 with 80 added (hex)."""
    weight_OI = torch.tensor([[7.0, -7.5, 0.0, 1.0] + [0.0] * 12])
    packed = pack(quantize(weight_OI, "int4"))
    assert packed["_packed"].shape == (1, 2) and packed["_packed"][0, 0].item() & 0xFFFFFFFF == 0x8888980F
    assert packed["_scale"].dtype == torch.bfloat16 and packed["_shape"].tolist() == [1, 16]
    packed = pack(quantize(weight_OI * 17, "int8"))
    assert packed["_packed"].shape == (1, 4) and packed["_packed"][0, 0].item() & 0xFFFFFFFF == 0x918000F7


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(3, 16), (5, 96), (2, 256)])
def test_the_package_itself_unpacks_and_packs_the_same(format: QuantFormat, shape: tuple[int, int]):
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), format)
    packed = pack(weight)
    assert sum(tensor.nbytes for tensor in packed.values()) == packed_bytes(format, shape, weight.group)
    bits = {"int8": 8, "int4": 4}[format]
    codes = helpers.unpack_from_int32(packed["_packed"], bits, torch.Size(shape))
    assert torch.equal(helpers.pack_to_int32(codes, bits), packed["_packed"])
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=bits, strategy="group", group_size=weight.group)
    )
    state = {f"weight{part}": tensor for part, tensor in packed.items()}
    theirs = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(theirs, dequantize(weight, torch.bfloat16))


@pytest.mark.parametrize("format", FORMATS)
def test_the_package_rounds_to_the_same_codes(format: QuantFormat):
    """Its own scales are half the range too; given our BF16 ones, its codes are ours."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize as their_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight_OI = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    ours = quantize(weight_OI, format, group=64)
    args = QuantizationArgs(num_bits={"int8": 8, "int4": 4}[format], strategy="group", group_size=64)
    scale_OG, _ = calculate_qparams(weight_OI.amin(1, keepdim=True), weight_OI.amax(1, keepdim=True), args)
    assert torch.equal(scale_OG.bfloat16(), ours.scales)
    codes = their_quantize(weight_OI, ours.scales.float(), None, args, dtype=torch.int8)
    assert torch.equal(codes.float() * ours.scales.float(), dequantize(ours))


@pytest.mark.parametrize("to", ["fp8", "int8", "int4"])
def test_transformers_reads_latent_attention_and_experts_from_few_bits(to: QuantFormat, tmp_path: Path):
    """DeepSeek-V3's shape, without the MTP layer, which transformers leaves out."""
    from transformers import CompressedTensorsConfig, FineGrainedFP8Config

    save_checkpoint(tmp_path / "base", small_model("mla_moe", moe_intermediate_size=32, kv_lora_rank=32), None)
    out = exported(tmp_path / "base", tmp_path / to, to)
    config = FineGrainedFP8Config(dequantize=True) if to == "fp8" else CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, quantization_config=config)
    theirs = theirs.float()  # some of what it was to load in FP32 is BF16 still
    # it rounds integers to the scales' BF16, and FP8 not at all
    ours = load_checkpoint(out, weights="fp8" if to == "fp8" else "compute").model
    ids_BT = torch.tensor(random_prompts([20, 20]))
    with torch.no_grad():
        want = theirs(ids_BT).logits
        torch.testing.assert_close(our_logits(ours, ids_BT), want, atol=TOLERANCE, rtol=0)
        before = our_logits(load_checkpoint(tmp_path / "base").model, ids_BT)
    assert (want - before).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dequantize_at", ["loading", "first use"])
def test_transformers_loads_it_and_gives_the_same_logits(
    dequantize_at: str, format: QuantFormat, llama: Path, tmp_path: Path
):
    from transformers import CompressedTensorsConfig

    out = exported(llama, tmp_path / format, format)
    options: dict[str, Any] = {}
    if dequantize_at == "loading":
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **options)
    # at loading they round to the scales' BF16, as we do where a matrix becomes numbers
    ours = load_checkpoint(out, weights="compute" if dequantize_at == "loading" else format).model
    with torch.no_grad():
        want = theirs(some_ids()).logits
        torch.testing.assert_close(our_logits(ours, some_ids()), want, atol=TOLERANCE, rtol=0)
        before = our_logits(load_checkpoint(llama).model, some_ids())
    assert (want - before).abs().max() > 100 * TOLERANCE  # the codes were read, not some numbers beside them


def refused(llama: Path, tmp_path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> str:
    """What opening says of an int4 export with something changed in its config or its tensors."""
    out = exported(llama, tmp_path / "int4", "int4")
    config, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    change(config["quantization_config"], tensors)
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors")
    with pytest.raises((ValueError, OSError)) as error:
        load_checkpoint(out)
    assert "\n" not in str(error.value)
    return str(error.value)


NAME = "model.layers.1.mlp.down_proj.weight"
FAULTS: dict[str, tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], Any], str]] = {
    "zero points": (lambda config, _: weights_of(config).update(symmetric=False), "symmetric=False, which is not"),
    "three bits": (lambda config, _: weights_of(config).update(num_bits=3), "num_bits=3, which is not supported"),
    "floats": (lambda config, _: weights_of(config).update(type="float"), "type='float'"),
    "activations": (
        lambda config, _: config["config_groups"]["group_0"].update(input_activations={"num_bits": 8}),
        "input_activations={'num_bits': 8}",
    ),
    "another format": (lambda config, _: config.update(format="nvfp4-pack-quantized"), "format='nvfp4-pack-quantized'"),
    "no groups": (lambda config, _: config.update(config_groups={}), "config_groups={}; copy it again"),
    "a scale is missing": (lambda _, t: t.pop(f"{NAME}_scale"), f"without a scale or a shape ({NAME})"),
    "a scale too many": (lambda _, t: t.update({"x.weight_scale": torch.ones(1)}), "without a symmetric packed weight"),
    "twice": (lambda _, t: t.update({NAME: torch.ones(1)}), "1 packed weights that are also there as numbers"),
    "wrong groups": (lambda _, t: t.update({f"{NAME}_scale": torch.ones(64, 5).bfloat16()}), "does not fit"),
    "bytes for words": (lambda _, t: t.update({f"{NAME}_packed": torch.ones(64, 12).to(torch.int8)}), "does not fit"),
    "too wide": (lambda _, t: t.update({f"{NAME}_packed": torch.ones(64, 24).int()}), "of wrong shape"),
    "another shape": (lambda _, t: t.update({f"{NAME}_shape": torch.tensor([64, 95])}), "has the shape (64, 95)"),
    "no number": (lambda _, t: t[f"{NAME}_scale"].fill_(float("nan")), "scales that are no numbers"),
}


def weights_of(config: dict[str, Any]) -> dict[str, Any]:
    return config["config_groups"]["group_0"]["weights"]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_one_line(fault: str, llama: Path, tmp_path: Path):
    change, said = FAULTS[fault]
    assert said in refused(llama, tmp_path, change)


def test_one_scale_a_row_is_a_group_as_wide_as_the_row(llama: Path, tmp_path: Path):
    """What others call "channel"."""
    out = exported(llama, tmp_path / "int8", "int8")
    config, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    weights_of(config["quantization_config"]).update(strategy="channel", group_size=None)
    for name in [name for name in tensors if name.endswith("_scale")]:
        tensors[name] = tensors[name][:, :1].contiguous()
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors")
    weight = open_checkpoint(out).read_quantized(NAME)
    assert weight is not None and weight.group == 96 and weight.scales.shape == (64, 1)
    codes = helpers.unpack_from_int32(tensors[f"{NAME}_packed"], 8, torch.Size((64, 96)))
    assert torch.equal(dequantize(weight), codes.float() * tensors[f"{NAME}_scale"].float())
