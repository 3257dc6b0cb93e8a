"""Published figures of serving and RL beside the plan's. Deviations stand here, so that a change of one shows."""

from __future__ import annotations

from functools import cache

import pytest

from abyssal.plan.published import Published
from abyssal.plan.published_rl import R1, R1_ZERO, published_rl
from abyssal.plan.published_serving import ServiceDay, published_serving

# in per cent; a measured line that moves by more than two points has to be looked at
DEVIATIONS = {
    "online service: nodes from tokens and published rates": 0,
    "online service: income at R1's prices": 0,
    "online service: theoretical margin on 226.75 nodes": 0,
    "online service: input of a prefill node, hits counted": 49,
    "online service: output of a decode node": 14,
    "online service: speed for one user": 14,
    "online service: theoretical margin at the plan's own rates": 32,
    "SGLang, 12 nodes of H100: input of a prefill node": 31,
    "SGLang, 12 nodes of H100: output of a decode node": 62,
    "V2 on one node of 8 H800: most output (more than 50K)": 13,
    "V2 on one node of 8 H800: most input (more than 100K)": 12,
    "V3: what one MTP draft gives": -6,
    "KTransformers 0.2, V3 in Q4_K_M on one 24 GB card, one socket: decode": 69,
    "KTransformers 0.2, V3 in Q4_K_M on one 24 GB card, two sockets: decode": 106,
    "KTransformers 0.3, V3 in 8 bits on one 24 GB card, two sockets: prefill": 204,
    "Mac Studio M3 Ultra, V3 in 4 bits: decode": -25,
    "R1-Zero: RL in 10,400 steps of 512 answers": -47,
    "R1: RL in two stages": -62,
    "R1: RL in all": -50,
    "R1: cost of RL": -50,
}


@cache
def lines() -> dict[str, Published]:
    return {line.name: line for line in [*published_serving(), *published_rl()]}


def test_arithmetic_is_exact():
    wrong = {name: line.planned for name, line in lines().items() if line.kind == "arithmetic" and not line.is_exact}
    assert not wrong
    assert sum(line.kind == "arithmetic" for line in lines().values()) == 5


def test_every_measured_line_is_held_to_its_deviation():
    found = {name: 100 * line.deviation for name, line in lines().items() if line.kind == "measured"}
    assert found.keys() == DEVIATIONS.keys()
    moved = {name: value for name, value in found.items() if abs(value - DEVIATIONS[name]) > 2}
    assert not moved


def test_every_line_says_where_it_is_from_and_what_it_was_told():
    assert all(line.source and line.unit for line in lines().values())
    assert all(line.inputs for line in lines().values() if line.kind == "measured")


def test_the_day_by_hand():
    """608e9 / 86,400 / 73,700 = 95.5 nodes prefill, 168e9 / 86,400 / 14,800 = 131.4 decode; 266e9 tokens missed."""
    day = ServiceDay()
    nodes = day.nodes_for(prefill_tokens_per_second=73.7e3, decode_tokens_per_second=14.8e3)
    assert nodes == pytest.approx(95.48 + 131.38, abs=0.01)
    assert day.income_usd == pytest.approx(342e3 * 0.14 + 266e3 * 0.55 + 168e3 * 2.19)
    assert day.cost_usd(226.75) == 87_072
    assert day.margin_percent(226.75) == pytest.approx(100 * (day.income_usd - 87_072) / 87_072)


def test_r1_zeros_steps_are_the_published_ones():
    assert sum(stretch.steps for stretch in R1_ZERO) == 10_400
    assert sum(stretch.steps for stretch in R1_ZERO if stretch.max_tokens == 32768) == 8_200
    assert sum(stretch.steps for stretch in R1) == 2 * 1_700
