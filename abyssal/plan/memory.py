"""Memory of each pipeline rank by part. Owns what is kept, where and in what type; no seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from abyssal.plan.communication import Group
from abyssal.plan.layout import NUMBER_BYTES, Layout
from abyssal.plan.parameters import Weight, on_rank


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """The most that one device of a pipeline rank holds at once, by part."""

    rank: int
    weights_bytes: float  # what products read; the master copy too where it is of the same type
    master_bytes: float
    moments_bytes: float
    gradients_bytes: float
    activations_bytes: float  # kept for backward, of all micro-batches in flight
    temporary_bytes: float  # what one operation needs while it runs

    @property
    def total_bytes(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self) if f.name.endswith("_bytes"))


@dataclass(frozen=True, kw_only=True)
class HeldWeights:
    """Numbers of weights that one rank's products read, and how many ranks hold the same ones."""

    whole: int  # held by every rank of the stage, or shared out among tp
    routed: int  # of experts
    idle: int  # of both, what no optimizer moves: balance biases
    group: Group
    routed_group: Group

    @property
    def total(self) -> int:
        return self.whole + self.routed

    @property
    def trained_share(self) -> float:
        """Numbers whose optimizer state lies on one rank once the ranks that hold the same share it out."""
        return (self.whole - self.idle) / self.group.size + self.routed / self.routed_group.size


def held_weights(tensors: Iterable[Weight], layout: Layout, groups: tuple[Group, Group]) -> HeldWeights:
    whole = routed = idle = 0
    for weight in tensors:
        n = on_rank(weight, tp=layout.tp, ep=layout.ep)
        routed += n if weight.is_routed else 0
        whole += 0 if weight.is_routed else n
        idle += 0 if weight.is_trained else n
    return HeldWeights(whole=whole, routed=routed, idle=idle, group=groups[0], routed_group=groups[1])


def stage_activations_in_flight(layout: Layout, rank: int, n_micro_batches: int) -> int:
    """Activations of one stage and one micro-batch that a rank keeps at most, all its stages together.

    1F1B and ZB1P: those of the micro-batches between its first forward and backward. (DeepSeek-V3 table 2) Interleaved:
    Narayanan et al. 2021, section 2.2. ZBV: Qi et al. 2023, section 6. DualPipe and DualPipeV: stages + 1. (table 2)
    """
    pp, n = layout.pp, n_micro_batches
    stages = layout.stages_per_rank
    most = {
        "none": 1,
        "1f1b": pp - rank,
        "zb1p": pp - rank,
        "interleaved": 2 * (pp - rank - 1) + (layout.chunks - 1) * pp + 1,
        "zbv": 2 * pp,
        "dualpipe": pp + 1,
        "dualpipev": 2 * pp + 1,
    }[layout.schedule]
    # a rank of DualPipe computes every micro-batch once, on one of its two stages
    return min(most, n * (1 if layout.schedule == "dualpipe" else stages))


def rank_memory(
    rank: int,
    *,
    layout: Layout,
    n_micro_batches: int,
    held: HeldWeights,
    saved_bytes: Sequence[float],
    temporary_bytes: float,
    moments_per_number: float,
) -> RankMemory:
    """`saved_bytes` are of one micro-batch, of each stage that the rank holds."""
    share = held.trained_share
    trained = held.total - held.idle
    # what ZeRO shares out lies on one of the ranks that hold the same weights
    weights = share + held.idle if layout.zero >= 3 else held.total
    gradients = share if layout.zero >= 2 else trained
    optimizer = share if layout.zero >= 1 else trained
    in_flight = stage_activations_in_flight(layout, rank, n_micro_batches)
    return RankMemory(
        rank=rank,
        weights_bytes=NUMBER_BYTES[layout.weights] * weights,
        master_bytes=0.0 if layout.master == layout.weights else NUMBER_BYTES[layout.master] * optimizer,
        moments_bytes=moments_per_number * NUMBER_BYTES[layout.moments] * optimizer,
        gradients_bytes=NUMBER_BYTES[layout.gradients] * gradients,
        # the fuller of its stages is the one that may be in flight most
        activations_bytes=in_flight * sum(saved_bytes) / len(saved_bytes),
        temporary_bytes=temporary_bytes,
    )
