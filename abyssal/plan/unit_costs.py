"""What one micro-batch costs in one unit of a model (embedding, a layer, head, MTP): seconds, traffic, what is kept.

Owns the passage from operations to forward, input gradient and weight gradient under a layout. Knows no pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

from abyssal.model.config import ModelConfig
from abyssal.plan.communication import Traffic, context_traffic, expert_traffic, tensor_traffic
from abyssal.plan.eager_passes import as_torch_runs
from abyssal.plan.layout import NUMBER_BYTES, Layout
from abyssal.plan.machine_file import MachineSpec, Precision
from abyssal.plan.operation import Operation, input_gradient, not_fp8, weight_gradient
from abyssal.plan.operations import embedding_operations, head_operations, layer_operations, mtp_operations
from abyssal.plan.roofline import WorkSeconds, work

UnitKind = Literal["embedding", "dense", "moe", "head", "mtp"]


@dataclass(frozen=True, kw_only=True)
class UnitCost:
    """On one rank. A schedule may hide communication of `*_experts_seconds`, nothing that of `*_exposed_seconds`."""

    forward: WorkSeconds
    backward_input: WorkSeconds  # with what is computed again
    backward_weight: WorkSeconds
    beside_experts: WorkSeconds  # of forward: shared experts, which need nothing from other ranks
    forward_experts_seconds: float
    backward_experts_seconds: float
    forward_exposed_seconds: float
    backward_exposed_seconds: float
    experts_sent: Traffic  # forward and backward
    tensor_sent: Traffic
    context_sent: Traffic
    saved_bytes: float
    largest_bytes: float  # of one operation's result

    def plus(self, other: UnitCost) -> UnitCost:
        values: dict[str, Any] = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            values[field.name] = mine.plus(theirs) if isinstance(mine, WorkSeconds | Traffic) else mine + theirs
        return UnitCost(**values | {"largest_bytes": max(self.largest_bytes, other.largest_bytes)})

    @property
    def work(self) -> WorkSeconds:
        """Forward and backward, without communication."""
        return self.forward.plus(self.backward_input).plus(self.backward_weight)

    @property
    def work_seconds(self) -> float:
        return self.work.total_seconds


NOTHING = UnitCost(
    forward=WorkSeconds(),
    backward_input=WorkSeconds(),
    backward_weight=WorkSeconds(),
    beside_experts=WorkSeconds(),
    forward_experts_seconds=0.0,
    backward_experts_seconds=0.0,
    forward_exposed_seconds=0.0,
    backward_exposed_seconds=0.0,
    experts_sent=Traffic(),
    tensor_sent=Traffic(),
    context_sent=Traffic(),
    saved_bytes=0.0,
    largest_bytes=0.0,
)


def unit_kinds(config: ModelConfig) -> list[UnitKind]:
    """In the order in which a micro-batch meets them. MTP modules stand behind the head, whose norm they read from."""
    kinds: list[UnitKind] = ["embedding"]
    kinds += ["moe" if config.is_moe(layer) else "dense" for layer in range(config.num_hidden_layers)]
    kinds.append("head")
    return kinds + ["mtp"] * config.num_nextn_predict_layers


def unit_costs(
    config: ModelConfig,
    *,
    machine: MachineSpec,
    layout: Layout,
    precision: Precision,
    micro_rows: int,
    row_len: int,
    accumulated: bool,
) -> dict[UnitKind, UnitCost]:
    """Each kind of unit that the model has. `accumulated`: gradients are added to those of earlier micro-batches."""
    return {
        kind: unit_cost(
            kind,
            config,
            machine=machine,
            layout=layout,
            precision=precision,
            micro_rows=micro_rows,
            row_len=row_len,
            accumulated=accumulated,
        )
        for kind in dict.fromkeys(unit_kinds(config))
    }


def unit_cost(
    kind: UnitKind,
    config: ModelConfig,
    *,
    machine: MachineSpec,
    layout: Layout,
    precision: Precision,
    micro_rows: int,
    row_len: int,
    accumulated: bool,
) -> UnitCost:
    operations = _operations(kind, config, layout, precision, micro_rows=micro_rows, row_len=row_len)
    if layout.kernels == "eager" and precision != "fp8":
        n_tokens, on_cpu = micro_rows * row_len // layout.cp, machine.kind == "cpu"
        operations = as_torch_runs(operations, config, n_tokens=n_tokens, on_cpu=on_cpu)
    gradient_bytes = NUMBER_BYTES[layout.gradients]
    again = {"none": [], "selective": [o for o in operations if o.recomputed], "full": operations}[layout.recompute]
    is_layer = kind in ("dense", "moe", "mtp")
    if not is_layer:
        again = []  # recomputation begins from a layer's input
    into_inputs = [gradient for operation in operations for gradient in input_gradient(operation)]
    into_weights = [
        gradient
        for operation in operations
        for gradient in weight_gradient(operation, accumulated=accumulated, gradient_bytes=gradient_bytes)
    ]
    tokens = micro_rows * row_len / layout.cp
    experts = tensor = context = Traffic()  # of forward
    if kind == "moe" or (kind == "mtp" and config.is_moe(config.num_hidden_layers)):
        dispatch, combine = expert_traffic(config, layout, machine, n_tokens=tokens / layout.tp, precision=precision)
        experts = dispatch.plus(combine).times(1 + layout.expert_imbalance)
    if is_layer:
        sharded = kind == "dense" or config.n_shared_experts > 0
        tensor = tensor_traffic(config, layout, n_tokens=tokens, precision=precision, sharded_ffn=sharded)
        context = context_traffic(config, layout, machine, n_tokens=tokens, precision=precision)
    ring_seconds = _exposed_ring_seconds(context, machine, operations)
    # backward sends what forward does; what is computed again is sent again; gathered inputs are not kept but gathered
    # once more for the weights' gradients; keys and values pass once more, and so do their gradients
    again_share = 1.0 if layout.recompute == "full" else 0.0
    backward_experts, backward_tensor, backward_context = 1 + again_share, 1.5 + again_share, 2 + again_share
    timed = partial(work, machine=machine, routed_share=1 + layout.expert_imbalance)
    return UnitCost(
        forward=timed(operations),
        backward_input=timed(into_inputs, direction="backward").plus(timed(again)),
        backward_weight=timed(into_weights),
        beside_experts=work((o for o in operations if o.name.startswith("shared_")), machine),
        forward_experts_seconds=experts.seconds(machine),
        backward_experts_seconds=experts.seconds(machine) * backward_experts,
        forward_exposed_seconds=tensor.seconds(machine) + ring_seconds,
        backward_exposed_seconds=tensor.seconds(machine) * backward_tensor + ring_seconds * backward_context,
        experts_sent=experts.times(1 + backward_experts),
        tensor_sent=tensor.times(1 + backward_tensor),
        context_sent=context.times(1 + backward_context),
        saved_bytes=_saved_bytes(operations, layout, config, is_layer=is_layer, precision=precision, n_tokens=tokens),
        largest_bytes=max(_result_bytes(o) for o in operations),
    )


def _operations(
    kind: UnitKind, config: ModelConfig, layout: Layout, precision: Precision, *, micro_rows: int, row_len: int
) -> list[Operation]:
    n_rows, new_tokens, tp, cp, ep = micro_rows, row_len, layout.tp, layout.cp, layout.ep
    if kind == "embedding":
        return embedding_operations(config, n_rows=n_rows, new_tokens=new_tokens, precision=precision, tp=tp, cp=cp)
    if kind == "head":
        return head_operations(config, n_rows=n_rows, new_tokens=new_tokens, precision=precision, tp=tp, cp=cp)
    if kind == "mtp":
        return mtp_operations(config, 0, n_rows=n_rows, new_tokens=new_tokens, precision=precision, tp=tp, cp=cp, ep=ep)
    layer = 0 if kind == "dense" else config.first_k_dense_replace
    return layer_operations(
        config, layer, n_rows=n_rows, new_tokens=new_tokens, precision=precision, tp=tp, cp=cp, ep=ep
    )


def _exposed_ring_seconds(passing: Traffic, machine: MachineSpec, operations: list[Operation]) -> float:
    """Keys and values pass while attention computes with the last ones; what takes longer than that is exposed."""
    core = work((o for o in operations if o.kind == "attention"), machine).total_seconds
    return max(0.0, passing.seconds(machine) - core) if passing.messages else 0.0


def _result_bytes(operation: Operation) -> float:
    """Of a product exactly, of several one after the other of one; of a pass about half of what it moves."""
    if operation.kind == "memory":
        return operation.moved_bytes / 2
    wide = NUMBER_BYTES[not_fp8(operation.precision)]
    return wide * operation.groups * operation.rows * operation.outer / operation.calls


def _saved_bytes(
    operations: list[Operation],
    layout: Layout,
    config: ModelConfig,
    *,
    is_layer: bool,
    precision: Precision,
    n_tokens: float,
) -> float:
    if layout.recompute == "full" and is_layer:
        return NUMBER_BYTES[not_fp8(precision)] * n_tokens / layout.tp * config.hidden_size
    kept = [o.selective_saved_bytes if layout.recompute == "selective" else o.saved_bytes for o in operations]
    return sum(
        n_bytes * (1 + layout.expert_imbalance * operation.routed)
        for n_bytes, operation in zip(kept, operations, strict=True)
    )
