"""Training on a machine under a layout: operations become units, units stages, stages a timeline, and that a step.

`plan_training` is the way in; `training_plan.py` holds what it answers, `training_memory.py` what each rank keeps.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

from abyssal.model.config import ModelConfig
from abyssal.plan.advice import advice_for, bottleneck_of
from abyssal.plan.communication import Traffic, stage_traffic
from abyssal.plan.layout import Layout
from abyssal.plan.machine_file import MachineSpec, Precision
from abyssal.plan.memory import HeldWeights
from abyssal.plan.operations import head_operations, layer_operations
from abyssal.plan.roofline import WorkSeconds
from abyssal.plan.simulate import StageSeconds, Timeline, simulate
from abyssal.plan.stage_split import split
from abyssal.plan.training_memory import held_by_rank, memory_by_rank
from abyssal.plan.training_plan import SentBytes, StepSeconds, TrainingPlan, Way
from abyssal.plan.unit_costs import NOTHING, UnitCost, unit_costs, unit_kinds
from abyssal.plan.weight_updates import Optimizer, exposed_gradient_seconds, gradient_traffic, optimizer_seconds


def plan_training(
    config: ModelConfig,
    *,
    machine: MachineSpec,
    layout: Layout,
    row_len: int,
    batch_rows: int,
    optimizer: Optimizer = "adamw",
    advise: bool = True,
) -> TrainingPlan:
    """A step of `batch_rows` rows of `row_len` tokens on all devices that the layout uses. `advise`: say what to change
    where it does not fit, which takes a few plans more."""

    def with_layout(other: Layout) -> TrainingPlan:
        return _planned(
            config,
            machine=machine,
            layout=other.on(machine),
            row_len=row_len,
            batch_rows=batch_rows,
            optimizer=optimizer,
        )

    plan = with_layout(layout)
    return plan if plan.fits or not advise else replace(plan, advice=advice_for(plan, with_layout))


def _planned(
    config: ModelConfig,
    *,
    machine: MachineSpec,
    layout: Layout,
    row_len: int,
    batch_rows: int,
    optimizer: Optimizer,
) -> TrainingPlan:
    """The plan without advice: advice comes from planning with other layouts."""
    layout.check_model(config, row_len)
    n_micro_batches, micro_rows = layout.micro_batches(batch_rows)
    precision = resolve_precision(layout, machine)
    costs = unit_costs(
        config,
        machine=machine,
        layout=layout,
        precision=precision,
        micro_rows=micro_rows,
        row_len=row_len,
        accumulated=n_micro_batches > 1,
    )
    units = [costs[kind] for kind in unit_kinds(config)]
    stages = _stages(units, config, machine, layout)
    stage_costs = [reduce(UnitCost.plus, (units[i] for i in stage), NOTHING) for stage in stages]
    tokens = micro_rows * row_len / layout.cp
    passed_on = stage_traffic(config, layout, machine, n_tokens=tokens, precision=precision)
    timeline = simulate(
        layout.schedule,
        n_stages=layout.pp,
        n_micro_batches=n_micro_batches,
        times=[stage_seconds(cost, machine, layout, send_seconds=passed_on.seconds(machine)) for cost in stage_costs],
        chunks=layout.chunks,
    )
    held = held_by_rank(config, layout, machine, stages)
    busiest = min(range(layout.pp), key=lambda rank: timeline.bubble_seconds[rank])
    exposed = _exposed_seconds(timeline, stage_costs, layout, busiest, n_micro_batches)
    busy = reduce(WorkSeconds.plus, (stage_costs[stage].work for stage in layout.stages_of(busiest)), WorkSeconds())
    step = StepSeconds(
        compute_seconds=timeline.step_seconds - timeline.bubble_seconds[busiest] - exposed,
        exposed_communication_seconds=exposed,
        bubble_seconds=timeline.bubble_seconds[busiest],
        gradient_communication_seconds=max(
            exposed_gradient_seconds(
                of_rank,
                layout,
                machine,
                n_micro_batches=n_micro_batches,
                micro_batch_seconds=sum(stage_costs[stage].work_seconds for stage in layout.stages_of(rank)),
            )
            for rank, of_rank in enumerate(held)
        ),
        optimizer_seconds=max(
            optimizer_seconds(of_rank, layout, machine, optimizer=optimizer, precision=precision) for of_rank in held
        ),
    )
    memory = memory_by_rank(
        config,
        held,
        machine=machine,
        layout=layout,
        precision=precision,
        stages=stages,
        units=units,
        activations_bytes=timeline.schedule.most_in_flight([cost.saved_bytes for cost in stage_costs]),
        accumulated=n_micro_batches > 1,
        micro_rows=micro_rows,
        row_len=row_len,
        optimizer=optimizer,
    )
    limit_bytes = machine.memory_bytes * machine.usable_memory_share.value
    return TrainingPlan(
        layout=layout,
        precision=precision,
        stages=tuple(stages),
        timeline=timeline,
        price_usd_per_device_hour=None if (price := machine.price_usd_per_device_hour) is None else price.value,
        tokens_per_step=batch_rows * row_len,
        n_micro_batches=n_micro_batches,
        step=step,
        sent=_sent(
            [stage_costs[stage] for stage in layout.stages_of(busiest)],
            passed_on,
            held[busiest],
            layout,
            n_micro_batches,
        ),
        flops_per_token=flops_per_token(config, row_len),
        peak_flops_per_second=machine.peak_flops_per_second[machine.computes_in(precision)],
        memory=memory,
        memory_limit_bytes=limit_bytes,
        bottleneck=bottleneck_of(step, busy),
        advice="",
    )


def flops_per_token(config: ModelConfig, row_len: int) -> float:
    """Forward and twice that backward, of rows of `row_len` tokens; MTP and recomputation left out. V3 at 4,096: 250e9,
    as ISCA 2025, table 2 counts."""
    operations = head_operations(config, n_rows=1, new_tokens=row_len, precision="bfloat16")
    flops = sum(o.flops for o in operations)
    for layer in {config.is_moe(layer): layer for layer in range(config.num_hidden_layers)}.values():  # one of a kind
        alike = sum(config.is_moe(other) == config.is_moe(layer) for other in range(config.num_hidden_layers))
        operations = layer_operations(config, layer, n_rows=1, new_tokens=row_len, precision="bfloat16")
        flops += alike * sum(o.flops for o in operations)
    return 3 * flops / row_len


def resolve_precision(layout: Layout, machine: MachineSpec) -> Precision:
    """ "auto": BF16 where the machine has products in it, else FP32."""
    if layout.precision == "auto":
        return machine.computes_in("bfloat16")
    return machine.computes_in(layout.precision)


def stage_seconds(cost: UnitCost, machine: MachineSpec, layout: Layout, *, send_seconds: float = 0.0) -> StageSeconds:
    """DualPipe's pairs hide expert communication behind computing, which goes on with the compute units that are left;
    other schedules hide it behind shared experts only, which wait for no other rank. (V2 section 3.1.3; memory)"""
    forward_experts, backward_experts = cost.forward_experts_seconds, cost.backward_experts_seconds
    pairs = layout.schedule in ("dualpipe", "dualpipev")
    if layout.overlap_expert_communication and not pairs:
        beside = cost.beside_experts.total_seconds
        forward_experts = max(0.0, forward_experts - beside)
        backward_experts = max(0.0, backward_experts - 2 * beside)
    forward = cost.forward.total_seconds + cost.forward_exposed_seconds + forward_experts
    backward = cost.backward_input.total_seconds + cost.backward_exposed_seconds + backward_experts
    pair = None
    if layout.overlap_expert_communication and pairs:
        parts = (cost.forward, cost.backward_input, cost.backward_weight)
        beside_seconds = sum(part.beside_communication(machine) for part in parts)
        apart = forward + backward + cost.backward_weight.total_seconds
        exposed = cost.forward_exposed_seconds + cost.backward_exposed_seconds
        pair = min(apart, max(beside_seconds, forward_experts + backward_experts) + exposed)
    return StageSeconds(
        forward_seconds=forward,
        backward_input_seconds=backward,
        backward_weight_seconds=cost.backward_weight.total_seconds,
        overlapped_pair_seconds=pair,
        send_seconds=send_seconds,
        forward_experts_seconds=forward_experts,
        backward_experts_seconds=backward_experts,
    )


def _stages(units: list[UnitCost], config: ModelConfig, machine: MachineSpec, layout: Layout) -> list[range]:
    """Head and MTP modules are one piece: they share the head's matrix."""
    whole = [unit.work_seconds for unit in units]
    n_tail = config.num_nextn_predict_layers
    costs = [*whole[: len(whole) - n_tail - 1], sum(whole[len(whole) - n_tail - 1 :])]
    whole_model = stage_seconds(reduce(UnitCost.plus, units, NOTHING), machine, layout)
    apart_seconds = whole_model.forward_seconds + whole_model.backward_seconds
    hidden_share = (apart_seconds - whole_model.pair_seconds) / sum(costs)
    stages = split(costs, layout, hidden_share=min(0.5, hidden_share))
    return [*stages[:-1], range(stages[-1].start, len(units))]


