"""One arm with one seed, by the product's own stages, and the log that it leaves. Owns no arms and no tables.

What all arms of a stage share (the tokens; the base of RL) is made once, under a lock, by walking the recipe. A log is
JSON lines: what it was made with, some of the steps, and a summary; it appears whole at the end, so a log that is
there is a finished arm.
Letters: B rows, T tokens, E experts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ablation_arms import RECIPES, Arm, Stage, json_equal, recipe_of, settings_of
from rich.console import Console

from abyssal.checkpoint.load import load_checkpoint
from abyssal.data.loader import RowLoader
from abyssal.loss.balance import expert_load, max_violation
from abyssal.machine import keep_freed_memory, set_threads
from abyssal.model.config import ModelConfig
from abyssal.model.transformer import Transformer, count_parameters
from abyssal.record import Recorder, plain
from abyssal.reward.verifiers import Verifiers
from abyssal.stages.pretrain import as_batch, pretrain
from abyssal.stages.recipe import Recipe, read_recipe
from abyssal.stages.rl import ProblemStream, reinforce
from abyssal.stages.run import FIRST_PROBLEM, STAGES, Run
from abyssal.stages.steps import fitted
from abyssal.stages.way import open_run, walk
from abyssal.tokens.tokenizer import Tokenizer

CPU = torch.device("cpu")
LOG_STEPS = 40  # lines of a log: every arm is committed, so it stays below 10 KB
IDLE = 0.1  # an expert that gets less than this share of the mean load is dead
LAST = 5  # steps of RL over which the summary averages
KEPT: dict[Stage, tuple[str, ...]] = {
    "pretrain": ("loss", "mtp_loss", "grad_norm", "max_violation", "held_out_loss", "time_s"),
    "zero": (
        "reward", "accuracy", "think_share", "length", "entropy", "kl", "clip_share", "grad_norm",
        "zero_variance_share", "mismatch_mean", "mismatch_max", "mismatch_free_mean", "flip_share", "tokens", "time_s",
        "held_out_accuracy", "held_out_think_share", "held_out_length",
    ),
}  # fmt: skip


def prepare(stage: Stage, *, out: Path) -> Run:
    """What the arms of a stage share, made if it is not there: tokens, and for RL the base. Others wait meanwhile."""
    recipe = read_recipe(RECIPES[stage])
    recipe = replace(recipe, run=replace(recipe.run, out=str(out)))
    last = "tokenize" if stage == "pretrain" else "pretrain"
    with held(recipe.directory / ".ablations.lock"):
        run = open_run(recipe, Console())
        if not (run.stage_dir(last) / "done.json").is_file():
            walk(run, STAGES[: STAGES.index(last) + 1])
    return run


def run_arm(arm: Arm, seed: int, *, out: Path, results: Path, base: Path | None) -> Path:
    """Leaves the log. `base` replaces the checkpoint that RL starts from."""
    set_threads(1)
    keep_freed_memory()
    shared = prepare(arm.stage, out=out) if base is None or arm.stage == "pretrain" else None
    recipe = recipe_of(arm)
    stage_dir = out / "ablation_arms" / arm.name / str(seed)
    shutil.rmtree(stage_dir, ignore_errors=True)  # an arm that was cut off begins anew
    began, began_cpu = time.perf_counter(), time.process_time()
    if arm.stage == "pretrain":
        assert shared is not None
        made, summary = pretrain_arm(recipe, seed, stage_dir, shared, title=f"{arm.name} {seed}")
    else:
        checkpoint = base or (shared or prepare("zero", out=out)).checkpoint("base")
        made, summary = rl_arm(recipe, seed, stage_dir, checkpoint, title=f"{arm.name} {seed}")
    header = {
        "arm": arm.name,
        "seed": seed,
        "settings": settings_of(arm),
        **made,
        "wall_s": round(time.perf_counter() - began, 1),
        "cpu_s": round(time.process_time() - began_cpu, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    lines = [json.loads(line) for line in (stage_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    path = log_path(results, arm, seed)
    write_log(path, header, thinned(lines, KEPT[arm.stage]), summary)
    shutil.rmtree(stage_dir)
    return path


def pretrain_arm(
    recipe: Recipe, seed: int, stage_dir: Path, shared: Run, *, title: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The seed draws the weights and the order of the rows; the rows are the same for all."""
    tokenizer, config = shared.tokenizer(), recipe.pretrain
    tokens_dir = shared.stage_dir("tokenize")
    state = pretrain(
        stage_dir,
        config=config,
        model_config=fitted(recipe.model, tokenizer),
        tokens_dir=tokens_dir,
        tokenizer=tokenizer,
        seed=seed,
        device=CPU,
        recorder_at=lambda step: Recorder(stage_dir, title, 1, 1, resume_from_step=step),
    )
    last = last_line(stage_dir)
    loads = held_out_loads(state.model, tokens_dir / "held_out", recipe, tokenizer)
    summary = {
        "tokens": state.tokens,
        "held_out_loss": last["held_out_loss"],
        "mtp_acceptance": last.get("mtp_acceptance"),
        "max_violation": max(map(max_violation, loads), default=None),
        "dead_share": dead_share(loads),
    }
    tokens = json.loads((tokens_dir / "train" / "index.json").read_bytes())["shards"][0]["tokens"]["sha256"]
    return model_facts(state.model) | {"data": tokens}, summary


