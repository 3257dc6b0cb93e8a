"""What each pipeline rank keeps while it trains. Owns which weights and activations lie where.

Parallel training is counted as its layout says; training on one device, or in replicas of it, as this project does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from abyssal.model.config import ModelConfig
from abyssal.plan.communication import gradient_groups
from abyssal.plan.eager_memory import (
    head_kept_bytes,
    head_scratch_bytes,
    layer_kept_bytes,
    mtp_kept_bytes,
    optimizer_scratch_bytes,
    optimizer_state_numbers,
)
from abyssal.plan.layout import NUMBER_BYTES, Layout
from abyssal.plan.machine_file import MachineSpec, Precision
from abyssal.plan.memory import HeldWeights, RankMemory, held_weights, rank_memory
from abyssal.plan.parameters import Weight, weights
from abyssal.plan.unit_costs import UnitCost
from abyssal.plan.weight_updates import Optimizer


def held_by_rank(config: ModelConfig, layout: Layout, machine: MachineSpec, stages: list[range]) -> list[HeldWeights]:
    """Weights of each pipeline rank. A head that is the embedding table is held on both their stages."""
    groups = gradient_groups(layout, machine)
    n_layers = config.num_hidden_layers
    by_unit: dict[int, list[Weight]] = {}
    for weight in weights(config):
        if weight.layer is not None:
            unit = 1 + weight.layer if weight.layer < n_layers else 2 + weight.layer
        else:
            unit = 0 if weight.part == "embedding" else n_layers + 1
        by_unit.setdefault(unit, []).append(weight)
    ranks = []
    for rank in range(layout.pp):
        held = [w for stage in layout.stages_of(rank) for unit in stages[stage] for w in by_unit.get(unit, [])]
        names = {w.name for w in held}
        if config.tie_word_embeddings and "norm.weight" in names and "embed_tokens.weight" not in names:
            held += by_unit[0]
        ranks.append(held_weights(held, layout, groups))
    return ranks


def memory_by_rank(
    config: ModelConfig,
    held: list[HeldWeights],
    *,
    machine: MachineSpec,
    layout: Layout,
    precision: Precision,
    stages: list[range],
    units: list[UnitCost],
    activations_bytes: Sequence[float],
    accumulated: bool,
    micro_rows: int,
    row_len: int,
    optimizer: Optimizer,
) -> tuple[RankMemory, ...]:
    """`activations_bytes`: by rank, what the schedule has in flight at most."""
    if layout.is_one_device:
        kept = _kept_bytes(
            config, n_rows=micro_rows, row_len=row_len, precision=precision, on_cpu=machine.kind == "cpu"
        )
        scratch = head_scratch_bytes(config, n_tokens=micro_rows * row_len)
        return (_one_device(config, layout, kept, scratch, accumulated=accumulated, optimizer=optimizer),)
    every = weights(config)
    state = optimizer_state_numbers(every, optimizer) / sum(w.n for w in every if w.is_trained)
    return tuple(
        rank_memory(
            rank,
            layout=layout,
            held=held[rank],
            activations_bytes=activations_bytes[rank],
            temporary_bytes=max(units[i].largest_bytes for stage in layout.stages_of(rank) for i in stages[stage]),
            moments_per_number=state,
        )
        for rank in range(layout.pp)
    )


def _kept_bytes(config: ModelConfig, *, n_rows: int, row_len: int, precision: Precision, on_cpu: bool) -> float:
    """What autograd keeps of a whole forward pass."""
    shape = {"n_rows": n_rows, "row_len": row_len}
    layers = sum(
        layer_kept_bytes(config, layer, **shape, precision=precision, on_cpu=on_cpu)
        for layer in range(config.num_hidden_layers)
    )
    mtp = 0.0
    if config.num_nextn_predict_layers:
        mtp = config.num_nextn_predict_layers * mtp_kept_bytes(config, **shape, precision=precision, on_cpu=on_cpu)
    return layers + head_kept_bytes(config, n_tokens=n_rows * row_len, precision=precision) + mtp


def _one_device(
    config: ModelConfig,
    layout: Layout,
    kept_bytes: float,
    scratch_bytes: float,
    *,
    accumulated: bool,
    optimizer: Optimizer,
) -> RankMemory:
    """The fuller of two moments: backward begins, with all activations and, in the first micro-batch, no gradient yet;
    or the optimizer runs, with all gradients and no activation. Gradients are gone between steps."""
    every = weights(config)
    n = sum(w.n for w in every)
    master = NUMBER_BYTES[layout.master] * n
    moments = NUMBER_BYTES[layout.moments] * optimizer_state_numbers(every, optimizer)
    gradients = NUMBER_BYTES[layout.gradients] * sum(w.n for w in every if w.is_trained)
    update = RankMemory(
        rank=0,
        weights_bytes=master,
        master_bytes=0.0,
        moments_bytes=moments,
        gradients_bytes=gradients,
        activations_bytes=0.0,
        temporary_bytes=optimizer_scratch_bytes(every, optimizer),
    )
    backward = replace(
        update,
        gradients_bytes=gradients if accumulated else 0.0,
        activations_bytes=kept_bytes,
        temporary_bytes=scratch_bytes,
    )
    return max(backward, update, key=lambda moment: moment.total_bytes)
