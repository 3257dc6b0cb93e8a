"""Memory of each pipeline rank by part. Owns what is kept, where and in what type; no seconds."""

from __future__ import annotations

from collections.abc import Sequence
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
    tensors: tuple[Weight, ...]  # whole, before ranks share them out

    @property
    def total(self) -> int:
        return self.whole + self.routed

    @property
    def trained_share(self) -> float:
        """Numbers whose optimizer state lies on one rank once the ranks that hold the same share it out."""
        return (self.whole - self.idle) / self.group.size + self.routed / self.routed_group.size


def held_weights(tensors: Sequence[Weight], layout: Layout, groups: tuple[Group, Group]) -> HeldWeights:
    whole = routed = idle = 0
    for weight in tensors:
        n = on_rank(weight, tp=layout.tp, ep=layout.ep)
        routed += n if weight.is_routed else 0
        whole += 0 if weight.is_routed else n
        idle += 0 if weight.is_trained else n
    return HeldWeights(
        whole=whole, routed=routed, idle=idle, group=groups[0], routed_group=groups[1], tensors=tuple(tensors)
    )


def rank_memory(
    rank: int,
    *,
    layout: Layout,
    held: HeldWeights,
    activations_bytes: float,
    temporary_bytes: float,
    moments_per_number: float,
) -> RankMemory:
    """What is kept for backward is the schedule's to say, in order of its work (`Schedule.most_in_flight`)."""
    share = held.trained_share
    trained = held.total - held.idle
    # what ZeRO shares out lies on one of the ranks that hold the same weights
    weights = share + held.idle if layout.zero >= 3 else held.total
    gradients = share if layout.zero >= 2 else trained
    optimizer = share if layout.zero >= 1 else trained
    return RankMemory(
        rank=rank,
        weights_bytes=NUMBER_BYTES[layout.weights] * weights,
        master_bytes=0.0 if layout.master == layout.weights else NUMBER_BYTES[layout.master] * optimizer,
        moments_bytes=moments_per_number * NUMBER_BYTES[layout.moments] * optimizer,
        gradients_bytes=NUMBER_BYTES[layout.gradients] * gradients,
        activations_bytes=activations_bytes,
        temporary_bytes=temporary_bytes,
    )
