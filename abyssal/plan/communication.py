"""What ranks send each other: volumes by link and the seconds they take when nothing hides them.

Expert traffic is counted by places: a token goes once to each node that holds one of its experts and from there to each
rank that does (DeepSeek-V3 section 3.2.2), so what matters is how many different nodes and ranks K experts are on.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from abyssal.model.config import ModelConfig
from abyssal.plan.layout import NUMBER_BYTES, Layout
from abyssal.plan.machine_file import Link, MachineSpec, Precision
from abyssal.plan.operation import not_fp8


class Traffic(NamedTuple):
    """What one rank sends, by the slower and the faster kind of link, and in how many messages one after the other."""

    inter_node_bytes: float = 0.0
    intra_node_bytes: float = 0.0
    messages: int = 0

    def seconds(self, machine: MachineSpec) -> float:
        """Both kinds of link work at the same time."""
        if not self.messages:
            return 0.0
        over = [(self.inter_node_bytes, machine.inter_node), (self.intra_node_bytes, machine.intra_node)]
        used = [(n_bytes, link) for n_bytes, link in over if n_bytes and link is not None]
        if not used:
            return 0.0
        slowest = max(n_bytes / link.bytes_per_second.value for n_bytes, link in used)
        return slowest + self.messages * max(link.latency_seconds.value for _, link in used)

    def times(self, factor: float) -> Traffic:
        return Traffic(self.inter_node_bytes * factor, self.intra_node_bytes * factor, round(self.messages * factor))

    def plus(self, other: Traffic) -> Traffic:
        return Traffic(
            self.inter_node_bytes + other.inter_node_bytes,
            self.intra_node_bytes + other.intra_node_bytes,
            self.messages + other.messages,
        )


def places_hit(*, n_places: int, n_reachable: int, n_experts: int, n_chosen: int) -> float:
    """Different places (nodes or ranks) of the `n_chosen` experts of a token, on average, where all experts of
    `n_reachable` of the `n_places` are equally likely. V3: 8 of the 128 experts on 4 nodes are on 3.65."""
    n_reachable = min(n_reachable, n_places)
    each = n_experts // n_places
    pool = each * n_reachable
    if each == 0 or n_chosen > pool:
        return float(n_reachable)
    missed = math.comb(pool - each, n_chosen) / math.comb(pool, n_chosen)
    return n_reachable * (1 - missed)


class ExpertPlaces(NamedTuple):
    nodes: float  # different nodes that a token's experts are on
    ranks: float  # different ranks
    n_nodes: int  # nodes that the expert ranks span
    n_ranks_per_node: int


def expert_places(config: ModelConfig, layout: Layout, machine: MachineSpec) -> ExpertPlaces:
    """The router's groups are places: `topk_group` of `n_group` (V3: nodes; V2: ranks)."""
    ranks_per_node = min(layout.ep, machine.devices_per_node)
    n_nodes = -(-layout.ep // machine.devices_per_node)
    reachable = math.ceil(n_nodes * config.topk_group / config.n_group) if config.n_group >= n_nodes else n_nodes
    if layout.experts_nodes:
        reachable = min(reachable, layout.experts_nodes)
    shape = {"n_experts": config.n_routed_experts, "n_chosen": config.num_experts_per_tok}
    nodes = places_hit(n_places=n_nodes, n_reachable=reachable, **shape)
    reachable_ranks = reachable * ranks_per_node
    if config.n_group >= layout.ep:
        reachable_ranks = min(reachable_ranks, math.ceil(layout.ep * config.topk_group / config.n_group))
    ranks = places_hit(n_places=layout.ep, n_reachable=reachable_ranks, **shape)
    return ExpertPlaces(nodes, ranks, n_nodes, ranks_per_node)


def expert_traffic(
    config: ModelConfig, layout: Layout, machine: MachineSpec, *, n_tokens: float, precision: Precision
) -> tuple[Traffic, Traffic]:
    """(dispatch, combine) of one MoE layer forward, for a rank's `n_tokens`. Backward sends the same the other way
    round: gradients are dispatched where results were combined. Under FP8 dispatch is FP8, combine stays BF16.
    (DeepSeek-V3 section 3.3.3)"""
    if layout.ep == 1:
        return Traffic(), Traffic()
    places = expert_places(config, layout, machine)
    # what stays on its own node or rank is not sent
    remote_nodes = places.nodes * (1 - 1 / places.n_nodes)
    remote_ranks = places.ranks * (1 - 1 / places.n_ranks_per_node)
    numbers = n_tokens * config.hidden_size
    dispatch, combine = NUMBER_BYTES[precision] * numbers, NUMBER_BYTES[not_fp8(precision)] * numbers
    messages = 1 if places.n_nodes == 1 else 2
    return (
        Traffic(remote_nodes * dispatch, remote_ranks * dispatch, messages),
        Traffic(remote_nodes * combine, remote_ranks * combine, messages),
    )


def tensor_traffic(
    config: ModelConfig, layout: Layout, *, n_tokens: float, precision: Precision, sharded_ffn: bool
) -> Traffic:
    """One layer forward with sequence parallel: hidden states are gathered before attention and before the feed-forward
    and scattered after each; experts need neither. (Korthikanti et al. 2022, section 4.2.2) Backward: half as much
    again, since gathered inputs are not kept but gathered once more for the weights' gradients."""
    if layout.tp == 1:
        return Traffic()
    blocks = 2 if sharded_ffn else 1
    whole = NUMBER_BYTES[not_fp8(precision)] * n_tokens * config.hidden_size
    return Traffic(0.0, blocks * 2 * whole * (layout.tp - 1) / layout.tp, 2 * blocks)


def context_traffic(
    config: ModelConfig, layout: Layout, machine: MachineSpec, *, n_tokens: float, precision: Precision
) -> Traffic:
    """One layer forward: keys and values of the other cp ranks pass by in a ring (Liu et al. 2023, ring attention); of
    MLA the latents, from which each rank makes its heads' own. Backward passes them again, and their gradients."""
    if layout.cp == 1:
        return Traffic()
    width = config.cache_width / (1 if config.attention == "mla" else layout.tp)
    sent = NUMBER_BYTES[not_fp8(precision)] * n_tokens * width * (layout.cp - 1)
    across_nodes = layout.cp * layout.tp > machine.devices_per_node
    return Traffic(sent if across_nodes else 0.0, 0.0 if across_nodes else sent, layout.cp - 1)


def stage_traffic(
    config: ModelConfig, layout: Layout, machine: MachineSpec, *, n_tokens: float, precision: Precision
) -> Traffic:
    """Hidden states of a micro-batch from a stage to the next, or their gradient back."""
    if layout.pp == 1:
        return Traffic()
    sent = NUMBER_BYTES[not_fp8(precision)] * n_tokens * config.hidden_size / layout.tp
    across_nodes = layout.n_devices > machine.devices_per_node
    return Traffic(sent if across_nodes else 0.0, 0.0 if across_nodes else sent, 1)


class Group(NamedTuple):
    """Ranks that share gradients: how many, and how many of them are neighbours on a node."""

    size: int
    per_node: int


def gradient_groups(layout: Layout, machine: MachineSpec) -> tuple[Group, Group]:
    """(of what every rank holds, of experts). Tensor ranks are neighbours, then context, then data ranks; the two ranks
    on which DualPipe lays a stage share its gradients too."""
    copies = layout.dp * layout.cp
    neighbours = max(1, min(copies, machine.devices_per_node // layout.tp))
    expert_copies = max(1, copies * layout.tp // layout.ep)
    expert_neighbours = max(1, min(expert_copies, machine.devices_per_node // layout.ep))
    return (
        Group(copies * layout.stage_copies, neighbours),
        Group(expert_copies * layout.stage_copies, expert_neighbours),
    )


def ring_traffic(n_bytes: float, group: Group) -> Traffic:
    """What a rank sends in a reduce-scatter or an all-gather of `n_bytes`; the cards of its node are shared."""
    sent = n_bytes * (group.size - 1) / group.size
    across = sent / group.per_node if group.size > group.per_node else 0.0
    return Traffic(across, sent if group.per_node > 1 else 0.0, group.size - 1)


def ring_seconds(n_bytes: float, group: Group, machine: MachineSpec) -> float:
    """A reduce-scatter or an all-gather of `n_bytes` a rank. A ring through whole nodes runs once over every network
    card, so the ranks of a node share all their cards, but no rank is faster than its link to its neighbours."""
    if group.size == 1 or not n_bytes:
        return 0.0
    sent = n_bytes * (group.size - 1) / group.size
    links: list[tuple[float, Link]] = []
    if group.size > group.per_node and machine.inter_node is not None:
        links.append((group.per_node * machine.inter_node.bytes_per_second.value, machine.inter_node))
    if group.per_node > 1 and machine.intra_node is not None:
        links.append((machine.intra_node.bytes_per_second.value, machine.intra_node))
    if not links:
        return 0.0
    latency = max(link.latency_seconds.value for _, link in links)
    return sent / min(rate for rate, _ in links) + (group.size - 1) * latency / max(1, group.per_node)
