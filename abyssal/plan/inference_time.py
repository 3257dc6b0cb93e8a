"""Seconds of one forward pass of a serving device, by cause: what it waits for, operation by operation.

Owns how weights of few bits, the cached context and the exchange between expert ranks become seconds; the operations
are `operations.py`'s, the rates the machine's. Letters as there: a rank computes `n_rows` sequences of `new_tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from abyssal.model.config import ModelConfig
from abyssal.plan.machine_file import BYTES, OUTPUT_BYTES, MachineSpec
from abyssal.plan.operation import Operation
from abyssal.plan.operations import embedding_operations, head_operations, layer_operations
from abyssal.plan.weight_forms import WeightForm

Mode = Literal["prefill", "decode"]
Counted = tuple[int, Operation]  # so many times that operation
COMBINE_BYTES = 2.0  # expert results travel in BF16 (DeepSeek-V3 section 3.4)


@dataclass(frozen=True, kw_only=True)
class PassSeconds:
    """One forward pass of one device; the parts add up."""

    expert_weights_seconds: float = 0.0  # routed experts' products that wait for their weights
    other_weights_seconds: float = 0.0
    arithmetic_seconds: float = 0.0  # products that wait for the arithmetic
    cache_seconds: float = 0.0  # attention that waits for the cached context
    attention_seconds: float = 0.0  # attention that waits for its own arithmetic
    passes_seconds: float = 0.0  # norms, rotations, casts, SwiGLU, sums
    launches_seconds: float = 0.0  # what one more operation costs beside its work
    exposed_communication_seconds: float = 0.0

    @property
    def total_seconds(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def bottleneck(self) -> str:
        return IN_WORDS[max(fields(self), key=lambda f: float(getattr(self, f.name))).name]

    def __add__(self, other: PassSeconds) -> PassSeconds:
        return PassSeconds(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def times(self, factor: float) -> PassSeconds:
        return PassSeconds(**{f.name: getattr(self, f.name) * factor for f in fields(self)})


IN_WORDS = {
    "expert_weights_seconds": "reading the routed experts' weights",
    "other_weights_seconds": "reading the weights that every token uses",
    "arithmetic_seconds": "the arithmetic of the products",
    "cache_seconds": "reading the cached context",
    "attention_seconds": "the arithmetic of attention over the context",
    "passes_seconds": "passes over the hidden states",
    "launches_seconds": "the cost of starting each operation",
    "exposed_communication_seconds": "the exchange between devices",
}


def operations_seconds(
    operations: Iterable[Counted], *, machine: MachineSpec, form: WeightForm, mode: Mode
) -> PassSeconds:
    """Of these operations one after the other, each waiting for its memory or its arithmetic, whichever is longer."""
    seconds = dict.fromkeys((f.name for f in fields(PassSeconds)), 0.0)
    for times, operation in operations:
        seconds["launches_seconds"] += times * operation.calls * machine.seconds_per_operation.value
        if operation.kind == "memory":
            seconds["passes_seconds"] += times * machine.memory_seconds(operation.moved_bytes)
        elif operation.kind == "attention":
            rate = machine.attention_forward_flops_per_second
            if mode == "decode":
                rate = machine.decode_attention_flops_per_second
            computing, reading = operation.flops / rate.value, machine.memory_seconds(operation.moved_bytes)
            seconds["cache_seconds" if reading > computing else "attention_seconds"] += times * max(computing, reading)
        else:
            taken, waits_for_weights = product_seconds(operation, machine=machine, form=form)
            cause = "arithmetic_seconds"
            if waits_for_weights:
                is_expert = operation.name.startswith("experts_")
                cause = "expert_weights_seconds" if is_expert else "other_weights_seconds"
            seconds[cause] += times * taken
    return PassSeconds(**seconds)


def product_seconds(operation: Operation, *, machine: MachineSpec, form: WeightForm) -> tuple[float, bool]:
    """(seconds, whether it waits for its weights). Weights of few bits are widened on their way: they are read as they
    lie, and the product reaches the same share of its roofline as one of wide weights does."""
    shape = {"rows": operation.rows, "inner": operation.inner, "outer": operation.outer, "groups": operation.groups}
    precision = machine.computes_in(operation.precision)
    full_seconds = machine.gemm_seconds(precision=operation.precision, **shape)
    as_they_lie = form.bytes_per_weight if operation.precision == form.computes_in else BYTES[operation.precision]
    n_weights = operation.groups * operation.inner * operation.outer
    of_a_row = BYTES[precision] * operation.inner + OUTPUT_BYTES[precision] * operation.outer
    rest = operation.groups * operation.rows * of_a_row
    computing = operation.flops / machine.peak_flops_per_second[precision]
    reading, wide = (machine.memory_seconds(n_weights * each + rest) for each in (as_they_lie, BYTES[precision]))
    return full_seconds * max(computing, reading) / max(computing, wide), reading > computing


def forward_operations(
    config: ModelConfig,
    *,
    form: WeightForm,
    mode: Mode,
    n_rows: int,
    new_tokens: int,
    cached_tokens: int,
    tp: int = 1,
    ep: int = 1,
    experts: int = 0,
    cache_bytes_per_number: float = 2.0,
    asked_tokens: int = 1,
) -> list[Counted]:
    """All of one pass on one rank. `experts`: physical ones, with copies of the busiest; `asked_tokens`: of each row,
    those whose logits are wanted."""
    if experts and config.feed_forward == "moe":
        config = replace(config, n_routed_experts=experts, n_group=1, topk_group=1)
    shape: dict[str, Any] = {"n_rows": n_rows, "new_tokens": new_tokens, "precision": form.computes_in, "tp": tp}
    asked = {**shape, "new_tokens": min(new_tokens, asked_tokens)}
    operations = [*embedding_operations(config, **shape), *head_operations(config, mode=mode, **asked)]
    counted = [(1, operation) for operation in operations]
    n_moe = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
    for n_layers, layer in ((config.num_hidden_layers - n_moe, 0), (n_moe, config.num_hidden_layers - 1)):
        if n_layers:  # all layers of one kind do the same
            one = layer_operations(
                config,
                layer,
                cached_tokens=cached_tokens,
                mode=mode,
                ep=ep,
                cache_bytes_per_number=cache_bytes_per_number,
                **shape,
            )
            counted += [(n_layers, operation) for operation in one]
    return counted


def exchange_seconds(
    config: ModelConfig,
    *,
    machine: MachineSpec,
    tokens: float,
    ep: int,
    dispatch_bytes: float,
    by_node: bool,
    experts: int = 0,
) -> float:
    """Dispatch and combine of one MoE layer for the tokens of one rank, if nothing hides them.

    `by_node`: a token travels once to each node that has an expert of its, at most topk_group of them, and is copied
    there (DeepEP's normal kernels); otherwise once to each expert (its low-latency kernels).
    """
    if ep == 1 or config.feed_forward != "moe":
        return 0.0
    within = min(ep, machine.devices_per_node)
    n_nodes = ep / within
    each = config.hidden_size * (dispatch_bytes + COMBINE_BYTES)
    if by_node:
        copies_out = reached_nodes(config, n_nodes=n_nodes) * (1 - 1 / n_nodes)
    else:
        copies_out = config.num_experts_per_tok * (1 - 1 / n_nodes)
    copies_in = config.num_experts_per_tok * (1 - 1 / ep) - (0 if by_node else copies_out)
    seconds = 0.0
    if copies_out and machine.inter_node is not None:
        link = machine.inter_node
        seconds = tokens * copies_out * each / link.bytes_per_second.value + 2 * link.latency_seconds.value
    if within > 1 and machine.intra_node is not None:
        link = machine.intra_node
        inside = tokens * copies_in * each / link.bytes_per_second.value + 2 * link.latency_seconds.value
        seconds = max(seconds, inside)  # both links carry at once
    return seconds


def exchange_limit_seconds(
    *, tokens: float, copies: float, width: int, dispatch_bytes: float, bytes_per_second: float
) -> float:
    """Dispatch and combine of one layer at a link's full speed, each token to `copies` experts elsewhere: what the
    ISCA paper's section 2.3.2 bounds the speed of decoding by."""
    return tokens * copies * width * (dispatch_bytes + COMBINE_BYTES) / bytes_per_second


def reached_nodes(config: ModelConfig, *, n_nodes: float) -> float:
    """Expected nodes among `n_nodes` that hold an expert of a token: its topk_group groups lie on as many, or fewer."""
    if n_nodes <= 1:
        return 1.0
    chosen, groups = config.topk_group, config.n_group
    if groups == 1:  # any expert: each of K lies anywhere
        return n_nodes * (1 - (1 - 1 / n_nodes) ** config.num_experts_per_tok)
    if n_nodes >= groups:
        return float(chosen)
    on_one = groups / n_nodes  # groups that lie on one node
    missed = math.prod(max(0.0, groups - on_one - i) / (groups - i) for i in range(chosen))
    return n_nodes * (1 - missed)


def reduce_seconds(config: ModelConfig, *, machine: MachineSpec, tokens: float, tp: int) -> float:
    """Two sums of the hidden states over tensor parallel ranks in every layer, in BF16, which nothing hides."""
    link = machine.intra_node if tp <= machine.devices_per_node else machine.inter_node
    if tp == 1 or link is None:
        return 0.0
    moved = 2 * (tp - 1) / tp * tokens * config.hidden_size * COMBINE_BYTES
    return 2 * config.num_hidden_layers * (moved / link.bytes_per_second.value + 2 * link.latency_seconds.value)
