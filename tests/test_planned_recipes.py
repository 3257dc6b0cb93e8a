"""The recipes of published runs say what was published; a layout that cannot run yet is refused before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from abyssal.model.presets import PRESETS
from abyssal.optim.schedule import total_rows
from abyssal.plan.layout import Layout
from abyssal.plan.plan_config import PlanConfig
from abyssal.plan.published_rl import ACCEPTANCE, PROMPT_TOKENS, R1_ZERO, ROLLOUT, TRAINING
from abyssal.plan.published_training import V3_LAYOUT
from abyssal.stages.recipe import Recipe, read_recipe
from abyssal.stages.way import check_runnable, open_run

RUNS = Path(__file__).parents[1] / "runs"


def recipe_of(name: str) -> Recipe:
    return read_recipe(RUNS / f"{name}.toml")


@pytest.mark.parametrize("name", ["v3", "v2_lite", "r1"])
def test_the_shape_is_the_published_one(name: str):
    """But for the start of the weights (0.006, V3 section 4.2) and, before it is extended, the context."""
    model = recipe_of(name).model
    published = PRESETS[name]()
    before = {} if model.rope_scaling else {"rope_scaling": None, "max_position_embeddings": 4096}
    assert model == replace(published, initializer_range=0.006, **before)


@pytest.mark.parametrize(("name", "student"), [("v3", "7b"), ("r1", "7b"), ("v2_lite", "1_5b"), ("node", "1_5b")])
def test_the_student_is_one_of_r1s(name: str, student: str):
    published = PRESETS[f"r1_distill_qwen_{student}"]()
    kept = {"initializer_range": 0.006, "max_position_embeddings": recipe_of(name).student.max_position_embeddings}
    assert recipe_of(name).student == replace(published, **kept)


def test_v3_sees_as_many_tokens_as_published():
    """14.8T in steps of 62.9M, the ramp over 469B included; 62.9M a step in each phase of the extension too."""
    recipe = recipe_of("v3")
    config = recipe.pretrain
    rows = total_rows(config.steps, start=3072, end=15360, ramp_rows=469_000_000_000 // 4096)
    assert rows * config.row_len / 1e12 == pytest.approx(14.8, abs=1e-4)
    assert [config.rows_start, config.rows, config.ramp_tokens] == [3072, 15360, 469_000_000_000]
    assert config.rows * config.row_len == 62_914_560
    first, second = (recipe.extend.times[i] * config.row_len for i in (0, 1))
    assert (first, second) == (32 * 1024, 128 * 1024) and recipe.extend.rows * first == 62_914_560


def test_v3_is_laid_out_as_published():
    layout = recipe_of("v3").parallel.on_devices(2048)
    assert (layout.pp, layout.ep, layout.tp, layout.dp, layout.zero) == (16, 64, 1, 128, 1)
    assert (layout.schedule, layout.precision, layout.moments) == ("dualpipe", "fp8", "bfloat16")


def test_recipes_say_what_the_published_lines_were_planned_with():
    assert recipe_of("v3").parallel == V3_LAYOUT
    r1 = recipe_of("r1")
    assert replace(r1.parallel, dp=32) == TRAINING and r1.plan.rollout == ROLLOUT and r1.plan.devices == 512
    assert (r1.plan.prompt_tokens, r1.plan.draft_acceptance) == (PROMPT_TOKENS, ACCEPTANCE)
    assert r1.plan.answer_tokens["zero"] == tuple(stretch.mean_tokens for stretch in R1_ZERO)


def test_r1_draws_as_many_answers_as_published():
    """10,400 optimizer steps of 512 answers in R1-Zero, 1,700 in the last stage."""
    recipe = recipe_of("r1")
    zero, align = recipe.zero, recipe.align
    assert zero.steps * zero.grpo.minibatches == 10_400 and zero.problems * zero.answers == 16 * 512
    assert align.steps * align.grpo.minibatches == pytest.approx(1_700, rel=0.01)
    assert (align.steps * align.preference_last) * 16 == pytest.approx(400, rel=0.01)


def test_a_planned_layout_is_refused_before_anything_is_written(tmp_path: Path):
    recipe = recipe_of("v3")
    recipe = replace(recipe, run=replace(recipe.run, out=str(tmp_path / "out")))
    with pytest.raises(ValueError, match=r"^parallel\.pp=16 is planned only so far: see what it takes with `abyssal"):
        open_run(recipe, Console())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change", [{"ep": 2}, {"zero": 1}, {"precision": "fp8"}, {"recompute": "full"}, {"micro_rows": 1}, {"dp": 2}]
)
def test_whatever_would_be_ignored_is_refused(change: dict):
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=rf"^parallel\.{name}={value} is planned only so far"):
        check_runnable(Layout(**change))


def test_one_device_runs():
    check_runnable(Layout())
    check_runnable(Layout(dp=1))
    check_runnable(recipe_of("one_gpu").parallel)


def test_what_a_plan_may_be_told():
    with pytest.raises(ValueError, match=r"plan\.answer_tokens\.zero=\(0,\) must be means of at least 1 token"):
        PlanConfig(answer_tokens={"zero": (0,)})
    with pytest.raises(ValueError, match=r"plan\.devices=-1 must be 0 or more"):
        PlanConfig(devices=-1)
    with pytest.raises(ValueError, match="hours that are an input say what they are of"):
        PlanConfig(given_device_hours=5000.0)
