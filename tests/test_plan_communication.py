from __future__ import annotations

from itertools import combinations

import pytest

from abyssal.model.presets import v2, v3
from abyssal.plan.communication import Group, Traffic, expert_places, expert_traffic, places_hit, ring_seconds
from abyssal.plan.layout import Layout
from abyssal.plan.machine_file import read_machine

H800 = read_machine("h800x2048")


@pytest.mark.parametrize(("n_places", "n_experts", "n_chosen"), [(2, 4, 2), (4, 8, 3), (3, 9, 4)])
def test_places_are_those_of_every_possible_choice(n_places: int, n_experts: int, n_chosen: int):
    each = n_experts // n_places
    choices = list(combinations(range(n_experts), n_chosen))
    mean = sum(len({expert // each for expert in choice}) for choice in choices) / len(choices)
    hit = places_hit(n_places=n_places, n_reachable=n_places, n_experts=n_experts, n_chosen=n_chosen)
    assert hit == pytest.approx(mean)


def test_v3_s_tokens_go_to_at_most_four_of_eight_nodes():
    """8 of the 128 experts on 4 nodes: a node is missed by 96 over 8 of 128 over 8 choices."""
    places = expert_places(v3(), Layout(ep=64, dp=64), H800)
    assert places.n_nodes == 8
    assert places.nodes == pytest.approx(3.629, abs=1e-3)
    assert 7 < places.ranks < 8
    unlimited = places_hit(n_places=8, n_reachable=8, n_experts=256, n_chosen=8)
    assert places.nodes < unlimited


def test_v2_s_groups_are_ranks():
    """8 ranks of one node, of which a token's 6 experts are on at most three."""
    places = expert_places(v2(), Layout(ep=8, dp=8), H800)
    assert (places.n_nodes, places.nodes) == (1, 1)
    assert 2.7 < places.ranks <= 3


def test_dispatch_is_fp8_and_combine_is_not():
    dispatch, combine = expert_traffic(v3(), Layout(ep=64, dp=64), H800, n_tokens=4096, precision="fp8")
    assert dispatch.inter_node_bytes == pytest.approx(4096 * 7168 * (1 + 4 / 128) * 3.629 * 7 / 8, rel=1e-3)
    assert combine.inter_node_bytes == pytest.approx(dispatch.inter_node_bytes * 2 / (1 + 4 / 128))
    assert expert_traffic(v3(), Layout(ep=1, dp=1), H800, n_tokens=4096, precision="fp8") == (Traffic(), Traffic())


def test_the_slower_of_both_links_decides():
    inter, intra = H800.inter_node, H800.intra_node
    assert inter is not None and intra is not None
    traffic = Traffic(inter.bytes_per_second.value, intra.bytes_per_second.value / 2, 1)  # 1 s and half a second
    assert traffic.seconds(H800) == pytest.approx(1.0, abs=1e-4)


def test_a_ring_through_whole_nodes_uses_every_card():
    """Alone on its node a rank has one card, eight neighbours have eight and are held up by their own link instead."""
    inter, intra = H800.inter_node, H800.intra_node
    assert inter is not None and intra is not None
    alone = ring_seconds(1e9, Group(size=4, per_node=1), H800)
    assert alone == pytest.approx(0.75e9 / inter.bytes_per_second.value, rel=1e-3)
    together = ring_seconds(1e9, Group(size=64, per_node=8), H800)
    assert together == pytest.approx(63 / 64 * 1e9 / intra.bytes_per_second.value, rel=0.02)
    assert ring_seconds(1e9, Group(size=1, per_node=1), H800) == 0
