"""A recipe's plan: which stages there are, how many steps and tokens each has, and how it is laid out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from abyssal.plan.machine_file import read_machine
from abyssal.plan.plan_config import PlanConfig
from abyssal.plan.stage_plan import RecipePlan
from abyssal.stages.plan_recipe import plan_recipe, planned_stages, served_config, with_given
from abyssal.stages.planned_work import layout_for, means_of
from abyssal.stages.recipe import Recipe, read_recipe

RUNS = Path(__file__).parents[1] / "runs"


def recipe_of(name: str) -> Recipe:
    return read_recipe(RUNS / f"{name}.toml")


@pytest.fixture(scope="module")
def one_gpu() -> RecipePlan:
    recipe = recipe_of("one_gpu")
    return plan_recipe(recipe, machine=read_machine(recipe.plan.machine))


def test_the_whole_way_of_one_gpu_is_planned_and_fits(one_gpu: RecipePlan):
    stages = {stage.stage: stage for stage in one_gpu.stages}
    assert list(stages) == [
        "pretrain", "zero", "cold_start/traces", "cold_start", "reason", "reject/traces", "reject", "align",
        "distil/base", "distil/traces", "distil",
    ]  # fmt: skip
    assert one_gpu.fits and all(stage.n_devices == 1 for stage in one_gpu.stages)
    assert stages["pretrain"].tokens == 38_400 * 128 * 1024
    assert stages["zero"].tokens == pytest.approx(200 * 32 * 16 * 256)  # answers half as long as the limit of 512
    assert stages["cold_start/traces"].tokens == pytest.approx(4000 * 4 * 256)
    assert stages["cold_start"].tokens == pytest.approx(2 * 4000 * (64 + 256))  # twice over, a trace of each problem
    assert stages["distil"].training is not None and stages["zero"].mfu is None


def test_parts_of_every_stage_add_up(one_gpu: RecipePlan):
    for stage in one_gpu.stages:
        assert sum(stage.step_seconds_by_part.values()) == pytest.approx(stage.step_seconds)
        assert all(seconds >= 0 for seconds in stage.step_seconds_by_part.values())
        assert stage.seconds == pytest.approx(stage.n_steps * stage.step_seconds)
        assert stage.peak_memory_bytes == max(sum(parts.values()) for parts in stage.memory_bytes_by_part)


def test_what_is_off_is_not_planned():
    recipe = recipe_of("one_gpu")
    assert "extend" not in {stage.stage for stage in plan_of(recipe, "extend", "pretrain").stages}
    with pytest.raises(ValueError, match=r"leaves nothing to plan"):
        plan_of(recipe, "extend", "on_policy", "student_rl")
    on = replace(recipe, on_policy=replace(recipe.on_policy, steps=10))
    (stage,) = plan_of(on, "on_policy").stages
    assert stage.n_steps == 10 and stage.step_seconds_by_part["teacher"] > 0
    assert stage.memory_bytes_by_part[0]["teacher"] > 4 * 402_159_712  # of one_gpu's model in FP32, MTP beside it


def plan_of(recipe: Recipe, *stages: str) -> RecipePlan:
    told = replace(recipe.plan, stages=stages)
    return plan_recipe(replace(recipe, plan=told), machine=read_machine(recipe.plan.machine))


def test_stages_keep_their_order_whatever_the_recipe_says():
    recipe = recipe_of("one_gpu")
    told = replace(recipe, plan=PlanConfig(stages=("zero", "pretrain")))
    assert planned_stages(told) == ("pretrain", "zero")


def test_an_answers_length_is_the_users_or_half_of_the_limit():
    recipe = recipe_of("r1")
    assert means_of(recipe, "zero", 65536) == (1500, 3250, 5000, 7500, 12500)
    assert means_of(recipe, "zero", 4096) == (1500, 3250, 4096, 4096, 4096)  # no mean is above the limit
    assert means_of(recipe_of("one_gpu"), "zero", 512) == (256,)


def test_longer_rows_are_cut_among_more_ranks_and_few_rows_fill_the_pipeline():
    """V3's extension: 32K is 8 times pretraining's rows, 128K 32 times. R1's SFT: 64 rows must make 32 micro-batches
    for each of 16 ranks, so that dp is at most 2 of the 32 ranks that pp leaves."""
    v3, machine = recipe_of("v3"), read_machine("h800x2048")
    assert layout_for(v3, machine, row_len=4096, rows=15360).cp == 1
    assert [layout_for(v3, machine, row_len=n * 4096, rows=1920 * 8 // n).cp for n in (8, 32)] == [8, 32]
    r1 = recipe_of("r1")
    assert layout_for(r1, with_given(r1, machine), row_len=32768, rows=64).on_devices(512).dp == 2


def test_all_of_r1_is_planned_and_fits():
    """Its dense student too, which has no experts for the layout's ep ranks to share out."""
    recipe = recipe_of("r1")
    plan = plan_recipe(recipe, machine=read_machine(recipe.plan.machine))
    stages = {stage.stage: stage for stage in plan.stages}
    assert plan.fits and list(stages)[-3:] == ["reject", "align", "distil"]
    assert stages["distil"].training is not None and stages["distil"].training.layout.ep == 1
    assert stages["reject"].tokens == stages["distil"].tokens == 2 * 804_745 * 5355
    assert plan.whole.device_hours == pytest.approx(sum(stage.device_hours for stage in plan.stages))


def test_r1_zero_is_planned_in_parts_of_its_own_lengths():
    """650 rollouts of 8,192 answers in five parts, each with its mean length; the last ones take the longest."""
    recipe = recipe_of("r1")
    stages = plan_of(recipe, "zero").stages
    assert [stage.stage for stage in stages] == ["zero/1", "zero/2", "zero/3", "zero/4", "zero"]
    assert sum(stage.n_steps for stage in stages) == 650
    assert [stage.tokens for stage in stages] == pytest.approx(
        [130 * 8192 * n for n in (1500, 3250, 5000, 7500, 12500)]
    )
    steps = [stage.step_seconds for stage in stages]
    assert steps == sorted(steps) and all(stage.n_devices == 512 for stage in stages)
    assert all(stage.step_seconds_by_part["rollout"] > stage.step_seconds / 2 for stage in stages)


def test_what_is_served_in_the_end_has_the_extended_context():
    assert served_config(recipe_of("v3")).max_position_embeddings == 131_072
    assert served_config(recipe_of("one_gpu")).max_position_embeddings == 2048
