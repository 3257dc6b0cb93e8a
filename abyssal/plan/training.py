"""What training takes: seconds of a step by part, memory of each rank by part, and from them hours, cost and advice."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import reduce

from abyssal.model.config import ModelConfig
from abyssal.plan.communication import gradient_groups, ring_seconds, stage_traffic
from abyssal.plan.layout import NUMBER_BYTES, Layout
from abyssal.plan.machine_file import MachineSpec, Precision
from abyssal.plan.memory import HeldWeights, RankMemory, held_weights, rank_memory
from abyssal.plan.operations import head_operations, layer_operations
from abyssal.plan.parameters import Weight, weights
from abyssal.plan.simulate import StageSeconds, Timeline, simulate
from abyssal.plan.stage_split import split
from abyssal.plan.unit_costs import NOTHING, UnitCost, unit_costs, unit_kinds

SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """One optimizer step of the busiest rank, by part; the parts add up."""

    compute_seconds: float  # forward, backward and what is computed again
    exposed_communication_seconds: float  # of experts, tensor and context parallel, as far as nothing hides it
    bubble_seconds: float
    gradient_communication_seconds: float  # as far as nothing hides it
    optimizer_seconds: float

    @property
    def total_seconds(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    tokens: float
    steps: float
    hours: float
    device_hours: float
    cost_usd: float | None  # None: the machine has no price


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    layout: Layout
    precision: Precision  # that products are computed in
    stages: tuple[range, ...]  # units of each stage: embedding, layers, head, MTP modules, counted from 0
    timeline: Timeline
    price_usd_per_device_hour: float | None
    tokens_per_step: int
    n_micro_batches: int
    step: StepSeconds
    flops_per_token: float  # forward and backward; MTP and what is computed again left out (as ISCA 2025, table 2)
    peak_flops_per_second: float  # of one device, in the precision of the products, from the data sheet
    memory: tuple[RankMemory, ...]  # by pipeline rank
    memory_limit_bytes: float  # of one device
    bottleneck: str
    advice: str  # what to change, where it does not fit; "" where it does

    @property
    def step_seconds(self) -> float:
        return self.step.total_seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together."""
        return self.tokens_per_step / self.step_seconds

    @property
    def flops_per_second_per_device(self) -> float:
        return self.flops_per_token * self.tokens_per_second / self.layout.n_devices

    @property
    def mfu(self) -> float:
        """Share of the data sheet's peak that the model's own FLOP make use of."""
        return self.flops_per_second_per_device / self.peak_flops_per_second

    @property
    def peak_memory_bytes(self) -> float:
        return max(rank.total_bytes for rank in self.memory)

    @property
    def fits(self) -> bool:
        return self.peak_memory_bytes <= self.memory_limit_bytes

    def for_tokens(self, tokens: float) -> TrainingCost:
        hours = tokens / self.tokens_per_second / SECONDS_PER_HOUR
        device_hours = hours * self.layout.n_devices
        price = self.price_usd_per_device_hour
        return TrainingCost(
            tokens=tokens,
            steps=tokens / self.tokens_per_step,
            hours=hours,
            device_hours=device_hours,
            cost_usd=None if price is None else price * device_hours,
        )


def plan_training(
    config: ModelConfig,
    *,
    machine: MachineSpec,
    layout: Layout,
    row_len: int,
    batch_rows: int,
    optimizer: str = "adamw",
) -> TrainingPlan:
    """A step of `batch_rows` rows of `row_len` tokens on all devices that the layout uses."""
    layout = layout.on(machine)
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
    stages = _stages(units, config, layout)
    stage_costs = [reduce(UnitCost.plus, (units[i] for i in stage), NOTHING) for stage in stages]
    tokens = micro_rows * row_len / layout.cp
    send = stage_traffic(config, layout, machine, n_tokens=tokens, precision=precision).seconds(machine)
    timeline = simulate(
        layout.schedule,
        n_stages=layout.pp,
        n_micro_batches=n_micro_batches,
        times=[stage_seconds(cost, machine, layout, send_seconds=send) for cost in stage_costs],
        chunks=layout.chunks,
    )
    held = _held_by_rank(config, layout, machine, stages)
    last_backward = min(t.backward_seconds for t in timeline.times)
    gradients = max(_gradient_seconds(h, layout, machine) for h in held)
    if layout.overlap_gradient_communication:
        gradients = max(0.0, gradients - last_backward)
    busiest = min(range(layout.pp), key=lambda rank: timeline.bubble_seconds[rank])
    exposed = _exposed_seconds(timeline, stage_costs, layout, busiest, n_micro_batches)
    step = StepSeconds(
        compute_seconds=timeline.step_seconds - timeline.bubble_seconds[busiest] - exposed,
        exposed_communication_seconds=exposed,
        bubble_seconds=timeline.bubble_seconds[busiest],
        gradient_communication_seconds=gradients,
        optimizer_seconds=max(_optimizer_seconds(h, layout, machine) for h in held),
    )
    activations = timeline.schedule.most_in_flight([cost.saved_bytes for cost in stage_costs])
    memory = tuple(
        rank_memory(
            rank,
            layout=layout,
            held=held[rank],
            activations_bytes=activations[rank],
            temporary_bytes=0.0,
            moments_per_number=2.0,
        )
        for rank in range(layout.pp)
    )
    return TrainingPlan(
        layout=layout,
        precision=precision,
        stages=tuple(stages),
        timeline=timeline,
        price_usd_per_device_hour=None if (price := machine.price_usd_per_device_hour) is None else price.value,
        tokens_per_step=batch_rows * row_len,
        n_micro_batches=n_micro_batches,
        step=step,
        flops_per_token=flops_per_token(config, row_len),
        peak_flops_per_second=machine.peak_flops_per_second[machine.computes_in(precision)],
        memory=memory,
        memory_limit_bytes=machine.memory_bytes * machine.usable_memory_share.value,
        bottleneck="",
        advice="",
    )