def _exposed_seconds(
    timeline: Timeline, stage_costs: list[UnitCost], layout: Layout, rank: int, n_micro_batches: int
) -> float:
    """Communication for which the rank's computing waits: experts' by the timeline, tensor and context ranks' all."""
    each = [
        stage_costs[stage].forward_exposed_seconds + stage_costs[stage].backward_exposed_seconds
        for stage in layout.stages_of(rank)
    ]
    passes = n_micro_batches / layout.stage_copies
    experts = timeline.exposed_communication_seconds[rank] - timeline.waiting_seconds[rank]
    return passes * sum(each) + experts


def _sent(
    stages: list[UnitCost], passed_on: Traffic, held: HeldWeights, layout: Layout, n_micro_batches: int
) -> tuple[SentBytes, ...]:
    passes = n_micro_batches / layout.stage_copies  # through each of the rank's stages
    inside = reduce(UnitCost.plus, stages, NOTHING)
    ways: dict[Way, Traffic] = {
        "experts": inside.experts_sent.times(passes),
        "tensor": inside.tensor_sent.times(passes),
        "context": inside.context_sent.times(passes),
        "pipeline": passed_on.times(2 * passes * len(stages)),
        "gradients": gradient_traffic(held, layout),
    }
    return tuple(
        SentBytes(way=way, inter_node_bytes=sent.inter_node_bytes, intra_node_bytes=sent.intra_node_bytes)
        for way, sent in ways.items()
    )
