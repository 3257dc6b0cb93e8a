"""What cannot fit is refused in one line and before anything is written; what would fit never is."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from abyssal.checkpoint.convert import config_to_hf
from abyssal.checkpoint.save import save_checkpoint
from abyssal.checkpoint.source import open_checkpoint
from abyssal.checkpoint.survey import survey
from abyssal.cli import dispatch
from abyssal.model.config import ModelConfig
from abyssal.model.presets import PRESETS
from abyssal.model.transformer import Transformer
from abyssal.plan.loaded_weights import loaded_bytes
from abyssal.plan.memory_limit import MemoryLimit
from abyssal.plan.refuse import MARGIN, refuse_beyond
from abyssal.stages.beside_plan import check_fits, forecast
from abyssal.stages.plan_recipe import PLANNERS
from abyssal.stages.recipe import Recipe, read_recipe, with_precision
from abyssal.stages.way import open_run, walk

RUNS = Path(__file__).parents[1] / "runs"
CPU = torch.device("cpu")
SMALL = ModelConfig(
    vocab_size=256, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
    kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64, n_routed_experts=4,
    num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=128, first_k_dense_replace=1,
    num_nextn_predict_layers=1,
)  # fmt: skip


def quiet() -> Console:
    return Console(file=io.StringIO(), width=400)


def said(limit_bytes: int, needed_bytes: float, free_bytes: int | None = None) -> str:
    limit = MemoryLimit(limit_bytes, limit_bytes if free_bytes is None else free_bytes, "the container's limit")
    parts = {"weights": 0.7 * needed_bytes, "activations": 0.3 * needed_bytes, "nothing": 0.0}
    return refuse_beyond(limit, needed_bytes, what="pretrain", parts=parts, change="use less", override="--no-refuse")


def test_a_quarter_above_the_limit_is_let_through_and_more_is_not():
    assert said(1000, MARGIN * 1000) != ""  # not free now, so it is said
    with pytest.raises(ValueError) as error:
        said(10_000_000_000, MARGIN * 10_000_000_000 + 1)
    assert str(error.value) == (
        "pretrain cannot fit: it takes about 12.5 GB (weights 8.75 GB, activations 3.75 GB) and the container's limit "
        "has 10 GB; use less, or try all the same with --no-refuse"
    )


def test_what_is_merely_not_free_now_is_said_and_what_is_free_is_not():
    assert said(1000, 500) == ""
    assert said(1000, 500, free_bytes=400).endswith("400 B are free: it may be stopped for want of memory")


def laptop(tmp_path: Path, **plan: object) -> Recipe:
    recipe = with_precision(read_recipe(RUNS / "laptop.toml"), "float32")
    run = replace(recipe.run, out=str(tmp_path / "out"), threads=1)
    return replace(recipe, run=run, plan=replace(recipe.plan, **plan))  # type: ignore[arg-type]


def test_a_stage_that_cannot_fit_is_refused_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    limit = MemoryLimit(20_000_000, 20_000_000, "the container's limit")
    monkeypatch.setattr("abyssal.stages.machine_here.memory_limit", lambda: limit)
    run = open_run(laptop(tmp_path), quiet())
    with pytest.raises(
        ValueError, match=r"^pretrain cannot fit: it takes about .* MB \(.*\) and the container's limit"
    ):
        walk(run, ("tokenize", "pretrain"))
    assert not run.stage_dir("tokenize").exists() and not run.stage_dir("pretrain").exists()


def test_the_override_lets_it_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The stage is begun, and ends for another reason: nothing is tokenized yet."""
    limit = MemoryLimit(20_000_000, 20_000_000, "the container's limit")
    monkeypatch.setattr("abyssal.stages.machine_here.memory_limit", lambda: limit)
    run = open_run(laptop(tmp_path, refuse=False), quiet())
    with pytest.raises(OSError):
        walk(run, ("pretrain",))
    assert run.stage_dir("pretrain").exists()


@pytest.mark.parametrize("name", ["laptop", "laptop_full", "direct_only", "extend"])
def test_what_runs_on_a_laptop_is_never_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every stage of these ran on machines with 2 GB to spare; a plan above 2.5 GB would stop them."""
    limit = MemoryLimit(2_000_000_000, 2_000_000_000, "RAM")
    monkeypatch.setattr("abyssal.stages.machine_here.memory_limit", lambda: limit)
    recipe = with_precision(read_recipe(RUNS / f"{name}.toml"), "float32")
    planned = forecast(recipe, CPU, tuple(PLANNERS))
    assert planned.plans and not planned.unplanned
    check_fits(planned, tuple(PLANNERS), quiet())


def config_only(tmp_path: Path, preset: str) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(PRESETS[preset]())))
    return str(tmp_path)


@pytest.mark.parametrize(
    "command",
    [
        ["chat"], ["perplexity"], ["eval", "--budget", "0"],
        ["convert", "--to", "mla"],
    ],
)  # fmt: skip
def test_a_checkpoint_too_large_is_refused_by_its_config_alone(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """671B in FP32 are 2.7 TB, and with MTP a little more; no file of weights is there, none is looked for."""
    limit = MemoryLimit(16_000_000_000, 16_000_000_000, "RAM")
    monkeypatch.setattr("abyssal.stages.machine_here.memory_limit", lambda: limit)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    name, *rest = command
    with pytest.raises(ValueError) as error:
        dispatch([name, config_only(tmp_path, "v3"), *rest])
    line = " ".join(str(error.value).split())
    assert "cannot fit: it takes about 2.73 TB (experts" in line and "RAM has 16 GB" in line
    assert line.endswith("what a machine can serve, or try all the same with --no-refuse")
    assert "\n" not in str(error.value)


def test_fewer_bits_are_let_through_where_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """V2-Lite: 63 GB in FP32, 9 GB in int4. The second gets as far as looking for weights."""
    limit = MemoryLimit(16_000_000_000, 16_000_000_000, "RAM")
    monkeypatch.setattr("abyssal.stages.machine_here.memory_limit", lambda: limit)
    directory = config_only(tmp_path, "v2_lite")
    with pytest.raises(ValueError, match=r"takes about 62\.8 GB .* keep them in fewer bits, .* GB with --weights int4"):
        dispatch(["perplexity", directory, "--device", "cpu"])
    with pytest.raises((ValueError, OSError)) as error:
        dispatch(["perplexity", directory, "--device", "cpu", "--weights", "int4"])
    assert "cannot fit" not in str(error.value)


@pytest.mark.parametrize(("kept", "counted"), [("master", "FP32 masters"), ("compute", "BF16"), ("fp8", "fp8")])
def test_counted_bytes_are_those_that_loading_takes(tmp_path: Path, kept: str, counted: str):
    """Of masters and casts to a five-hundredth, the norms of MTP; of FP8 a little less than it takes, since a matrix
    is kept as numbers that is counted in few bits."""
    model = Transformer(SMALL).init_weights(torch.Generator().manual_seed(0))
    save_checkpoint(tmp_path / "c", model, None)
    exact = survey(open_checkpoint(tmp_path / "c")).memory[counted]
    planned = sum(loaded_bytes(SMALL, kept, compute_bytes=2).values())
    assert planned == pytest.approx(exact, rel=0.12 if kept == "fp8" else 2e-3) and planned <= exact * 1.001
