"""Every rank's shard of a model, built on torch's meta device: the plan's memory held to the tensors of `Transformer`.

The plan counts with formulas; here names and shapes are those of the model itself, cut as the layout says. A tensor on
meta has a shape and no memory, so all ranks of a cluster are built on a laptop. Ranks whose shards look alike are a
class: one of them is built, the others are counted. This is the room's one file that needs torch to be imported, and no
other file of it imports this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from abyssal.model.config import ModelConfig
from abyssal.model.transformer import Transformer
from abyssal.plan.eager_memory import is_muon
from abyssal.plan.layout import Layout
from abyssal.plan.machine_file import Precision
from abyssal.plan.memory import RankMemory
from abyssal.plan.parameters import Weight, weights
from abyssal.plan.training_plan import TrainingPlan
from abyssal.plan.weight_updates import Optimizer

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
SCALED = 128  # numbers in FP8 that have one FP32 scale (DeepSeek-V3 section 3.3.2)
Part = Literal["weights", "master", "moments", "gradients"]


class Place(NamedTuple):
    """Where a rank stands. Tensor ranks are neighbours, then context and data ranks; pipeline ranks are farthest apart.

    `copy` counts the ranks that hold the same weights, `expert_copy` those that hold the same experts: ZeRO shares out
    by them.
    """

    pipeline: int
    tensor: int
    expert: int
    copy: int
    expert_copy: int


class Piece(NamedTuple):
    """Rows `start` to `end` of a weight, along the dimension in which it is cut."""

    name: str
    dim: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class RankShard:
    """What one rank holds, as tensors on meta. Optimizer state is flat: a share of its numbers laid end to end.

    `owned` are the numbers whose optimizer state lies here, of each kind of `Held`.
    """

    pieces: tuple[Piece, ...]
    tensors: dict[Part, tuple[Tensor, ...]]
    owned: tuple[range, range, range]

    def part_bytes(self, part: Part) -> int:
        return sum(tensor.nbytes for tensor in self.tensors[part])


@dataclass(frozen=True, kw_only=True)
class ShardClass:
    """Ranks whose shards have the same shapes: one of them, and how many they are."""

    n_ranks: int
    pipeline_ranks: tuple[int, ...]
    holds: str
    shard: RankShard


class ShardRow(NamedTuple):
    """One part of one class, built and planned, in bytes a rank."""

    n_ranks: int
    pipeline_ranks: tuple[int, ...]
    holds: str
    part: Part
    built_bytes: int
    planned_bytes: float


@dataclass(frozen=True, kw_only=True)
class AllShards:
    """Every rank's shard by class and part, and the numbers that they are together, each counted once."""

    n_ranks: int
    n_weights: int  # of the main model
    n_mtp_weights: int
    rows: tuple[ShardRow, ...]


class Held(NamedTuple):
    """What of the model's weights a rank computes with, and how many numbers it trains, by what becomes of their state:
    AdamW's, and Muon's, both without experts, and experts'."""

    pieces: tuple[Piece, ...]
    n_adamw: int
    n_muon: int
    n_experts: int