def flops_per_token(config: ModelConfig, row_len: int) -> float:
    """Forward and twice that backward, of rows of `row_len` tokens; MTP and recomputation left out. V3 at 4,096: 250e9,
    as ISCA 2025, table 2 counts."""
    layers = [
        layer_operations(config, layer, n_rows=1, new_tokens=row_len, precision="bfloat16")
        for layer in range(config.num_hidden_layers)
    ]
    operations = [o for layer in layers for o in layer] + head_operations(
        config, n_rows=1, new_tokens=row_len, precision="bfloat16"
    )
    return 3 * sum(o.flops for o in operations) / row_len


def resolve_precision(layout: Layout, machine: MachineSpec) -> Precision:
    """ "auto": BF16 where the machine has products in it, else FP32."""
    if layout.precision == "auto":
        return machine.computes_in("bfloat16")
    return machine.computes_in(layout.precision)


def stage_seconds(cost: UnitCost, machine: MachineSpec, layout: Layout, *, send_seconds: float = 0.0) -> StageSeconds:
    """DualPipe's pairs hide expert communication behind computing, which goes on with the compute units that are left;
    other schedules hide it behind shared experts only, which wait for no other rank. (DeepSeek-V2 section 3.1.3)"""
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


def _stages(units: list[UnitCost], config: ModelConfig, layout: Layout) -> list[range]:
    """Head and MTP modules are one piece: they share the head's matrix."""
    whole = [unit.work_seconds for unit in units]
    n_tail = config.num_nextn_predict_layers
    costs = [*whole[: len(whole) - n_tail - 1], sum(whole[len(whole) - n_tail - 1 :])]
    stages = split(costs, layout)
    return [*stages[:-1], range(stages[-1].start, len(units))]


def _held_by_rank(config: ModelConfig, layout: Layout, machine: MachineSpec, stages: list[range]) -> list[HeldWeights]:
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


def _gradient_seconds(held: HeldWeights, layout: Layout, machine: MachineSpec) -> float:
    """Gradients are summed over the ranks that hold the same weights, and new weights handed out: a reduce-scatter and
    an all-gather, whether the optimizer's state is shared out or not."""
    reduced, gathered = NUMBER_BYTES[layout.gradients], NUMBER_BYTES[layout.weights]
    return sum(
        ring_seconds(n * reduced, group, machine) + ring_seconds(n * gathered, group, machine)
        for n, group in ((held.whole, held.group), (held.routed, held.routed_group))
    )


def _optimizer_seconds(held: HeldWeights, layout: Layout, machine: MachineSpec) -> float:
    """Passes over memory: the gradients' norm, then AdamW, which reads gradients and reads and writes masters and both
    moments, writes the weights that products read, and clears all gradients for the next step."""
    trained = held.total - held.idle
    n = held.trained_share if layout.zero >= 1 else trained
    gradient, master = NUMBER_BYTES[layout.gradients], NUMBER_BYTES[layout.master]
    updated = n * (2 * gradient + 2 * master + 4 * NUMBER_BYTES[layout.moments])
    written = 0.0 if layout.weights == layout.master else trained * NUMBER_BYTES[layout.weights]
    return machine.memory_seconds(updated + written + trained * gradient)


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
