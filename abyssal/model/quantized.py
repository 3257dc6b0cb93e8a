"""Layers whose weights stay in few bits, for generating on small machines. No gradient, no way back to masters.

Which layers: every linear of a block, its experts too, as in DeepSeek's FP8 checkpoints; embedding, head, norms, router
and the MTP module's joining projection keep their type. An exception is MLA's kv_b_proj, rounded like the others but
kept as numbers: absorbed attention reads the matrix itself at every step, and it is a hundredth of a model.
Letters: N tokens, O rows out, I columns in, K chosen experts, X rows of one expert, F expert width, D width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abyssal.kernels.quantize import QuantFormat, Quantized
from abyssal.kernels.quantized_matmul import (
    PackedInt4,
    matmul_packed,
    matmul_quantized,
    pack_for_kernel,
    packs_for_kernel,
)
from abyssal.model.block import Block
from abyssal.model.linear import Linear, silu
from abyssal.model.moe import Experts, Routing

ROWS_IN_INVARIANT_MODE = 8  # FP32 products give a row the same bits only in multiples of these


class QuantizedStack(nn.Module):
    """E matrices of one shape in one format, to be multiplied with rows of `dtype`. Memory is taken when the first one
    comes, in the layout that it allows."""

    codes: Tensor | None
    scales: Tensor | None

    def __init__(self, n: int, shape: tuple[int, int], *, format: QuantFormat, dtype: torch.dtype) -> None:
        super().__init__()
        self.n, self.shape, self.format, self.dtype = n, shape, format, dtype
        self.group, self.packed = 0, False
        self.register_buffer("codes", None)
        self.register_buffer("scales", None)

    @property
    def n_weights(self) -> int:
        return self.n * self.shape[0] * self.shape[1]

    def put(self, index: int, weight: Quantized) -> None:
        assert (weight.format, weight.shape) == (self.format, self.shape), (weight.format, weight.shape)
        packed = packs_for_kernel(weight, dtype=self.dtype)
        codes, scales = pack_for_kernel(weight)[:2] if packed else (weight.codes, weight.scales)
        if self.codes is None or self.scales is None:
            self.group, self.packed = weight.group, packed
            self.codes = codes.new_empty(self.n, *codes.shape)
            self.scales = scales.new_empty(self.n, *scales.shape)
        if weight.group != self.group:
            raise ValueError(f"experts in groups of {weight.group} and of {self.group} columns; export the model again")
        self.codes[index], self.scales[index] = codes, scales

    def matmul(self, x_NI: Tensor, index: int) -> Tensor:
        """(N, I) -> (N, O) with the index-th matrix."""
        assert self.codes is not None and self.scales is not None, "no weights were put here"
        codes, scales = self.codes[index], self.scales[index]
        if self.packed:
            return matmul_packed(x_NI, PackedInt4(codes, scales, self.group))
        weight = Quantized(format=self.format, codes=codes, scales=scales, shape=self.shape, group=self.group)
        return matmul_quantized(x_NI, weight)


class QuantizedLinear(nn.Module):
    """In the place of a Linear."""

    def __init__(self, linear: Linear, *, format: QuantFormat) -> None:
        super().__init__()
        shape = (linear.out_features, linear.in_features)
        self.weight_stack = QuantizedStack(1, shape, format=format, dtype=linear.weight.dtype)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight_stack.matmul(x.reshape(-1, x.shape[-1]), 0).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class QuantizedExperts(nn.Module):
    """In the place of Experts. Only those that a batch uses are touched, one after the other."""

    invariant = False

    def __init__(self, experts: Experts, *, format: QuantFormat) -> None:
        super().__init__()
        n, dim, width = experts.down_proj.shape
        dtype = experts.down_proj.dtype
        self.gate_proj = QuantizedStack(n, (width, dim), format=format, dtype=dtype)
        self.up_proj = QuantizedStack(n, (width, dim), format=format, dtype=dtype)
        self.down_proj = QuantizedStack(n, (dim, width), format=format, dtype=dtype)

    def stacks(self) -> dict[str, QuantizedStack]:
        """By the names that one expert's matrices have."""
        return {"gate_proj": self.gate_proj, "up_proj": self.up_proj, "down_proj": self.down_proj}

    def forward(self, x_ND: Tensor, routing: Routing) -> Tensor:
        k = routing.experts_NK.shape[1]
        chosen_A, order_A = routing.experts_NK.flatten().sort(stable=True)  # A assignments, N x K
        experts, counts = torch.unique_consecutive(chosen_A, return_counts=True)
        y_AD = x_ND.new_empty(len(order_A), x_ND.shape[1])
        for expert, rows in zip(experts.tolist(), order_A.split(counts.tolist()), strict=True):
            y_AD[rows] = self._expert(x_ND[rows // k], expert)
        weighted_NKD = y_AD.unflatten(0, (-1, k)) * routing.weights_NK[..., None]  # weights are FP32: so is the sum
        total_ND = weighted_NKD[:, 0]
        for nth in range(1, k):  # in order: `sum` adds in another one with many threads
            total_ND = total_ND + weighted_NKD[:, nth]
        return total_ND.to(x_ND.dtype)

    def _expert(self, x_XD: Tensor, expert: int) -> Tensor:
        n_rows = len(x_XD)
        if self.invariant:
            x_XD = nn.functional.pad(x_XD, (0, 0, 0, -n_rows % ROWS_IN_INVARIANT_MODE))
        gate_XF, up_XF = self.gate_proj.matmul(x_XD, expert), self.up_proj.matmul(x_XD, expert)
        return self.down_proj.matmul(silu(gate_XF, invariant=self.invariant) * up_XF, expert)[:n_rows]


def quantize_layers(model: nn.Module, format: QuantFormat) -> None:
    """Put empty quantised layers in the place of those that are to be in few bits; their weights come by `put`."""
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        for name, module in list(block.named_modules()):
            parent, _, child = name.rpartition(".")
            if isinstance(module, Linear) and child != "kv_b_proj":
                setattr(block.get_submodule(parent), child, QuantizedLinear(module, format=format))
            elif isinstance(module, Experts):
                setattr(block.get_submodule(parent), child, QuantizedExperts(module, format=format))


def format_of(model: nn.Module) -> QuantFormat | None:
    """The format of a model's layers, None for one of plain numbers."""
    return next((module.format for module in model.modules() if isinstance(module, QuantizedStack)), None)


def weight_counts(model: nn.Module) -> dict[str, int]:
    """How many weights each tensor of the state has; of matrices in few bits as many as there are numbers."""
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedStack)}
    inside = tuple(f"{name}." for name in stacks)
    counts = {name: tensor.numel() for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    return counts | {name: stack.n_weights for name, stack in stacks.items()}
