"""`abyssal plan`: what is said adds up, has its units in its names, and can be wrong in one line only."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from abyssal.commands.plan_command import apart, plan_command
from abyssal.commands.plan_json import as_json
from abyssal.commands.plan_page import drawn_of, plan_page
from abyssal.evals.part_bars import Line, PartRow, part_bars
from abyssal.machine import resolve_device
from abyssal.model.presets import v3
from abyssal.plan.in_words import bytes_text
from abyssal.plan.layout import Layout
from abyssal.plan.machine_file import machine_toml, read_machine
from abyssal.plan.schedules import ScheduleName, build_schedule
from abyssal.plan.search_layouts import search_layouts, ways_to_cut
from abyssal.plan.stage_plan import RecipePlan
from abyssal.plan.training import plan_training
from abyssal.stages.machine_here import machine_here
from abyssal.stages.plan_recipe import plan_recipe, with_given
from abyssal.stages.recipe import Recipe, read_recipe

RUNS = Path(__file__).parents[1] / "runs"
# what a number of the JSON may be called: its unit, or what it counts
UNITS = re.compile(
    r"bytes|seconds|usd|flops|tokens|tokens_per|hours|share|mfu|n_|rows|steps|usd_per|per_second|acceptance|times|batch|"
    r"requests|pp|ep|tp|cp|dp|zero|chunks|copies|imbalance|nodes|rank|devices|experts"
)


@pytest.fixture(scope="module")
def node() -> Recipe:
    return read_recipe(RUNS / "node.toml")


@pytest.fixture(scope="module")
def plan(node: Recipe) -> RecipePlan:
    return plan_recipe(node, machine=read_machine(node.plan.machine), machine_note="for the test")


def test_parts_add_up_to_steps_steps_to_stages_and_stages_to_the_whole(plan: RecipePlan):
    (stage,) = plan.stages
    assert stage.training is not None
    assert stage.step_seconds == pytest.approx(stage.training.step_seconds)
    assert stage.seconds == pytest.approx(stage.tokens / stage.training.tokens_per_second)
    assert stage.device_hours == pytest.approx(8 * stage.seconds / 3600)
    assert stage.peak_memory_bytes == pytest.approx(stage.training.peak_memory_bytes)
    assert plan.planned == plan.whole == (stage.seconds, stage.device_hours, stage.cost_usd)
    assert stage.tokens == 23_842 * 512 * 8192


def test_given_hours_are_added_and_priced_but_take_no_time(plan: RecipePlan):
    more = replace(plan, given_device_hours=1000.0, given_are="post-training", price_usd_per_device_hour=2.0)
    assert more.whole.seconds == plan.planned.seconds
    assert more.whole.device_hours == plan.planned.device_hours + 1000
    assert more.whole.cost_usd == pytest.approx((plan.planned.cost_usd or 0) + 2000)


def test_a_machine_with_fewer_devices_and_another_price(node: Recipe):
    machine = read_machine("h800x2048")
    told = replace(node, plan=replace(node.plan, devices=4, price_usd_per_device_hour=3.0))
    given = with_given(told, machine)
    assert (given.n_devices, given.devices_per_node) == (4, 4) and given.title.startswith("4 of 2,048 H800")
    assert given.price_usd_per_device_hour is not None and given.price_usd_per_device_hour.value == 3.0
    with pytest.raises(ValueError, match=r"plan\.devices=4096 are more than the 2048 of h800x2048"):
        with_given(replace(node, plan=replace(node.plan, devices=4096)), machine)
    with pytest.raises(ValueError, match=r"plan\.stages: no 'bake' is planned; choose among"):
        plan_recipe(replace(node, plan=replace(node.plan, stages=("bake",))), machine=machine)


def numbers_in(value: Any, name: str = "") -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [found for key, inner in value.items() for found in numbers_in(inner, key)]
    if isinstance(value, list):
        return [found for inner in value for found in numbers_in(inner, name)]
    return [(name, value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_json_has_every_number_with_its_unit_in_its_name(capsys: pytest.CaptureFixture[str]):
    """Parts are named in words, under a name that has the unit."""
    plan_command([str(RUNS / "node.toml"), "--json", "--serve", "--plan.devices", "4", "--parallel.ep", "4"])
    answer = json.loads(capsys.readouterr().out)
    stage = answer["plan"]["stages"][0]
    assert stage["n_devices"] == 4 and stage["fits"] in (True, False)
    assert sum(stage["step_seconds_by_part"].values()) == pytest.approx(stage["step_seconds"])
    assert answer["serving"]["plan"]["decode"][0]["tokens_per_second"] > 0
    in_words = {name for part in ("step_seconds_by_part", "memory_bytes_by_part") for name in keys(stage[part])}
    bad = {name for name, _ in numbers_in(answer) if not UNITS.search(name)} - in_words - {"stages"}
    assert not bad


def keys(parts: Any) -> set[str]:
    return set(parts) if isinstance(parts, dict) else {name for one in parts for name in one}


def test_json_of_what_json_has_not():
    assert as_json({"a": (1, float("inf")), "b": range(2, 5)}) == {"a": [1, None], "b": [2, 5]}


def test_the_page_is_one_file_and_says_what_the_plan_says(plan: RecipePlan, node: Recipe):
    hostile = replace(plan, name="<script>alert(1)</script>")
    page = plan_page(hostile, read_machine(node.plan.machine))
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    for said in (
        "Where a step goes",
        "Memory",
        "Figures and their sources",
        "DeepEP",
        bytes_text(plan.fullest.peak_memory_bytes),
    ):
        assert said in page
    assert page.count("<svg") >= 2


def test_a_bar_is_as_long_as_its_part():
    """Two rows, the second twice the first: its parts are drawn twice as wide; nothing is drawn of nothing."""
    rows = [PartRow("one", {"a": 10.0, "b": 0.0, "never": 0.0}), PartRow("two", {"a": 20.0, "b": 5.0})]
    svg = part_bars(rows, title="t", text=lambda value: f"{value:g} B", limit=Line(30.0, "room"))
    widths = [float(width) for width in re.findall(r'<rect x="[\d.]+" y="[\d.]+" width="([\d.]+)" height="17"', svg)]
    first, second, third = widths
    assert second == pytest.approx(2 * first, rel=1e-2) and third == pytest.approx(first / 2, rel=1e-2)
    assert "never" not in svg and "room 30 B" in svg and "two: b 5 B, 20.0 % of 25 B" in svg
    assert part_bars([PartRow("none", {"a": 0.0})], title="t", text=str) == ""


def test_the_search_is_as_good_as_trying_everything(node: Recipe):
    """Eight devices and a small batch: every way to cut, with every zero, recomputation and micro-batch."""
    machine = with_given(node, read_machine("h200"))
    config = replace(node.model, num_hidden_layers=3, vocab_size=8192)
    base = replace(node.parallel, ep=1)
    asked: dict[str, Any] = {"machine": machine, "row_len": 4096, "batch_rows": 64}
    search = search_layouts(config, base=base, **asked)
    best = search.best[0]
    assert best.plan is not None and best.fits
    everything = [
        replace(layout, zero=1, recompute=recompute, micro_rows=rows)
        for layout in ways_to_cut(config, machine, base)
        for recompute in ("none", "selective")
        for rows in (1, 4)
    ]
    steps = []
    for layout in everything:
        try:
            one = plan_training(config, layout=layout, **asked)
        except ValueError:
            continue
        steps += [one.step_seconds] if one.fits else []
    assert best.plan.step_seconds <= min(steps)
    assert all(one.why for one in search.fell_out) and search.n_tried >= search.n_fitting > 0


def test_what_fits_nowhere_is_shown_with_the_least_memory():
    config = read_recipe(RUNS / "v3.toml").model
    search = search_layouts(
        config, machine=read_machine("h200"), base=Layout(precision="bfloat16"), row_len=4096, batch_rows=8
    )
    assert not search.fits and search.best[0].plan is not None
    assert search.best[0].plan.peak_memory_bytes > search.best[0].plan.memory_limit_bytes


def test_options_with_a_dot_are_the_recipes():
    own, recipes = apart(
        ["r.toml", "--json", "--parallel.pp", "8", "--serving.tp", "2", "--plan.no-refuse", "--search"]
    )
    assert own == ["r.toml", "--json", "--serving.tp", "2", "--search"]
    assert recipes == ["--parallel.pp", "8", "--plan.no-refuse"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a recipe: abyssal plan runs/v3.toml"),
        (["v3"], "'v3' is no recipe: name one, such as runs/v3.toml, or ask --serve of one of"),
        (["runs/nothing.toml"], "recipe runs/nothing.toml does not exist"),
        ([str(RUNS / "node.toml"), "--machine", "abacus"], "abacus.toml does not exist; there are"),
        ([str(RUNS / "node.toml"), "--parallel.pp", "3"], "parallel.pp=3 does not go with schedule='none'"),
        ([str(RUNS / "one_gpu.toml"), "--search", "--plan.stages", "zero"], "--search is of `pretrain`, which plan"),
        (["--ram", "128GB"], "--ram 128GB is beside a card; name it with --card 24GB"),
        (["--card", "many"], "many.toml does not exist"),
        (["v2_lite", "--serve", "--machine", "h200", "--serving.tp", "3"], "serving.tp=3 does not divide"),
    ],
)
def test_what_can_be_wrong_is_said_in_one_line(arguments: list[str], said: str):
    with pytest.raises((ValueError, OSError)) as error:
        plan_command(arguments)
    assert said in " ".join(str(error.value).split()) and "\n" not in str(error.value).strip()


def test_one_card_and_some_ram_are_answered_in_words_and_one_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    picture, page = tmp_path / "possible.svg", tmp_path / "possible.html"
    plan_command(["--card", "24GB", "--ram", "128GB", "--picture", str(picture), "--html", str(page)])
    said = capsys.readouterr().out
    assert said.startswith("On one RTX 4090 (24 GB) and 128 GB of RAM:")
    assert all(f"  {word}: " in said for word in ("Pretrain", "Fine-tune", "Distil", "Reinforce", "Serve"))
    assert picture.read_text().startswith("<svg") and "128 GB of RAM" in page.read_text()


def test_shards_are_those_of_the_recipes_layout(capsys: pytest.CaptureFixture[str]):
    """Over all ranks of V3 the weights that are built, once for each copy, are those of 671B and the MTP module."""
    plan_command([str(RUNS / "v3.toml"), "--shards", "--json", "--plan.stages", "pretrain"])
    shards = json.loads(capsys.readouterr().out)["shards"]
    assert (shards["n_ranks"], shards["n_weights"], shards["n_mtp_weights"]) == (2048, 671026419200, 11610068224)
    rows = shards["rows"]
    assert {row["part"] for row in rows} == {"weights", "master", "moments", "gradients"}
    assert sum(row["n_ranks"] for row in rows if row["part"] == "weights") == 2048
    assert all(row["built_bytes"] == row["planned_bytes"] for row in rows)


def test_the_schedule_is_drawn_where_there_is_a_pipeline(tmp_path: Path):
    path = tmp_path / "schedule.svg"
    plan_command([str(RUNS / "v2_lite.toml"), "--picture", str(path), "--pretrain.rows", "1024"])
    assert "ZB1P" in path.read_text() and path.read_text().count("rank ") >= 4


def test_one_stage_has_no_schedule_to_draw(tmp_path: Path):
    with pytest.raises(ValueError, match="there is no pipeline to draw; --html draws memory and time"):
        plan_command([str(RUNS / "node.toml"), "--picture", str(tmp_path / "schedule.svg")])


@pytest.mark.parametrize(
    ("schedule", "pp", "n_micro_batches", "drawn"),
    [
        ("interleaved", 5, 100, 25),  # whole rounds of five
        ("interleaved", 16, 128, 32),
        ("dualpipe", 10, 120, 30),
        ("1f1b", 4, 8, 8),  # no more than there are
    ],
)
def test_what_is_drawn_of_a_long_step_is_a_schedule_of_its_own(
    schedule: ScheduleName, pp: int, n_micro_batches: int, drawn: int
):
    layout = Layout(pp=pp, schedule=schedule, chunks=2 if schedule == "interleaved" else 1, dp=1, micro_rows=1)
    plan = plan_training(
        v3(), machine=read_machine("h800x2048"), layout=layout, row_len=4096, batch_rows=n_micro_batches
    )
    assert drawn_of(plan) == drawn
    build_schedule(schedule, n_stages=pp, n_micro_batches=drawn, chunks=layout.chunks)


def test_measuring_leaves_the_file_that_plans_go_by(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The benchmark itself has its own test; here a machine stands in for what it would find."""
    found = replace(read_machine("rtx4090"), name="here", title="a machine of the test")

    def measured(*, threads: int, out: Path, device: str) -> Any:
        out.parent.mkdir(parents=True)
        out.write_text(machine_toml(found))
        return found

    monkeypatch.setenv("ABYSSAL_CACHE", str(tmp_path))
    monkeypatch.setattr("abyssal.commands.plan_command.measure_machine", measured)
    plan_command(["--measure"])
    assert "is written: plans and runs on this machine go by it" in " ".join(capsys.readouterr().out.split())
    device = resolve_device("auto")
    here = machine_here(device, torch.get_num_threads())
    assert str(tmp_path) in here.note and here.spec.title == "a machine of the test"
    assert here.spec.memory_bytes == here.limit.limit_bytes and here.spec.n_devices == 1
