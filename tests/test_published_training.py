"""Published figures of training beside the plan's. Deviations stand here, so that a change of one shows."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from abyssal.plan.published import Published
from abyssal.plan.published_training import V3_LAYOUT, published_training, slot_seconds, v3_plan
from abyssal.stages.recipe import read_recipe

# in per cent; a measured line that moves by more than half a point has to be looked at
DEVIATIONS = {
    "Llama-3.1-405B: training, of one token": 1.0,
    "Qwen2.5-72B: training, of one token": 12.9,
    "V3, a step on 2,048 H800: step": -9.5,
    "V3, a step on 2,048 H800: forward alone": -2.0,
    "V3, a step on 2,048 H800: backward alone, for inputs or whole": -11.9,
    "V3, a step on 2,048 H800: weight gradients alone": -47.5,
    "V3, a step on 2,048 H800: forward and backward in pairs": -8.2,
    "V3, a step on 2,048 H800: bubble": -9.6,
    "V3, a step on 2,048 H800: optimizer": -18.4,
    "V3: tokens in a day": 10.5,
    "V3: rate of each H800, causal": 10.9,
    "V3: rate of each H800, masked half counted": 10.9,
    "V3: a trillion tokens": -9.4,
    "V3: pretraining on 14.8T tokens": -9.2,
    "V3: context extension": 2.9,
    "V3: all training": -8.6,
    "V3: cost of all training": -8.6,
    "V2: a trillion tokens": -25.1,
    "DeepSeek-67B: a trillion tokens": -13.7,
    "Megatron, 1,024 H100 in FP8: V3, dropless, forced balance": 8.1,
    "Megatron, 64 H100 in FP8: Llama-3-70B": -12.3,
    "Megatron, 1,024 H100 in FP8: Llama-3.1-405B": -9.6,
    "Llama-3.1-405B on 8,192 H100 in BF16, rows of 8,192": -0.3,
    "Llama-3.1-405B on 16,384 H100 in BF16, rows of 8,192": -0.1,
    "Llama-3.1-405B on 16,384 H100 in BF16, rows of 131,072": 16.9,
}


@cache
def lines() -> dict[str, Published]:
    return {line.name: line for line in published_training()}


def test_arithmetic_is_exact():
    exact = {name: line for name, line in lines().items() if line.kind == "arithmetic"}
    assert not {name: line.planned for name, line in exact.items() if not line.is_exact}
    assert len(exact) == 5


def test_every_measured_line_is_held_to_its_deviation():
    found = {name: 100 * line.deviation for name, line in lines().items() if line.kind == "measured"}
    assert found.keys() == DEVIATIONS.keys()
    assert not {name: value for name, value in found.items() if abs(value - DEVIATIONS[name]) > 0.5}


def test_v3_s_cost_is_within_a_tenth_and_other_runs_within_a_quarter():
    """What the plan is held to: V3 within 10 per cent, with the same figures two other runs within 25."""
    for name in ("V3: a trillion tokens", "V3: pretraining on 14.8T tokens", "V3: cost of all training"):
        assert abs(lines()[name].deviation) < 0.1
    others = [
        line for name, line in lines().items() if name.startswith(("Megatron", "Llama-3.1-405B on", "DeepSeek-67B"))
    ]
    assert len(others) == 7 and all(abs(line.deviation) < 0.25 for line in others)


def test_every_line_says_where_it_is_from_and_what_it_was_told():
    assert all(line.source for line in lines().values())
    assert all(line.inputs for line in lines().values() if line.kind == "measured")


def test_slots_and_bubble_are_the_whole_pipeline():
    plan = v3_plan()
    bubble = sum(plan.timeline.bubble_seconds) / plan.layout.pp
    assert sum(slot_seconds(plan).values()) + bubble == pytest.approx(plan.timeline.step_seconds)


def test_the_recipe_of_v3_has_the_layout_of_the_table():
    recipe = read_recipe(Path(__file__).parents[1] / "runs" / "v3.toml")
    assert recipe.parallel == V3_LAYOUT
