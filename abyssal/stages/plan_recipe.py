"""A recipe becomes a plan: every stage that trains or draws answers, with its steps, lengths and layout.

Owns which stages are planned and on how many devices. Does not own what work a stage is (plan_pretraining.py,
plan_post_training.py) nor what that work takes (plan/). Tokenizing, evaluating and the report are not planned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from abyssal.model.config import ModelConfig
from abyssal.plan.machine_file import MachineSpec, Sourced
from abyssal.plan.stage_plan import RecipePlan, StagePlan
from abyssal.stages.plan_post_training import distilling_on_policy, reinforcing, traced_tuning
from abyssal.stages.plan_pretraining import extension, pretraining
from abyssal.stages.planned_work import base_config
from abyssal.stages.recipe import Recipe

PLANNERS: dict[str, Callable[[Recipe, MachineSpec, str], Iterator[StagePlan]]] = {
    "pretrain": pretraining,
    "extend": extension,
    "zero": reinforcing,
    "cold_start": traced_tuning,
    "reason": reinforcing,
    "reject": traced_tuning,
    "align": reinforcing,
    "distil": traced_tuning,
    "student_rl": reinforcing,
    "on_policy": distilling_on_policy,
}


def plan_recipe(recipe: Recipe, *, machine: MachineSpec, machine_note: str = "") -> RecipePlan:
    machine = with_given(recipe, machine)
    stages = [stage for name in planned_stages(recipe) for stage in PLANNERS[name](recipe, machine, name)]
    if not stages:
        raise ValueError(
            f"plan.stages={list(recipe.plan.stages)} leaves nothing to plan; name some of {', '.join(PLANNERS)}"
        )
    price = machine.price_usd_per_device_hour
    return RecipePlan(
        name=recipe.run.name,
        machine=machine.title,
        machine_note=machine_note,
        stages=tuple(stages),
        given_device_hours=recipe.plan.given_device_hours,
        given_are=recipe.plan.given_are,
        price_usd_per_device_hour=None if price is None else price.value,
    )


def with_given(recipe: Recipe, machine: MachineSpec) -> MachineSpec:
    """The machine with as many devices, and at the price, that [plan] says."""
    n_devices, price = recipe.plan.devices, recipe.plan.price_usd_per_device_hour
    if price:
        machine = replace(machine, price_usd_per_device_hour=Sourced(value=price, source="the recipe’s [plan]"))
    if not n_devices:
        return machine
    if n_devices > machine.n_devices:
        raise ValueError(f"plan.devices={n_devices} are more than the {machine.n_devices} of {machine.name}")
    title = f"{n_devices:,} of {machine.title}" if n_devices < machine.n_devices else machine.title
    per_node = min(n_devices, machine.devices_per_node)
    return replace(machine, title=title, n_devices=n_devices, devices_per_node=per_node)


def planned_stages(recipe: Recipe) -> tuple[str, ...]:
    """Those that [plan] names, or all that are not off."""
    if unknown := [stage for stage in recipe.plan.stages if stage not in PLANNERS]:
        raise ValueError(f"plan.stages: no {unknown[0]!r} is planned; choose among {', '.join(PLANNERS)}")
    return tuple(name for name in PLANNERS if not recipe.plan.stages or name in recipe.plan.stages)


def served_config(recipe: Recipe) -> ModelConfig:
    """Of the model that the way ends with: the base's shape, with the context that `extend` gives it."""
    config = base_config(recipe)
    if not recipe.extend.steps:
        return config
    return replace(config, max_position_embeddings=recipe.pretrain.row_len * recipe.extend.times[1])