def rl_arm(
    recipe: Recipe, seed: int, stage_dir: Path, checkpoint: Path, *, title: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The seed draws the problems and the noise; all arms of a seed begin with the same ones, from the same base."""
    config = recipe.zero
    loaded = load_checkpoint(checkpoint, dtype=config.dtype, device=CPU)
    if loaded.tokenizer is None:
        raise FileNotFoundError(f"{checkpoint} has no tokenizer.json; give the checkpoint of a run")
    facts = model_facts(loaded.model) | {
        "base": hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    }
    first = FIRST_PROBLEM["zero"]
    with Verifiers() as verifiers:
        state = reinforce(
            stage_dir,
            config=config,
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            stream=ProblemStream(source=recipe.data.problems, seed=seed),
            first_problem=first,
            verifiers=verifiers,
            seed=(seed + 1) * 1_000_003,
            recorder_at=lambda step: Recorder(stage_dir, title, 1, 1, resume_from_step=step),
        )
    lines = [json.loads(line) for line in (stage_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = {name: lines[-1].get(name) for name in KEPT["zero"] if name.startswith("held_out_")}
    for name in ("reward", "entropy", "clip_share", "mismatch_mean", "mismatch_free_mean", "flip_share", "length"):
        values = [line[name] for line in lines[-LAST:] if line.get(name) is not None]
        summary[name] = sum(values) / len(values) if values else None
    summary["tokens"] = state.tokens
    summary["problems_drawn"] = state.extra["next_problem"] - first
    summary["step_s"] = sum(line["time_s"] for line in lines[:-1]) / max(1, len(lines) - 1)  # the last one evaluates
    return facts, summary


def model_facts(model: Transformer) -> dict[str, Any]:
    total, active = count_parameters(model)
    return {"parameters": total, "active": active, "cache_bytes": cache_bytes(model.config)}


def cache_bytes(config: ModelConfig) -> int:
    """Per token, all layers of the main model, in BF16."""
    return config.cache_width * config.num_hidden_layers * torch.bfloat16.itemsize


@torch.inference_mode()
def held_out_loads(model: Transformer, directory: Path, recipe: Recipe, tokenizer: Tokenizer) -> list[torch.Tensor]:
    """Tokens of the held-out rows that each expert of each layer receives, one (E,) a layer; MTP left out."""
    config = recipe.pretrain
    rows = RowLoader(directory, row_len=config.row_len, rows_per_step=config.eval_rows, seed=0).next()
    batch = as_batch(*rows, eos_id=tokenizer.eos_id, isolate=config.isolate, device=CPU)
    routings: list[Any] = []
    model.hidden(batch.ids_BT, segments_BT=batch.segments_BT, routings=routings)
    return [expert_load(r.experts_NK, n_experts=model.config.n_routed_experts) for r in routings]


def dead_share(loads: list[torch.Tensor]) -> float | None:
    """Share of experts that get less than `IDLE` of the mean load."""
    if not loads:
        return None
    dead = sum(int((load_E < IDLE * load_E.double().mean()).sum()) for load_E in loads)
    return dead / sum(len(load_E) for load_E in loads)


def last_line(stage_dir: Path) -> dict[str, Any]:
    line: dict[str, Any] = json.loads((stage_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return line


def thinned(lines: list[dict[str, Any]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """At most about `LOG_STEPS` lines, the last among them, with the named measures in four digits."""
    every = -(-len(lines) // LOG_STEPS)
    kept = [line for i, line in enumerate(reversed(lines)) if i % every == 0][::-1]
    return [{"step": line["step"], **{n: rounded(line[n], 4) for n in names if n in line}} for line in kept]


def rounded(value: Any, digits: int) -> Any:
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def log_path(results: Path, arm: Arm, seed: int) -> Path:
    return results / arm.name / f"{seed}.jsonl"


def write_log(path: Path, header: dict[str, Any], lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    summary = {name: rounded(plain(value), 6) for name, value in summary.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    entries = [header, *lines, {"summary": summary}]
    partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    os.replace(partial, path)


def read_log(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what it was made with, its summary)."""
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        header, last = json.loads(lines[0]), json.loads(lines[-1])
        return header, last["summary"]
    except (IndexError, KeyError, ValueError):
        raise ValueError(f"{path} is no log of an arm; delete it and run the arm again") from None


def is_finished(results: Path, arm: Arm, seed: int) -> bool:
    """A log made with other settings than the arm has now counts as none, and is written anew."""
    path = log_path(results, arm, seed)
    return path.is_file() and json_equal(read_log(path)[0]["settings"], settings_of(arm))


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Wait for, then hold, a lock file. A killed process leaves none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
