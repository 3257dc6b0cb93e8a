"""What happens once a step: gradients are summed over ranks, the optimizer runs, new weights are handed out."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from abyssal.plan.communication import Traffic, ring_seconds, ring_traffic
from abyssal.plan.eager_memory import is_muon
from abyssal.plan.layout import NUMBER_BYTES, Layout
from abyssal.plan.machine_file import MachineSpec, Precision
from abyssal.plan.memory import HeldWeights

Optimizer = Literal["adamw", "muon"]

NEWTON_SCHULZ_STEPS = 5  # of Muon (optim/muon.py)
MUON_PASSES = 18  # numbers read and written for each of a matrix's beside the products: momentum, stacking, update


def exposed_gradient_seconds(
    held: HeldWeights, layout: Layout, machine: MachineSpec, *, n_micro_batches: int, micro_batch_seconds: float
) -> float:
    """Gradients are summed over the ranks that hold the same weights, and new weights handed out: a reduce-scatter and
    an all-gather, whether the optimizer's state is shared out or not. ZeRO 2 sums after each micro-batch, ZeRO 3 also
    gathers the weights for each forward and each backward. Overlapped with computing where the layout says so."""
    reduced, gathered = NUMBER_BYTES[layout.gradients], NUMBER_BYTES[layout.weights]
    parts = ((held.whole, held.group), (held.routed, held.routed_group))
    reduce_seconds = sum(ring_seconds(n * reduced, group, machine) for n, group in parts)
    gather_seconds = sum(ring_seconds(n * gathered, group, machine) for n, group in parts)
    hidden = micro_batch_seconds if layout.overlap_gradient_communication else 0.0
    if layout.zero == 3:
        return n_micro_batches * max(0.0, 2 * gather_seconds + reduce_seconds - hidden)
    earlier = (n_micro_batches - 1) * max(0.0, reduce_seconds - hidden) if layout.zero == 2 else 0.0
    return earlier + max(0.0, reduce_seconds + gather_seconds - hidden)


def gradient_traffic(held: HeldWeights, layout: Layout) -> Traffic:
    """Of one sum of gradients and one round of new weights."""
    each = NUMBER_BYTES[layout.gradients] + NUMBER_BYTES[layout.weights]
    return ring_traffic(held.whole * each, held.group).plus(ring_traffic(held.routed * each, held.routed_group))


def optimizer_seconds(
    held: HeldWeights, layout: Layout, machine: MachineSpec, *, optimizer: Optimizer, precision: Precision
) -> float:
    """Passes over memory: the gradients' norm, then AdamW, which reads gradients and reads and writes masters and both
    moments, writes the weights that products read, and clears all gradients for the next step; for Muon's matrices
    Newton-Schulz's products instead."""
    trained = held.total - held.idle
    n = held.trained_share if layout.zero >= 1 else trained
    gradient, master = NUMBER_BYTES[layout.gradients], NUMBER_BYTES[layout.master]
    by_muon = (
        sum(w.n for w in held.tensors if is_muon(w)) / sum(w.n for w in held.tensors) if optimizer == "muon" else 0
    )
    adamw = n * (1 - by_muon) * (2 * gradient + 2 * master + 4 * NUMBER_BYTES[layout.moments])
    written = 0.0 if layout.weights == layout.master else trained * NUMBER_BYTES[layout.weights]
    seconds = machine.memory_seconds(adamw + written + trained * gradient)
    if optimizer == "muon":
        seconds += (n / trained) * _muon_seconds(held, machine, precision)
    return seconds


def _muon_seconds(held: HeldWeights, machine: MachineSpec, precision: Precision) -> float:
    """For each shape all matrices together: three products of the smaller side in each of five iterations."""
    stacks: Counter[tuple[int, int]] = Counter()
    for weight in held.tensors:
        if is_muon(weight):
            rows, columns = weight.shape[-2:]
            stacks[min(rows, columns), max(rows, columns)] += weight.n // (rows * columns)
    seconds = 0.0
    for (small, large), count in stacks.items():
        gram = machine.gemm_seconds(precision=precision, groups=count, rows=small, inner=large, outer=small)
        square = machine.gemm_seconds(precision=precision, groups=count, rows=small, inner=small, outer=small)
        apply = machine.gemm_seconds(precision=precision, groups=count, rows=small, inner=small, outer=large)
        seconds += NEWTON_SCHULZ_STEPS * (gram + square + apply)
        seconds += machine.memory_seconds(4.0 * MUON_PASSES * count * small * large)
    return seconds
