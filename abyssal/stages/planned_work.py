"""What the plans of all stages share: which model a stage starts from, how it trains, how long its answers are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from abyssal.checkpoint.load import load_config
from abyssal.model.config import ModelConfig
from abyssal.plan.layout import Layout
from abyssal.plan.machine_file import MachineSpec
from abyssal.plan.training import TrainingPlan, plan_training
from abyssal.plan.weight_updates import Optimizer
from abyssal.stages.recipe import Recipe

DType = Literal["auto", "float32", "bfloat16"]  # of a section
# micro-batches for each pipeline rank without which a schedule cannot be filled
FULL = {"dualpipe": 2, "dualpipev": 2}


def base_config(recipe: Recipe) -> ModelConfig:
    """Of the model that the way starts from: the recipe's own, or that of the checkpoint it names."""
    base = recipe.run.base
    return load_config(Path(base)) if base and Path(base).exists() else recipe.model


def is_one_device(recipe: Recipe, machine: MachineSpec) -> bool:
    """Where our own trainer and engine run today; elsewhere serving units draw, and ranks train."""
    return machine.n_devices == 1 or recipe.parallel.n_devices == 1


def trained(
    recipe: Recipe,
    machine: MachineSpec,
    model: ModelConfig,
    *,
    optimizer: Optimizer,
    dtype: DType,
    row_len: int,
    rows: int,
    micro_rows: int = 0,
) -> TrainingPlan:
    """A training step in the recipe's layout. `dtype` is the section's, where [parallel] leaves it open."""
    layout = layout_for(recipe, machine, row_len=row_len, rows=rows)
    if model.feed_forward == "dense":  # a student: it has no experts to share out
        layout = replace(layout, ep=1, experts_nodes=0, expert_imbalance=0.0, overlap_expert_communication=False)
    if layout.micro_rows == 0:
        layout = replace(layout, micro_rows=micro_rows)
    if layout.precision == "auto" and dtype != "auto":
        layout = replace(layout, precision=dtype)
    return plan_training(model, machine=machine, layout=layout, row_len=row_len, batch_rows=rows, optimizer=optimizer)


def layout_for(recipe: Recipe, machine: MachineSpec, *, row_len: int, rows: int) -> Layout:
    """The recipe's; but rows longer than pretraining's are cut among cp ranks, about as many tokens to each, and so are
    too few rows to fill the pipeline."""
    layout = recipe.parallel
    times = row_len // recipe.pretrain.row_len
    if machine.n_devices == 1 or layout.cp > 1:
        return layout
    cp = 1 << (max(1, times).bit_length() - 1)
    left = machine.n_devices // (layout.pp * layout.tp)
    full = FULL.get(layout.schedule, 1) * layout.pp * max(1, layout.micro_rows)
    while cp < left and rows * cp // left < full:
        cp *= 2
    return replace(layout, cp=min(cp, left))


def means_of(recipe: Recipe, stage: str, max_tokens: int) -> tuple[float, ...]:
    """Mean tokens of an answer, in each of the equal parts of a stage."""
    told = recipe.plan.answer_tokens.get(stage)
    return tuple(min(float(mean), max_tokens) for mean in told) if told else (max_tokens / 2,)


def assumed_means(recipe: Recipe, stage: str) -> tuple[str, ...]:
    if stage in recipe.plan.answer_tokens:
        return ()
    return ("answers are half as long as max_tokens lets them, where [plan.answer_tokens] does not say otherwise",)
