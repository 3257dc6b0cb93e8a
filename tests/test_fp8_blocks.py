"""DeepSeek's FP8 layout, read: codes times scales, against float64, and every way in which the two can part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_files import QUANTIZATION, change_config, fp8_checkpoint
from safetensors.torch import load_file, save_file

from abyssal.checkpoint.hf_directory import HfDirectory
from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.save import save_checkpoint
from abyssal.kernels.quantize import dequantize_ref

KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def in_float64(codes_OI: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """number = code x scale, one number after the other's block, in float64."""
    out_OI = codes_OI.double()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            out_OI[128 * i : 128 * i + 128, 128 * j : 128 * j + 128] *= scales[i, j].double()
    return out_OI


@pytest.mark.parametrize("powers_of_two", [False, True], ids=["F32", "F8_E8M0"])
def test_every_number_equals_float64_rounded_once(powers_of_two: bool, tmp_path: Path):
    tensors = fp8_checkpoint(tmp_path / "fp8", powers_of_two=powers_of_two)
    source = HfDirectory(tmp_path / "fp8")
    scaled = [name for name in tensors if f"{name}_scale_inv" in tensors]
    assert source.tensors[KV_A] == ((160, 200), "F8_E4M3") and not any("scale" in name for name in source.tensors)
    assert len(scaled) == 3 * 5 + 3 + 2 * (4 + 1) * 3  # attention of three blocks, one dense layer, experts of two
    for name in scaled:
        exact = in_float64(tensors[name], tensors[f"{name}_scale_inv"].float())
        ours = source.read(name)
        # one rounding to FP32 of an 8-bit code times a 24-bit scale, one to BF16
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, exact.float().bfloat16())
        assert ((ours.double() - exact).abs() <= 2.0**-8 * exact.abs()).all()
        kept = source.read_quantized(name)
        assert kept is not None and kept.format == "fp8" and kept.scales.dtype == torch.float32
        assert torch.equal(dequantize_ref(kept), exact.float())
        assert torch.equal(kept.codes.view(torch.uint8), tensors[name].view(torch.uint8))
    assert source.read_quantized("model.embed_tokens.weight") is None


def test_an_fp8_checkpoint_loads_as_its_dequantised_twin_with_its_mtp_layer(tmp_path: Path):
    tensors = fp8_checkpoint(tmp_path / "fp8")
    loaded = load_checkpoint(tmp_path / "fp8", dtype="bfloat16")
    plain = {
        name: in_float64(tensor, tensors[f"{name}_scale_inv"]).float().bfloat16()
        if f"{name}_scale_inv" in tensors else tensor
        for name, tensor in tensors.items() if not name.endswith("_scale_inv")
    }
    save_checkpoint(tmp_path / "bf16", loaded.model, None)
    twin = load_file(tmp_path / "bf16" / "model.safetensors")
    assert len(loaded.model.mtp) == 1 and twin.keys() == plain.keys()
    assert all(torch.equal(twin[name], plain[name]) for name in plain)


Tensors = dict[str, torch.Tensor]
FAULTS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (lambda t: t.pop(f"{KV_A}_scale_inv"), f"1 FP8 weights without a scale ({KV_A})"),
    "surplus": (lambda t: t.update({UP: t[UP].bfloat16()}), f"1 scales without an FP8 weight ({UP}_scale_inv)"),
    "stray": (lambda t: t.update({"x.weight_scale_inv": torch.ones(1, 1)}), "an FP8 weight (x.weight_scale_inv"),
    "shape": (lambda t: t.update({f"{KV_A}_scale_inv": torch.ones(1, 2)}), "(1, 2) instead of (2, 2)"),
    "flat": (lambda t: t.update({f"{KV_A}_scale_inv": torch.ones(4)}), "(4,) instead of (2, 2)"),
    "type": (lambda t: t.update({f"{KV_A}_scale_inv": torch.ones(2, 2).int()}), "I32 instead of F32"),
    "norm": (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)}),
             "FP8 weights where none is allowed (model.norm.weight)"),
    "router": (lambda t: t.update({"model.layers.1.mlp.gate.weight": torch.ones(4, 200).to(torch.float8_e4m3fn),
                                   "model.layers.1.mlp.gate.weight_scale_inv": torch.ones(1, 2)}),
               "where none is allowed (model.layers.1.mlp.gate.weight)"),
    "e5m2": (lambda t: t.update({UP: t[UP].float().to(torch.float8_e5m2)}), "scales without an FP8 weight"),
    **{f"{value} in a scale": (lambda t, value=value: t[f"{KV_A}_scale_inv"].view(-1)[2:3].fill_(value),
                               f"{KV_A}_scale_inv has 1 scales that are no positive number, the first {value:g}")
       for value in (float("nan"), float("inf"), 0.0, -0.5, 1e37)},
    "NaN in the codes": (lambda t: t[UP].view(torch.uint8)[5, 5:7].fill_(0xFF), f"{UP} has 2 codes that are NaN"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], bytes]:
    path = tmp_path_factory.mktemp("good") / "fp8"
    return fp8_checkpoint(path), (path / "config.json").read_bytes()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_scales_is_named(fault: str, good: tuple[dict[str, torch.Tensor], bytes], tmp_path: Path):
    change, said = FAULTS[fault]
    tensors = {name: tensor.clone() for name, tensor in good[0].items()}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(good[1])
    with pytest.raises(ValueError) as error:
        load_checkpoint(tmp_path)
    text = str(error.value)
    assert said in text and str(tmp_path) in text and "again" in text and text.isprintable(), text


def test_scales_are_checked_without_the_weights(tmp_path: Path):
    tensors = fp8_checkpoint(tmp_path / "fp8", powers_of_two=True)
    HfDirectory(tmp_path / "fp8").check_scales()
    tensors[f"{UP}_scale_inv"].view(torch.uint8)[0, 0] = 0xFF  # the one NaN that E8M0 has
    save_file(tensors, tmp_path / "fp8" / "model.safetensors")
    with pytest.raises(ValueError, match="up_proj.weight_scale_inv has 1 scales"):
        HfDirectory(tmp_path / "fp8").check_scales()


@pytest.mark.parametrize(("change", "said"), [
    (None, "has no quantization_config"), (QUANTIZATION | {"quant_method": "gptq"}, "quant_method='gptq'"),
    (QUANTIZATION | {"weight_block_size": [64, 64]}, "weight_block_size=[64, 64]"),
    (QUANTIZATION | {"activation_scheme": "static"}, "activation_scheme='static'"),
    (QUANTIZATION | {"fmt": "e5m2"}, "fmt='e5m2'"), (QUANTIZATION | {"scale_fmt": "e3m0"}, "scale_fmt='e3m0'")])
def test_another_quantisation_is_refused_by_name(change: Any, said: str, tmp_path: Path):
    fp8_checkpoint(tmp_path / "fp8")
    change_config(tmp_path / "fp8", quantization_config=change)
    with pytest.raises(ValueError) as error:
        load_checkpoint(tmp_path / "fp8")
    assert said in str(error.value) and "\n" not in str(error.value)
