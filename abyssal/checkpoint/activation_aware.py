"""Activation-aware rounding: weights that lose less of what really goes through them. (AWQ, section 3.2)

Input channels on which the activations are large matter most. First, their weights are multiplied by a scale before
rounding, and whatever makes the channel is divided by it: a norm's weight, the rows of up_proj or of the values. So the
result is a plain checkpoint that computes the same but for the rounding. A scale is the mean magnitude of its channel
to the power alpha; alpha is searched for each input of a block by the error of the rounded layers on a calibration
text. Where a router reads the channel too, scales are powers of two: it must choose the same experts to the last bit.
Then each group of columns is rounded in the steps at which its errors, weighed by the mean square of what goes through
each column, are least.
Letters: B rows, T tokens, N calibration tokens, I input channels, O rows of a weight, H heads, V value width,
G key-value heads, K chosen experts, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abyssal.checkpoint.source import Source
from abyssal.checkpoint.tensor_info import TensorInfo
from abyssal.checkpoint.tensor_names import IN_FEW_BITS, common_group, mtp_prefix, official_views
from abyssal.kernels.quantize import QuantFormat, Quantized, dequantize, quantize
from abyssal.model.block import Block
from abyssal.model.config import ModelConfig
from abyssal.model.linear import Linear
from abyssal.model.moe import Experts, MoE, Routing
from abyssal.model.mtp import MtpModule
from abyssal.model.transformer import Transformer
from abyssal.tokens.tokenizer import Tokenizer

ALPHAS = tuple(step / 10 for step in range(11))  # 0 is no scaling
MOST_TOKENS = 512  # whose outputs are compared, evenly from all that calibrate


@dataclass
class Scales:
    """Official tensor name -> what its rows and its columns are multiplied by, and the mean square of what then goes
    through each column. A vector has rows only."""

    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)

    def fold(self, scale_I: Tensor, *, made_by: dict[str, Tensor], read_by: dict[str, Tensor]) -> None:
        """Divide what makes these channels, multiply what reads them. `made_by` says which scale each row gets,
        `read_by` what goes into the weight, (N, I), of which nothing is known where there are no rows."""
        for name, scale_O in made_by.items():
            self.rows[name] = 1 / scale_O.cpu()
        for name, x_NI in read_by.items():
            self.columns[name] = scale_I.cpu()
            if len(x_NI):
                self.importance[name] = (x_NI / scale_I).square().mean(0).cpu()

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """In FP32, so that what comes after rounds once."""
        scaled = tensor.float()
        if name in self.rows:
            scaled = scaled * self.rows[name].view(-1, *(1 for _ in tensor.shape[1:]))
        return scaled * self.columns[name] if name in self.columns else scaled


class ScaledSource:
    """A checkpoint as another one that computes the same, its projections rounded to `format` with what is known."""

    def __init__(self, source: Source, scales: Scales, format: QuantFormat) -> None:
        self.path: Path = source.path
        self.config: ModelConfig = source.config
        self.tensors: dict[str, TensorInfo] = source.tensors
        self._source, self._scales, self._format = source, scales, format
        self._group = common_group(source.tensors, format)

    def read(self, name: str) -> Tensor:
        return self._scales.apply(name, self._source.read(name))

    def read_into(self, name: str, out: Tensor) -> None:
        out.copy_(self.read(name))

    def read_quantized(self, name: str) -> Quantized | None:
        if not IN_FEW_BITS.search(name):
            return None
        importance_I = self._scales.importance.get(name)
        return quantize(self.read(name), self._format, group=self._group, importance_I=importance_I)

    def tokenizer(self) -> Tokenizer | None:
        return self._source.tokenizer()


@torch.inference_mode()
def find_scales(
    model: Transformer,
    ids_BT: Tensor,
    format: QuantFormat,
    *,
    on_block: Callable[[int, int], None] = lambda n_done, n_all: None,
) -> Scales:
    """Block by block: what goes into its layers, then the scales at which rounding them hurts least."""
    if format == "fp8":
        raise ValueError("scaling by activations is for int8 and int4: each FP8 number has an exponent of its own")
    config, weights, scales = model.config, official_views(model), Scales()
    group = common_group(weights, format)

    def rounded(weight_OI: Tensor) -> Tensor:
        return dequantize(quantize(weight_OI, format, group=group))

    x_BTD, context = model.embed(ids_BT), model.context(ids_BT)
    n_blocks = len(model.layers) + len(model.mtp)
    for i, block in enumerate(model.layers):
        assert isinstance(block, Block)
        with _watch(block) as seen:
            x_BTD = block(x_BTD, context, None)
        _BlockScaler(f"model.layers.{i}.", config, seen, weights, scales, rounded).scale(block)
        on_block(i + 1, n_blocks)
    hidden_BTD = model.norm(x_BTD)
    for k, module in enumerate(model.mtp, start=1):
        assert isinstance(module, MtpModule)
        ids_BT, embedding_BTD = ids_BT[:, :-1], model.embed(ids_BT[:, 1:])
        hidden_BTD = hidden_BTD[:, : ids_BT.shape[1]]
        with _watch(module.block) as seen:
            hidden_BTD = module(hidden_BTD, embedding_BTD, model.context(ids_BT), None)
        _BlockScaler(mtp_prefix(config, k - 1), config, seen, weights, scales, rounded).scale(module.block)
        on_block(len(model.layers) + k, n_blocks)
    return scales


def search(
    mean_I: Tensor,
    readers: list[tuple[Tensor, Tensor]],
    rounded: Callable[[Tensor], Tensor],
    *,
    powers_of_two: bool = False,
) -> Tensor:
    """The scale of each channel, mean magnitude ^ alpha, with the least error of what the readers make.

    `readers` are pairs of inputs (N, I) and weight (O, I), `rounded` is what becomes of a weight.
    """
    log_I = mean_I.clamp(min=1e-6 * float(mean_I.max()) + 1e-30).log2()
    log_I = log_I - log_I.mean()
    least, best_I = float("inf"), torch.ones_like(mean_I)
    for alpha in ALPHAS:
        scale_I = (alpha * log_I).round().exp2() if powers_of_two else (alpha * log_I).exp2()
        error = 0.0
        for x_NI, weight_OI in readers:
            weight_OI = weight_OI.float()
            change_OI = rounded(weight_OI * scale_I) / scale_I - weight_OI
            error += float((x_NI @ change_OI.T).square().sum())
        if error < least:
            least, best_I = error, scale_I
    return best_I


class _Seen:
    """What went into the layers of a block: mean magnitude of each channel and some rows, by the layer's name; and
    which experts those rows of the input of "mlp" were sent to."""

    def __init__(self) -> None:
        self.mean_I: dict[str, Tensor] = {}
        self.x_NI: dict[str, Tensor] = {}
        self.experts_NK = torch.empty(0)

    def take(self, name: str, x: Tensor) -> None:
        self.mean_I[name] = x.flatten(0, -2).abs().float().mean(0)
        self.x_NI[name] = _some(x.flatten(0, -2)).float()


def _some(x_NI: Tensor) -> Tensor:
    return x_NI[:: -(-len(x_NI) // MOST_TOKENS)]


@contextmanager
def _watch(block: Block) -> Iterator[_Seen]:
    """Sees what goes into every projection, and into the experts, while the block runs."""
    seen, handles = _Seen(), []

    def watch(name: str, module: nn.Module) -> None:
        def take(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.take(name, inputs[0])

        def take_routed(_: nn.Module, inputs: tuple[Tensor, Routing]) -> None:
            seen.take(name, inputs[0])
            seen.experts_NK = _some(inputs[1].experts_NK)

        handles.append(module.register_forward_pre_hook(take_routed if name == "mlp" else take))

    for name, module in block.named_modules():
        if isinstance(module, Linear):
            watch(name, module)
        elif isinstance(module, Experts):
            watch("mlp", module)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _BlockScaler:
    """One block: its official prefix, what was seen in it, the weights of the model, and where scales are gathered."""

    prefix: str
    config: ModelConfig
    seen: _Seen
    weights: dict[str, Tensor]
    scales: Scales
    rounded: Callable[[Tensor], Tensor]

    def scale(self, block: Block) -> None:
        config = self.config
        if config.attention == "mla":
            first = "q_proj" if config.q_lora_rank is None else "q_a_proj"
            self.normed("input_layernorm", [f"self_attn.{first}", "self_attn.kv_a_proj_with_mqa"])
            self.normed("self_attn.q_a_layernorm", ["self_attn.q_b_proj"])
            self.normed("self_attn.kv_a_layernorm", ["self_attn.kv_b_proj"])
        else:
            self.normed("input_layernorm", [f"self_attn.{name}_proj" for name in "qkv"])
        self.values()
        if isinstance(block.mlp, MoE):
            self.routed(block.mlp)
        else:
            self.normed("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"])
            self.gated("mlp", self.seen.x_NI["mlp.down_proj"])

    def normed(self, norm: str, readers: list[str]) -> None:
        """Channels that a norm makes."""
        if self.name(norm) not in self.weights:
            return
        x_NI = self.seen.x_NI[readers[0]]
        names = [self.name(reader) for reader in readers]
        scale_I = search(self.seen.mean_I[readers[0]], [(x_NI, self.weights[name]) for name in names], self.rounded)
        # the norm will stand in BF16: what its rounding adds is taken into the scale, and so out of the readers again
        norm_I = self.weights[self.name(norm)].float()
        divided_I = (norm_I / scale_I).bfloat16().float()
        scale_I = torch.where(divided_I == 0, scale_I, norm_I / divided_I)
        self.scales.fold(scale_I, made_by={self.name(norm): scale_I}, read_by=dict.fromkeys(names, x_NI))

    def values(self) -> None:
        """Channels of o_proj, made by the rows of the values; heads that share a value share its scale."""
        config, mean_I = self.config, self.seen.mean_I["self_attn.o_proj"]
        x_NI, o_name = self.seen.x_NI["self_attn.o_proj"], self.name("self_attn.o_proj")
        n_heads = config.num_attention_heads
        n_values = n_heads if config.attention == "mla" else config.num_key_value_heads
        mean_GXV = mean_I.view(n_values, n_heads // n_values, -1)
        mean_I = mean_GXV.mean(1, keepdim=True).expand_as(mean_GXV).flatten()
        scale_I = search(mean_I, [(x_NI, self.weights[o_name])], self.rounded)
        scale_GV = scale_I.view_as(mean_GXV)[:, 0]
        made_by = {}
        if config.attention == "mla":  # each head's rows of kv_b_proj are its keys, then its values
            keys_GN = torch.ones(n_values, config.qk_nope_head_dim, device=scale_GV.device)
            made_by[self.name("self_attn.kv_b_proj")] = torch.cat((keys_GN, scale_GV), dim=1).flatten()
        else:
            for name in (self.name("self_attn.v_proj"), f"{self.prefix}self_attn.v_proj.bias"):
                if name in self.weights:
                    made_by[name] = scale_GV.flatten()
        self.scales.fold(scale_I, made_by=made_by, read_by={o_name: x_NI})

    def gated(self, ffn: str, x_NI: Tensor) -> None:
        """Channels of down_proj, made by the rows of up_proj."""
        down = self.name(f"{ffn}.down_proj")
        scale_I = search(x_NI.abs().mean(0), [(x_NI, self.weights[down])], self.rounded)
        self.scales.fold(scale_I, made_by={self.name(f"{ffn}.up_proj"): scale_I}, read_by={down: x_NI})

    def routed(self, moe: MoE) -> None:
        """One norm makes what the router and all experts read; an expert is judged by the tokens sent to it."""
        x_ND, readers = self.seen.x_NI["mlp"], []
        n_experts = len(moe.experts.down_proj)
        experts = {f"mlp.experts.{e}": x_ND[(self.seen.experts_NK == e).any(-1)] for e in range(n_experts)}
        if moe.shared_experts is not None:
            experts["mlp.shared_experts"] = x_ND
        for ffn, x_XD in experts.items():
            gate, up = (self.weights[self.name(f"{ffn}.{kind}_proj")] for kind in ("gate", "up"))
            readers += [(x_XD, gate), (x_XD, up)]
            if len(x_XD):
                self.gated(ffn, F.silu(F.linear(x_XD, gate.float())) * F.linear(x_XD, up.float()))
        scale_D = search(self.seen.mean_I["mlp"], readers, self.rounded, powers_of_two=True)
        read_by = {self.name(f"{ffn}.{kind}_proj"): x_XD for ffn, x_XD in experts.items() for kind in ("gate", "up")}
        made_by = {self.name("post_attention_layernorm"): scale_D}
        self.scales.fold(scale_D, made_by=made_by, read_by=read_by | {self.name("mlp.gate"): x_ND})

    def name(self, module: str) -> str:
        return f"{self.prefix}{module}.weight"
