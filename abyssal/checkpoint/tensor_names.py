"""Official tensor names <-> our parameters. Owns the splitting of stacked experts and the numbering of MTP layers.

The whole conversion is one dict of views: each official name points at the piece of our weights that it names. Loading
copies into the views, saving reads them, and a name without a view is a tensor that does not belong.
Letters: E experts, F expert width, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from abyssal.kernels.quantize import QuantFormat, Quantized, group_of
from abyssal.model.config import ModelConfig
from abyssal.model.quantized import QuantizedExperts, QuantizedLinear, QuantizedStack, format_of
from abyssal.model.transformer import Transformer

# Llama checkpoints of 2023 carry their rotary table; it follows from config.json and is never a weight
DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")
# The linears of a block, experts too: what DeepSeek publishes in FP8. Not embedding, head, norms, router and eh_proj.
IN_FEW_BITS = re.compile(r"\.(self_attn|mlp)\.(\w+\.)*\w+_proj(_with_mqa)?\.weight$")


class Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


def common_group(tensors: Mapping[str, Shaped], format: QuantFormat) -> int:
    """Columns of a group in all matrices of a checkpoint that are in few bits."""
    return group_of(format, *(tensor.shape[-1] for name, tensor in tensors.items() if IN_FEW_BITS.search(name)))


@dataclass(frozen=True)
class Slot:
    """Where one matrix of a quantised model belongs."""

    stack: QuantizedStack
    index: int

    @property
    def n_bytes(self) -> int:
        """Of the codes alone."""
        return self.stack.n_weights // self.stack.n // (2 if self.stack.format == "int4" else 1)

    def put(self, weight: Quantized) -> None:
        self.stack.put(self.index, weight)


def official_slots(model: Transformer) -> dict[str, Slot]:
    """Official name -> place of a matrix in few bits; empty for a model of plain numbers."""
    slots: dict[str, Slot] = {}
    n_layers = model.config.num_hidden_layers
    for ours, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            slots[_official_name(f"{ours}.weight", n_layers=n_layers)] = Slot(module.weight_stack, 0)
        elif isinstance(module, QuantizedExperts):
            for kind, stack in module.stacks().items():
                for expert in range(stack.n):
                    slots[_official_name(f"{ours}.{expert}.{kind}.weight", n_layers=n_layers)] = Slot(stack, expert)
    return slots


def official_views(model: Transformer) -> dict[str, Tensor]:
    """Official name -> view of the model's own tensor (no copies)."""
    if format := format_of(model):
        raise ValueError(
            f"a model in {format} has no numbers to save or train on; load it with weights='master', or write few bits "
            f"with: abyssal export DIR --to {format}"
        )
    return plain_views(model)


def plain_views(model: Transformer) -> dict[str, Tensor]:
    """Those of `official_views` that stand there as numbers, of a quantised model too."""
    views: dict[str, Tensor] = {}
    few_bits = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, QuantizedStack))
    for ours, tensor in model.state_dict().items():
        if ours.startswith(few_bits):
            continue
        name = _official_name(ours, n_layers=model.config.num_hidden_layers)
        if name.endswith(".experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for expert, gate_up_XD in enumerate(tensor):
                gate_FD, up_FD = gate_up_XD.chunk(2)
                views[f"{prefix}{expert}.gate_proj.weight"] = gate_FD
                views[f"{prefix}{expert}.up_proj.weight"] = up_FD
        elif name.endswith(".experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            for expert, down_DF in enumerate(tensor):
                views[f"{prefix}{expert}.down_proj.weight"] = down_DF
        else:
            views[name] = tensor
    return views


def shared_copies(config: ModelConfig) -> dict[str, str]:
    """Names under which official checkpoints repeat a tensor -> its main name. MTP layers repeat embedding and head."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    copies = {}
    for k in range(config.num_nextn_predict_layers):
        prefix = mtp_prefix(config, k)
        copies[f"{prefix}embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"{prefix}shared_head.head.weight"] = head
    return copies


def mtp_prefix(config: ModelConfig, k: int) -> str:
    """MTP modules are numbered on after the main layers: V3's only one is model.layers.61."""
    return f"model.layers.{config.num_hidden_layers + k}."


def keeps_fp32(name: str) -> bool:
    """The balance bias is about 5 and moves by 0.001: BF16 would lose every update."""
    return name.endswith(".e_score_correction_bias")


def _official_name(ours: str, *, n_layers: int) -> str:
    if ours.startswith("lm_head."):
        return ours
    if not ours.startswith("mtp."):
        return f"model.{ours}"
    _, k, rest = ours.split(".", 2)
    rest = rest.removeprefix("block.").replace("shared_head_norm.", "shared_head.norm.")
    return f"model.layers.{n_layers + int(k)}.{rest}"
