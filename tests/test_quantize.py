"""Weights in few bits: numbers a reader can check by hand, the plain twins, and errors within half a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abyssal.kernels.quantize import (
    Quantized,
    dequantize,
    dequantize_ref,
    group_of,
    pack_int4,
    quantize,
    quantize_ref,
    unpack_int4,
)

# ragged last blocks both ways, a ragged group, an odd number of columns, less than one block
SHAPES = [(128, 256), (130, 200), (65, 129), (3, 7), (1, 1)]


def some_weights(shape: tuple[int, int], *, seed: int = 0) -> Tensor:
    """Magnitudes over six decades, and zeros in the first block's first rows."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-5, 2, shape, generator=generator)
    weight[:2] = 0.0
    return weight


def same(a: Quantized, b: Quantized) -> bool:
    return (
        torch.equal(a.codes.view(torch.uint8), b.codes.view(torch.uint8))
        and torch.equal(a.scales, b.scales)
        and (a.format, a.shape, a.group) == (b.format, b.shape, b.group)
    )


def test_int8_by_hand():
    """127.5 is the largest, so the scale is 1; its own code would be 128 and is cut off at 127."""
    weight = quantize(torch.tensor([[127.5, -63.6, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]), "int8", group=4)
    assert weight.scales[0].tolist() == [1.0]
    assert weight.codes.tolist() == [[127, -64, 0, 0], [0, 0, 0, 0]]  # a half rounds to the even neighbour
    assert dequantize(weight).tolist() == [[127.0, -64.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_int4_by_hand():
    """Two groups of two columns and a ragged one: scales 1, 2 and 0.5."""
    weight = quantize(torch.tensor([[7.5, -3.4, 14.0, -15.0, 3.75]]), "int4", group=2)
    assert weight.scales.tolist() == [[1.0, 2.0, 0.5]]
    # codes 7, -3, 7, -8, 7 with 8 added: f, 5, f, 0, f; the even column is the low half of its byte
    assert [f"{byte:02x}" for byte in weight.codes[0, :2].tolist()] == ["5f", "0f"]
    assert int(weight.codes[0, 2]) & 15 == 15
    assert dequantize(weight).tolist() == [[7.0, -3.0, 14.0, -16.0, 3.5]]


def test_what_matters_little_may_be_cut_off():
    """15 alone decides the usual scale, 2, at which 5 becomes 4. At 1.65 it is 3 steps, and 15 is cut off at 7."""
    weight_OI = torch.tensor([[15.0, 5.0, 5.0, 5.0]])
    assert dequantize(quantize(weight_OI, "int4", group=4)).tolist() == [[14.0, 4.0, 4.0, 4.0]]
    loud_first = quantize(weight_OI, "int4", group=4, importance_I=torch.tensor([9.0, 0.1, 0.1, 0.1]))
    assert abs(dequantize(loud_first)[0, 0] - 15) <= 1
    quiet_first = quantize(weight_OI, "int4", group=4, importance_I=torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert (dequantize(quiet_first)[0, 1:] - 5).abs().max() < 0.1 < 1 < 15 - dequantize(quiet_first)[0, 0]


def test_fp8_by_hand():
    """896 is the largest of its block, so the scale is 2. 1/2 and 3/2 are FP8 numbers; 17.3/2 = 8.65 rounds to 9."""
    weight = quantize(torch.tensor([[896.0, 1.0, -3.0, 17.3]]), "fp8")
    assert weight.scales.tolist() == [[2.0]]
    assert weight.codes.float().tolist() == [[448.0, 0.5, -1.5, 9.0]]  # 8 to 16 in steps of 1
    assert dequantize(weight).tolist() == [[896.0, 1.0, -3.0, 18.0]]


@pytest.mark.parametrize(("amax", "scale"), [(448.0, 1.0), (449.0, 2.0), (896.0, 2.0), (224.5, 1.0), (224.0, 0.5)])
def test_ue8m0_scales_are_rounded_up_to_a_power_of_two(amax: float, scale: float):
    assert quantize(torch.tensor([[amax]]), "fp8", scale_format="ue8m0").scales.item() == scale


def test_a_scale_belongs_to_its_block_of_128_by_128():
    weight_OI = torch.zeros(129, 257)
    weight_OI[0, 0], weight_OI[127, 256], weight_OI[128, 128] = 448.0, 896.0, 44.8
    scales = quantize(weight_OI, "fp8").scales
    zeros = pytest.approx(1e-4 / 448)
    assert scales.tolist() == [[1.0, zeros, 2.0], [zeros, pytest.approx(0.1), zeros]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
def test_fast_and_plain_give_the_same_bits(format, shape: tuple[int, int]):
    weight_OI = some_weights(shape)
    importance_I = torch.rand(shape[1], generator=torch.Generator().manual_seed(3))
    for options in ({}, {"scale_format": "ue8m0"} if format == "fp8" else {"group": 32, "importance_I": importance_I}):
        weight = quantize(weight_OI, format, **options)
        assert same(weight, quantize_ref(weight_OI, format, **options))
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(dequantize(weight, dtype), dequantize_ref(weight, dtype))


@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
def test_errors_are_within_half_a_step(format):
    """In FP64. Half a step is half a scale for integers; for FP8 a sixteenth of the number, or of the least normal."""
    weight_OI = some_weights((130, 200), seed=1)
    weight = quantize(weight_OI, format, group=128)
    rows, columns = weight.shape
    high = 128 if format == "fp8" else 1
    scales = weight.scales.double().repeat_interleave(high, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    error = (weight_OI.double() - dequantize(weight).double()).abs()
    if format == "fp8":
        half_step = torch.maximum(weight_OI.double().abs() / 16, scales * 2.0**-10)
    else:
        cut_off = {"int8": 127.5, "int4": 7.5}[format] / 256  # a scale, being BF16, may be a 256th too small
        half_step = scales * (0.5 + cut_off)
    assert (error <= half_step * (1 + 1e-6)).all()
    assert error.max() > 0


def test_every_fp8_code_comes_back_as_torch_reads_it():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = codes[torch.isfinite(codes.float())].view(2, 127)
    weight = Quantized(format="fp8", codes=finite, scales=torch.tensor([[0.3]]), shape=(2, 127))
    assert torch.equal(dequantize(weight), finite.float() * 0.3)
    poisoned = Quantized(format="fp8", codes=codes.view(2, 128), scales=torch.tensor([[0.3]]), shape=(2, 128))
    assert dequantize(poisoned).isnan().sum() == 2  # never a number instead


def test_packing_two_in_a_byte_is_lossless_for_all_sixteen_codes():
    codes = torch.arange(-8, 8, dtype=torch.int8)[None].repeat(2, 1)
    for columns in (16, 15):
        assert torch.equal(unpack_int4(pack_int4(codes[:, :columns]), columns), codes[:, :columns])


@pytest.mark.parametrize(
    ("columns", "group"),
    [((7168, 512), 128), ((576, 1536), 64), ((128, 96), 32), ((48, 100), 16), ((100,), 128), ((), 128)],
)
def test_one_size_of_groups_divides_the_columns_of_a_whole_model(columns: tuple[int, ...], group: int):
    assert group_of("int4", *columns) == group and group_of("fp8", *columns) == 128
    for n in columns:
        assert quantize(torch.ones(1, n), "int8").scales.shape == (1, -(-n // group_of("int8", n)))
