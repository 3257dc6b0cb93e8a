"""Rows times a matrix in four bits: by hand, and the kernel beside the codes written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abyssal.kernels.quantize import Quantized, quantize
from abyssal.kernels.quantized_matmul import (
    matmul_packed,
    matmul_packed_ref,
    matmul_quantized,
    pack_for_kernel,
    packs_for_kernel,
)

BF16 = torch.bfloat16
SHAPES = [(16, 32), (48, 192), (144, 256)]  # groups of 32, 64 and 128


def matrix(shape: tuple[int, int]) -> Quantized:
    return quantize(torch.randn(shape, generator=torch.Generator().manual_seed(1)), "int4")


def rows(n: int, columns: int) -> Tensor:
    return torch.randn(n, columns, generator=torch.Generator().manual_seed(2)).to(BF16)


def test_by_hand():
    """Row o is 3.75, whose code is cut off to 3.5, and then 31 times (o - 8) / 2; 32 ones times it is their sum."""
    weight_OI = ((torch.arange(16.0) - 8).clamp(min=-7) / 2)[:, None].expand(16, 32).clone()
    weight_OI[:, 0] = 3.75  # the largest: all scales are 1/2
    want = [3.5 + 31 * max(o - 8, -7) / 2 for o in range(16)]
    weight = quantize(weight_OI, "int4")
    for result in (
        matmul_packed(torch.ones(1, 32, dtype=BF16), pack_for_kernel(weight)),
        matmul_packed_ref(torch.ones(1, 32, dtype=BF16), weight),
        matmul_quantized(torch.ones(1, 32), weight),
    ):
        assert result[0].tolist() == [float(torch.tensor(number).to(result.dtype)) for number in want]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n_rows", [1, 3, 20])
def test_the_kernel_multiplies_the_numbers_of_its_codes(n_rows: int, shape: tuple[int, int]):
    """Both sum in FP32 and round once: at most the last bit of BF16 differs, where the sums fall about its middle."""
    weight, x_NI = matrix(shape), rows(n_rows, shape[1])
    got, want = matmul_packed(x_NI, pack_for_kernel(weight)), matmul_packed_ref(x_NI, weight)
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-4)
    assert (got != want).float().mean() < 0.05


def test_a_row_has_the_same_bits_in_any_company():
    weight = pack_for_kernel(matrix((144, 256)))
    x_NI = rows(70, 256)
    together = matmul_packed(x_NI, weight)
    for n in (1, 2, 5, 16, 33):
        assert torch.equal(matmul_packed(x_NI[:n], weight), together[:n])


@pytest.mark.parametrize(
    ("weight", "dtype", "taken"),
    [
        (matrix((16, 32)), BF16, True),
        (matrix((16, 32)), torch.float32, False),  # many times slower there
        (matrix((24, 32)), BF16, False),  # rows in sixteens
        (matrix((16, 48)), BF16, False),  # groups of 16
        (quantize(torch.ones(16, 32), "int8"), BF16, False),
    ],
)
def test_what_the_kernel_takes(weight: Quantized, dtype: torch.dtype, taken: bool):
    assert packs_for_kernel(weight, dtype=dtype) == taken
