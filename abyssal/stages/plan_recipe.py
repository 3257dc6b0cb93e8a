"""A recipe becomes a plan: every stage that trains or draws answers, with its steps, lengths and layout.

Owns which work a stage is, from the same fields as the stage itself reads, and what is assumed where a recipe says
nothing. Does not own what that work takes (plan/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from abyssal.checkpoint.load import load_config
from abyssal.model.config import ModelConfig
from abyssal.plan.machine_file import MachineSpec, Sourced
from abyssal.plan.stage_plan import RecipePlan, StagePlan, of_training
from abyssal.plan.training import TrainingPlan, plan_training
from abyssal.stages.recipe import Recipe

PROMPT_TOKENS = 64  # of our own problems; see PlanConfig


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
        machine = replace(machine, price_usd_per_device_hour=Sourced(value=price, source="plan: the recipe"))
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


def base_config(recipe: Recipe) -> ModelConfig:
    """Of the model that the way starts from: the recipe's own, or that of the checkpoint it names."""
    base = recipe.run.base
    return load_config(Path(base)) if base and Path(base).exists() else recipe.model


def served_config(recipe: Recipe) -> ModelConfig:
    """Of the model that the way ends with: the base's shape, with the context that `extend` gives it."""
    config = base_config(recipe)
    if not recipe.extend.steps:
        return config
    return replace(config, max_position_embeddings=recipe.pretrain.row_len * recipe.extend.times[1])


# -- pretraining and what goes on with it ------------------------------------------------------------------------------


def pretraining(recipe: Recipe, machine: MachineSpec, stage: str) -> Iterator[StagePlan]:
    config = recipe.pretrain
    if not config.steps:
        return
    plan = partial(trained, recipe, machine, base_config(recipe), optimizer=config.optimizer, row_len=config.row_len)
    every, ramp = config.all_rows * config.row_len, 0
    if config.rows_start:
        ramp, mean_rows = min(config.ramp_tokens, every), (config.rows_start + config.rows) // 2
        yield of_training(
            plan(rows=mean_rows, micro_rows=config.micro_rows),
            stage=f"{stage}/ramp",
            what=f"{mean_rows:,} rows of {config.row_len:,} tokens",
            tokens=ramp,
            assumed=(
                f"the ramp of the batch from {config.rows_start:,} to {config.rows:,} rows is planned at its mean",
            ),
        )
    yield of_training(
        plan(rows=config.rows, micro_rows=config.micro_rows),
        stage=stage,
        what=f"{config.rows:,} rows of {config.row_len:,} tokens",
        tokens=every - ramp,
    )


def extension(recipe: Recipe, machine: MachineSpec, stage: str) -> Iterator[StagePlan]:
    config, like = recipe.extend, recipe.pretrain
    if not config.steps:
        return
    model = base_config(recipe)
    for phase, times in enumerate(config.times):
        row_len, rows = times * like.row_len, config.rows * config.times[0] // times
        assumed: tuple[str, ...] = ()
        if recipe.parallel.n_devices != 1 and machine.n_devices > 1:
            assumed = (f"cp={times}: as many tokens on a rank as in pretraining; how it was cut was not published",)
        yield of_training(
            trained(
                recipe, machine, replace(model, max_position_embeddings=row_len), optimizer=like.optimizer,
                row_len=row_len, rows=rows, micro_rows=config.micro_rows,
            ),
            stage=f"{stage}/phase1" if phase == 0 else stage,
            what=f"{rows:,} rows of {row_len:,} tokens",
            tokens=config.steps * rows * row_len,
            assumed=assumed,
        )  # fmt: skip


def trained(
    recipe: Recipe,
    machine: MachineSpec,
    model: ModelConfig,
    *,
    optimizer: str,
    row_len: int,
    rows: int,
    micro_rows: int = 0,
) -> TrainingPlan:
    """A training step in the recipe's layout. Rows longer than pretraining's are cut among cp ranks, so that each has
    about as many tokens as there."""
    layout = recipe.parallel
    if machine.n_devices > 1 and row_len > recipe.pretrain.row_len and layout.cp == 1:
        layout = replace(layout, cp=row_len // recipe.pretrain.row_len)
    if layout.micro_rows == 0:
        layout = replace(layout, micro_rows=micro_rows)
    return plan_training(model, machine=machine, layout=layout, row_len=row_len, batch_rows=rows, optimizer=optimizer)


PLANNERS: dict[str, Callable[[Recipe, MachineSpec, str], Iterator[StagePlan]]] = {
    "pretrain": pretraining,
    "extend": extension,
}
