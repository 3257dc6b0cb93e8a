"""Recipes: what they may say, what is refused with the name of the key, and that writing one loses nothing."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from abyssal.data.problems import ProblemSource
from abyssal.machine import compute_dtype
from abyssal.model.config import ModelConfig, RopeScaling
from abyssal.stages.recipe import Recipe, read_recipe, with_precision
from abyssal.stages.way import settle_precision
from abyssal.typed_toml import from_dict, to_toml

RUNS = sorted((Path(__file__).parents[1] / "runs").glob("*.toml"))
MODEL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "attention": "gqa", "feed_forward": "dense", "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


def recipe_of(**sections: Any) -> Recipe:
    return from_dict(Recipe, {"model": MODEL, "student": MODEL} | sections, "")


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_writing_and_reading_gives_the_same_recipe(path: Path, tmp_path: Path):
    recipe = read_recipe(path)
    assert read_recipe(written(tmp_path, to_toml(recipe))) == recipe


def test_the_round_trip_keeps_what_is_hard_to_spell(tmp_path: Path):
    recipe = recipe_of(
        run={"name": 'a "quoted" \\ name', "out": "größer/所以"},
        zero={"lr": 1e-05, "dynamic_sampling": True, "grpo": {"kl_weight": 0}},
        data={
            "mix": {"python": 0.5, "debian:git-doc,perl-doc": 0.3, "/größer/texts": 1},
            "clean": {"languages": ["en", "zh"], "near_duplicates": 0},
            "problems": {"families": {"chain": 1, "reasoning_gym:gcd": 0.5}, "levels_of": {"chain": [2, 9]}},
        },
    )
    scaling = RopeScaling(kind="yarn", factor=4.0)
    recipe = replace(recipe, model=ModelConfig(**MODEL | {"rope_scaling": scaling}))
    assert read_recipe(written(tmp_path, to_toml(recipe))) == recipe
    assert recipe.data.problems == ProblemSource(
        families={"chain": 1.0, "reasoning_gym:gcd": 0.5}, levels_of={"chain": (2, 9)}
    )
    assert recipe.data.clean.languages == ("en", "zh") and list(recipe.data.mix)[2] == "/größer/texts"
    assert type(recipe.zero.grpo.kl_weight) is float  # a whole number is welcome where a fraction is meant


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"pretrian": {}}, "unknown key pretrian"),
        ({"pretrain": {"step": 3}}, "unknown key pretrain.step; .*steps"),
        ({"zero": {"grpo": {"clip": 0.2}}}, "unknown key zero.grpo.clip; .*clip_high, clip_low"),
        ({"pretrain": {"steps": "3"}}, "pretrain.steps='3' must be of type int"),
        ({"pretrain": {"steps": 3.5}}, "pretrain.steps=3.5 must be of type int"),
        ({"pretrain": {"steps": True}}, "pretrain.steps=True must be of type int"),
        ({"pretrain": {"isolate": 1}}, "pretrain.isolate=1 must be of type bool"),
        ({"pretrain": {"dtype": "float16"}}, "pretrain.dtype='float16'; use one of 'auto', 'float32', 'bfloat16'"),
        ({"pretrain": 5}, "pretrain=5 must be a table"),
        ({"zero": {"preference_share": 0.1}}, "zero.preference_share=0.1: rules alone reward zero"),
        ({"data": {"problems": {"levels": [1]}}}, r"data.problems.levels=\[1\] must be a list of 2 values"),
        ({"data": {"clean": {"languages": "en"}}}, "data.clean.languages='en' must be a list"),
        ({"data": {"clean": {"languages": [1]}}}, "data.clean.languages=1 must be of type str"),
        ({"data": {"mix": {"docs": -1.0}}}, "data.mix gives docs the weight -1.0"),
        ({"data": {"problems": {"levels_of": {"chain": ["1", 2]}}}}, "levels_of.chain='1' must be of type int"),
        ({"model": {k: v for k, v in MODEL.items() if k != "hidden_size"}}, "model.hidden_size is missing"),
        ({"model": MODEL | {"head_dim": 7}}, "rotary width of 7 is odd"),
        ({"pretrain": {"rows": 6, "micro_rows": 4}}, "pretrain.rows=6 is not a multiple of micro_rows=4"),
        ({"zero": {"answers": 1}}, "answers=1: an answer is compared with its group"),
        ({"cold_start": {"traces": {"max_tokens": 0}}}, "max_tokens=0 leaves nothing to generate"),
        ({"zero": {"seconds": 0}}, "zero.seconds=0: only the student's arms can take as long as distil; use inf"),
        ({"student_rl": {"seconds": -1}}, "seconds=-1.0 is negative; use inf for no limit"),
        ({"on_policy": {"start": "r1"}}, "on_policy.start='r1'; use one of 'base', 'student'"),
        ({"eval": {"budgets": 8}}, "eval.budgets=8 must be a list"),
        ({"eval": {"budgets": [8, "16"]}}, "eval.budgets='16' must be of type int"),
        ({"distil": {"traces": {"problems": 0}}}, "traces.problems=0 and no data leave nothing to learn"),
        ({"eval": {"top_p": 0.0}}, r"top_p=0.0 is outside \(0, 1\]"),
        ({"pretrain": {"row_len": 200}}, "student_pretrain.row_len=256 is no multiple of pretrain.row_len=200"),
    ],
)
def test_what_is_wrong_is_named(sections: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as error:
        recipe_of(**sections)
    assert "\n" not in str(error.value)


def test_the_students_other_arms_are_off_unless_a_recipe_gives_them_a_section(tmp_path: Path):
    plain = recipe_of()
    assert plain.student_rl.steps == plain.on_policy.steps == 0
    armed = recipe_of(student_rl={"seconds": 0}, on_policy={"steps": 7}, eval={"budgets": [0, 8, 16]})
    assert armed.student_rl.steps > 0 and armed.student_rl.seconds == 0
    assert armed.on_policy.steps == 7 and math.isinf(armed.on_policy.seconds)  # by steps: the same each time
    assert armed.eval.budgets == (0, 8, 16) and plain.eval.budgets == ()
    assert read_recipe(written(tmp_path, to_toml(armed))) == armed  # inf included


def test_a_recipe_needs_both_models():
    with pytest.raises(ValueError, match="student is missing; give it a value"):
        from_dict(Recipe, {"model": MODEL}, "")


def test_errors_name_the_file(tmp_path: Path):
    with pytest.raises(ValueError, match=r"r\.toml: unknown key modle"):
        read_recipe(written(tmp_path, "[modle]\nx = 1\n"))
    with pytest.raises(ValueError, match=r"r\.toml is not TOML"):
        read_recipe(written(tmp_path, "steps = \n"))
    with pytest.raises(FileNotFoundError, match="does not exist; runs/ holds"):
        read_recipe(tmp_path / "nothing.toml")


def test_the_run_directory_is_out_and_name():
    assert recipe_of(run={"out": "there", "name": "laptop"}).directory == Path("there/laptop")


def test_auto_is_settled_where_it_stands_and_an_explicit_type_stays():
    recipe = recipe_of(pretrain={"dtype": "bfloat16"}, distil={"sft": {"dtype": "float32"}})
    assert recipe.cold_start.sft.dtype == recipe.student_pretrain.dtype == recipe.run.dtype == "auto"
    settled = with_precision(recipe, "float32")
    assert settled.run.dtype == settled.cold_start.sft.dtype == settled.reward_model.dtype == "float32"
    assert settled.pretrain.dtype == "bfloat16" and settled.distil.sft.dtype == "float32"
    # a device is settled anew on each machine, and [parallel] takes the sections' types
    assert '"auto"' not in to_toml(settled).replace('device = "auto"', "").replace('precision = "auto"', "")


def test_a_run_goes_on_in_the_type_it_began_in_wherever_it_is_taken_up():
    fresh = recipe_of()
    begun = with_precision(fresh, "bfloat16")
    console, cpu = Console(file=io.StringIO()), torch.device("cpu")
    assert settle_precision(fresh, begun, cpu, console) == begun
    native = str(compute_dtype("auto", cpu)).removeprefix("torch.")
    assert settle_precision(fresh, None, cpu, console) == with_precision(fresh, native)
    asked = replace(fresh, run=replace(fresh.run, dtype="bfloat16"))
    assert settle_precision(asked, None, cpu, console) == begun


@pytest.mark.parametrize("unit, dtype", [("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16),
                                         ("avx512_f", torch.float32)])  # fmt: skip
def test_bf16_is_chosen_where_the_processor_multiplies_it(unit: str, dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, unit: True})
    assert compute_dtype("auto", torch.device("cpu")) == dtype
    assert compute_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16  # asked for, so given