class Sharding:
    """A model laid over ranks. `stages` are ranges of units: embedding, layers, last norm and head, MTP modules."""

    def __init__(
        self, config: ModelConfig, *, layout: Layout, stages: Sequence[range], optimizer: Optimizer = "adamw"
    ) -> None:
        if not layout.dp:
            raise ValueError("parallel.dp is not filled in; use layout.on(machine)")
        if len(stages) != layout.n_stages:
            raise ValueError(f"{len(stages)} stages were split, the layout has {layout.n_stages}; split anew")
        self.config, self.layout, self.stages = config, layout, stages
        self.optimizer = optimizer
        with torch.device("meta"):
            self.state: dict[str, Tensor] = Transformer(config).state_dict()
        self.cuts: dict[str, Weight] = {weight.name: weight for weight in weights(config)}
        self.units: dict[int, list[str]] = {}
        for name in self.state:
            self.units.setdefault(_unit(name, config), []).append(name)
        self.known: dict[tuple[object, ...], Held] = {}
        per_stage = layout.dp * layout.cp * layout.tp
        self.n_copies = layout.dp * layout.cp * layout.stage_copies  # ranks with the same weights, experts left out
        self.n_expert_copies = per_stage // layout.ep * layout.stage_copies

    def places(self) -> Iterator[Place]:
        """Of every rank, in order."""
        layout = self.layout
        per_stage = layout.dp * layout.cp * layout.tp
        for rank in range(layout.n_devices):
            pipeline, position = divmod(rank, per_stage)
            data, tensor = divmod(position, layout.tp)
            expert_data, expert = divmod(position, layout.ep)
            # DualPipe's ranks r and pp - 1 - r hold the same two stages
            behind = int(layout.stage_copies == 2 and pipeline >= layout.pp // 2)
            yield Place(
                pipeline=pipeline,
                tensor=tensor,
                expert=expert,
                copy=data + behind * self.n_copies // 2,
                expert_copy=expert_data + behind * self.n_expert_copies // 2,
            )

    def held(self, place: Place) -> Held:
        stages = tuple(sorted(self.layout.stages_of(place.pipeline)))
        key = (stages, place.tensor, place.expert)
        if key not in self.known:
            pieces = tuple(self._pieces(stages, tensor=place.tensor, expert=place.expert))
            sizes = [0, 0, 0]
            for piece in pieces:
                cut, whole = self.cuts[piece.name], self.state[piece.name]
                if cut.is_trained:
                    kind = 2 if cut.is_routed else int(self.optimizer == "muon" and is_muon(cut))
                    sizes[kind] += whole.numel() // whole.shape[piece.dim] * (piece.end - piece.start)
            self.known[key] = Held(pieces, *sizes)
        return self.known[key]

    def _pieces(self, stages: Sequence[int], *, tensor: int, expert: int) -> Iterator[Piece]:
        units = [unit for stage in stages for unit in self.stages[stage]]
        names = [name for unit in units for name in self.units.get(unit, [])]
        if self.config.tie_word_embeddings and self.config.num_hidden_layers + 1 in units and 0 not in units:
            names += self.units[0]  # the head is the embedding table: on its own stage it is held once more
        for name in names:
            shape, cut = self.state[name].shape, self.cuts[name]
            if cut.is_routed:
                yield Piece(name, 0, *_share(shape[0], expert, self.layout.ep))
            elif cut.tp_dim is not None:
                yield Piece(name, cut.tp_dim, *_share(shape[cut.tp_dim], tensor, self.layout.tp))
            else:
                yield Piece(name, 0, 0, shape[0])

    def tensor(self, piece: Piece) -> Tensor:
        return self.state[piece.name].narrow(piece.dim, piece.start, piece.end - piece.start)

    def owned(self, place: Place) -> tuple[range, range, range]:
        """Numbers whose optimizer state lies on the rank, of each kind that it trains."""
        _, n_adamw, n_muon, n_experts = self.held(place)
        if not self.layout.zero:
            return range(n_adamw), range(n_muon), range(n_experts)
        return (
            range(*_share(n_adamw, place.copy, self.n_copies)),
            range(*_share(n_muon, place.copy, self.n_copies)),
            range(*_share(n_experts, place.expert_copy, self.n_expert_copies)),
        )

    def build(self, place: Place) -> RankShard:
        """The tensors themselves."""
        layout, pieces, owned = self.layout, self.held(place).pieces, self.owned(place)
        trained = [self.tensor(piece) for piece in pieces if self.cuts[piece.name].is_trained]
        idle = [self.tensor(piece) for piece in pieces if not self.cuts[piece.name].is_trained]
        share = [torch.empty(len(numbers), device="meta") for numbers in owned]
        second = share[:1] if self.optimizer == "muon" else share  # Muon keeps its momentum alone
        return RankShard(
            pieces=pieces,
            owned=owned,
            tensors={
                "weights": typed((share if layout.zero >= 3 else trained) + idle, layout.weights),
                "master": typed(share if layout.master != layout.weights else [], layout.master),
                "moments": typed(share + second, layout.moments),
                "gradients": typed(share if layout.zero >= 2 else trained, layout.gradients),
            },
        )

    def classes(self) -> list[ShardClass]:
        """Every rank's, by what its shard looks like, in order of the first pipeline rank."""
        alike: dict[tuple[object, ...], list[Place]] = {}
        for place in self.places():
            shapes = tuple((piece.name, piece.end - piece.start) for piece in self.held(place).pieces)
            n_owned = tuple(len(numbers) for numbers in self.owned(place))
            alike.setdefault((shapes, n_owned), []).append(place)
        return [
            ShardClass(
                n_ranks=len(places),
                pipeline_ranks=tuple(sorted({place.pipeline for place in places})),
                holds=self._in_words(places[0].pipeline),
                shard=self.build(places[0]),
            )
            for places in alike.values()
        ]

    def n_weights(self) -> tuple[int, int]:
        """Numbers that all ranks hold together, each counted once however many hold it: (main model, MTP modules)."""
        distinct = {piece for place in self.places() for piece in self.held(place).pieces}
        counts = {True: 0, False: 0}
        for piece in distinct:
            counts[piece.name.startswith("mtp.")] += self.tensor(piece).numel()
        return counts[False], counts[True]

    def _in_words(self, pipeline: int) -> str:
        """'embedding, layers 0-2, head, MTP'."""
        n_layers = self.config.num_hidden_layers
        units = sorted(unit for stage in self.layout.stages_of(pipeline) for unit in self.stages[stage])
        layers = [unit - 1 for unit in units if 1 <= unit <= n_layers]
        firsts = [layer for layer in layers if layer - 1 not in layers]
        lasts = [layer for layer in layers if layer + 1 not in layers]
        words = ["embedding"] if 0 in units else []
        for first, last in zip(firsts, lasts, strict=True):
            words.append(f"layer {first}" if first == last else f"layers {first}-{last}")
        words += ["head"] if n_layers + 1 in units else []
        words += ["MTP"] if units[-1] > n_layers + 1 else []
        return ", ".join(words)


def all_shards(config: ModelConfig, plan: TrainingPlan, *, optimizer: Optimizer = "adamw") -> AllShards:
    """Those of a plan's stages and layout, beside the memory that it counts by formulas."""
    if plan.layout.is_one_device:
        raise ValueError("every device holds the whole model; shards need parallel.pp, ep, tp, cp or zero to cut it")
    sharding = Sharding(config, layout=plan.layout, stages=plan.stages, optimizer=optimizer)
    n_weights, n_mtp_weights = sharding.n_weights()
    return AllShards(
        n_ranks=plan.layout.n_devices,
        n_weights=n_weights,
        n_mtp_weights=n_mtp_weights,
        rows=shard_rows(sharding.classes(), plan.memory),
    )


def shard_rows(classes: Sequence[ShardClass], memory: Sequence[RankMemory]) -> tuple[ShardRow, ...]:
    """Bytes a rank of every class by part, built beside planned. `memory` is a plan's, by pipeline rank."""
    return tuple(
        ShardRow(
            one.n_ranks,
            one.pipeline_ranks,
            one.holds,
            part,
            one.shard.part_bytes(part),
            getattr(memory[one.pipeline_ranks[0]], f"{part}_bytes"),
        )
        for one in classes
        for part in get_args(Part)
    )


def _unit(name: str, config: ModelConfig) -> int:
    """Which unit of the pipeline a weight belongs to, by its name."""
    room, _, rest = name.partition(".")
    if room == "embed_tokens":
        return 0
    if room == "layers":
        return 1 + int(rest.partition(".")[0])
    behind = config.num_hidden_layers + 1
    return behind + 1 + int(rest.partition(".")[0]) if room == "mtp" else behind


def _share(n: int, index: int, n_shares: int) -> tuple[int, int]:
    """Start and end of a share of n numbers; where they do not divide, the last ranks have less."""
    size = -(-n // n_shares)
    return min(n, index * size), min(n, (index + 1) * size)


def typed(tensors: Sequence[Tensor], precision: Precision) -> tuple[Tensor, ...]:
    """The same shapes in that type; FP8 with its scales."""
    typed = [tensor.to(DTYPES[precision]) for tensor in tensors]
    if precision == "fp8":
        typed += [torch.empty(-(-tensor.numel() // SCALED), device="meta") for tensor in tensors]
    return tuple(typed)
