"""The plans of `pretrain` and `extend`: the batch's ramp, the full batch, and longer rows in two phases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from abyssal.model.config import ModelConfig
from abyssal.plan.machine_file import MachineSpec
from abyssal.plan.stage_plan import StagePlan, of_training
from abyssal.stages.planned_work import base_config, is_one_device, trained
from abyssal.stages.pretrain import PretrainConfig
from abyssal.stages.recipe import Recipe


def pretraining(recipe: Recipe, machine: MachineSpec, stage: str) -> Iterator[StagePlan]:
    yield from rows_of_text(recipe, machine, base_config(recipe), recipe.pretrain, stage=stage)


def rows_of_text(
    recipe: Recipe, machine: MachineSpec, model: ModelConfig, config: PretrainConfig, *, stage: str
) -> Iterator[StagePlan]:
    """Also of the student's base."""
    if not config.steps:
        return
    plan = partial(
        trained, recipe, machine, model, optimizer=config.optimizer, dtype=config.dtype, row_len=config.row_len,
        micro_rows=config.micro_rows,
    )  # fmt: skip
    every, ramp = config.all_rows * config.row_len, 0
    if config.rows_start:
        ramp, mean_rows = min(config.ramp_tokens, every), (config.rows_start + config.rows) // 2
        said = f"the ramp of the batch from {config.rows_start:,} to {config.rows:,} rows is planned at its mean"
        yield of_training(
            plan(rows=mean_rows),
            stage=f"{stage}/ramp",
            what=f"{mean_rows:,} rows of {config.row_len:,} tokens",
            tokens=ramp,
            assumed=(said,),
        )
    yield of_training(
        plan(rows=config.rows),
        stage=stage,
        what=f"{config.rows:,} rows of {config.row_len:,} tokens",
        tokens=every - ramp,
    )


def extension(recipe: Recipe, machine: MachineSpec, stage: str) -> Iterator[StagePlan]:
    config, like = recipe.extend, recipe.pretrain
    if not config.steps:
        return
    for phase, times in enumerate(config.times):
        row_len, rows = times * like.row_len, config.rows * config.times[0] // times
        plan = partial(
            trained, machine=machine, model=replace(base_config(recipe), max_position_embeddings=row_len),
            optimizer=like.optimizer, dtype=like.dtype, row_len=row_len, rows=rows, micro_rows=config.micro_rows,
        )  # fmt: skip
        planned = plan(recipe)
        assumed: tuple[str, ...] = ()
        if not is_one_device(recipe, machine):
            said = f"longer rows are cut among cp ranks, {planned.layout.cp} for {row_len:,} tokens"
            if not planned.fits and recipe.parallel.recompute != "full":
                planned = plan(replace(recipe, parallel=replace(recipe.parallel, recompute="full")))
                said += ", all recomputed"
            assumed = (f"{said}; how it was done was not published",)
        yield of_training(
            planned,
            stage=f"{stage}/phase1" if phase == 0 else stage,
            what=f"{rows:,} rows of {row_len:,} tokens",
            tokens=config.steps * rows * row_len,
            assumed=assumed,
        )
