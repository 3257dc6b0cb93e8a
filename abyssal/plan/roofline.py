"""How long operations take on a machine: a product by its shape, attention by its own rate, a pass by its bytes.

Products and attention need the compute units, of which overlapped communication takes some away; passes over memory
need the memory. So the two are kept apart until it is known what runs beside them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from abyssal.plan.machine_file import MachineSpec, Sourced
from abyssal.plan.operation import Operation

Direction = Literal["forward", "backward", "decode"]


class WorkSeconds(NamedTuple):
    """Of some operations together, one after the other."""

    units_seconds: float = 0.0  # products and attention: goes with the compute units that are free
    passes_seconds: float = 0.0  # over memory
    calls_seconds: float = 0.0  # what each operation costs beside its work

    @property
    def total_seconds(self) -> float:
        return sum(self)

    def beside_communication(self, machine: MachineSpec) -> float:
        """The same while communication takes its share of the compute units."""
        return self.units_seconds / (1 - machine.communication_share.value) + self.passes_seconds + self.calls_seconds

    def plus(self, other: WorkSeconds) -> WorkSeconds:
        return WorkSeconds(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> WorkSeconds:
        return WorkSeconds(*(factor * part for part in self))


def work_of(operation: Operation, machine: MachineSpec, *, direction: Direction = "forward") -> WorkSeconds:
    calls = operation.calls * machine.seconds_per_operation.value
    passes = machine.memory_seconds(operation.moved_bytes)
    if operation.kind == "memory":
        return WorkSeconds(0.0, passes, calls)
    if operation.kind == "attention":
        core = operation.flops / _attention_rate(machine, direction).value
        return WorkSeconds(core, 0.0, calls) if core > passes else WorkSeconds(0.0, passes, calls)
    product = machine.gemm_seconds(
        precision=machine.computes_in(operation.precision),
        rows=operation.rows,
        inner=operation.inner,
        outer=operation.outer,
        groups=operation.groups,
    )
    return WorkSeconds(product, 0.0, calls)


def work(
    operations: Iterable[Operation],
    machine: MachineSpec,
    *,
    direction: Direction = "forward",
    routed_share: float = 1.0,
) -> WorkSeconds:
    """One after the other; experts get `routed_share` times the mean number of rows."""
    total = WorkSeconds()
    for operation in operations:
        alone = work_of(operation, machine, direction=direction)
        total = total.plus(alone.times(routed_share) if operation.routed else alone)
    return total


def seconds_of(operation: Operation, machine: MachineSpec, *, direction: Direction = "forward") -> float:
    """By itself, with all compute units."""
    return work_of(operation, machine, direction=direction).total_seconds


def _attention_rate(machine: MachineSpec, direction: Direction) -> Sourced:
    return {
        "forward": machine.attention_forward_flops_per_second,
        "backward": machine.attention_backward_flops_per_second,
        "decode": machine.decode_attention_flops_per_second,
    }[direction]
