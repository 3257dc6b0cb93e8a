"""The way: every stage in order, each taking up where it stopped and leaving a checkpoint in DeepSeek's own name.

    tokenize -> pretrain (base) [-> extend (base)] -> zero (zero) -> cold_start (dev1) -> reason (dev2)
             -> reject (dev3) -> align (r1) -> distil (student; student_rl, student_opd beside it) -> eval -> report

A stage is done when its done.json is there. Everything before that line can be killed at any moment.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from abyssal.data.user_examples import read_conversations
from abyssal.machine import compute_dtype, keep_freed_memory, resolve_device, set_threads
from abyssal.plan.layout import Layout
from abyssal.reward.verifiers import Verifiers
from abyssal.stages.beside_plan import begin_measuring, check_fits, forecast, peak_above, say_beside
from abyssal.stages.recipe import Recipe, read_recipe, with_precision
from abyssal.stages.run import CHECKPOINTS, STAGES, Run, write_whole
from abyssal.stages.steps import STEPS
from abyssal.typed_toml import to_toml

# the sections of the recipe that a stage reads, where they are not its own and rl_data
READS: dict[str, tuple[str, ...]] = {
    "tokenize": ("tokenizer", "data", "rl_data"),
    "extend": ("extend", "pretrain", "data"),
    "pretrain": ("model", "pretrain"),
    "align": ("align", "rl_data", "reward_model"),
    "distil": ("student", "student_pretrain", "distil", "rl_data"),
    "student_rl": ("student", "student_pretrain", "student_rl", "rl_data"),
    "on_policy": ("student", "student_pretrain", "on_policy", "rl_data"),
    "report": (),
}
LIMITS = ("reward_limit_s", "max_undecided")
# they begin from base, or from what began there
FROM_BASE = tuple(stage for stage in CHECKPOINTS if stage != "pretrain")
# what a stage leaves behind that a later start takes up
LEFT_BEHIND = (
    "checkpoint", "checkpoint.old", "traces.jsonl", "base", "reward_model/pairs.jsonl", "phase1/train", "results.json",
    "done.json",
)  # fmt: skip


def open_run(recipe: Recipe, console: Console) -> Run:
    """The run directory with its recipe; a recipe that differs where stages have already run is refused."""
    check_runnable(recipe.parallel)
    set_threads(recipe.run.threads or None)
    keep_freed_memory()
    device = resolve_device(recipe.run.device)
    saved = recipe.directory / "recipe.toml"
    begun = read_recipe(saved) if saved.is_file() else None
    recipe = settle_precision(recipe, begun, device, console)
    run = Run(recipe, recipe.directory, device, console)
    if begun is not None:
        check_same(dataclasses.asdict(begun), dataclasses.asdict(recipe), run)
    run.directory.mkdir(parents=True, exist_ok=True)
    write_whole(saved, to_toml(recipe))
    return run


def check_runnable(layout: Layout) -> None:
    """[parallel] can be planned whole; what runs today is one device, with everything as the defaults say."""
    if layout.n_devices == 1:
        layout = dataclasses.replace(layout, dp=0)
    for f in dataclasses.fields(layout):
        if (value := getattr(layout, f.name)) != f.default:
            raise ValueError(
                f"parallel.{f.name}={value} is planned only so far: see what it takes with `abyssal plan`, or leave it "
                f"out to run on one device"
            )


def settle_precision(recipe: Recipe, begun: Recipe | None, device: torch.device, console: Console) -> Recipe:
    """What "auto" stands for, said once and saved with the run: a run goes on in the type in which it began."""
    chosen = recipe.run.dtype if begun is None or recipe.run.dtype != "auto" else begun.run.dtype
    precision = str(compute_dtype(chosen, device)).removeprefix("torch.")
    settled = with_precision(recipe, precision)
    if settled != recipe and precision == "float32" and begun is None and chosen == "auto":
        console.print(f"[dim]computing in FP32: this {device.type.upper()} has no BF16 products[/dim]", highlight=False)
    return settled


def check_same(old: dict[str, Any], new: dict[str, Any], run: Run) -> None:
    """Sections that a finished or begun stage has read must not change under it."""
    for stage in STAGES:
        if any((run.stage_dir(stage) / name).exists() for name in LEFT_BEHIND):
            was, wanted = settled(old, stage), settled(new, stage)
            for name in wanted:
                if was[name] != wanted[name]:
                    raise ValueError(
                        f"{run.directory} was begun with another {name}; give this run another name "
                        f"(--run.name) or delete {run.stage_dir(stage)} and what follows it"
                    )


def settled(recipe: dict[str, Any], stage: str) -> dict[str, Any]:
    """What of a recipe a stage has read."""
    sections = READS.get(stage, (stage, "rl_data"))
    read: dict[str, Any] = {f"[{name}]": without_limits(recipe.get(name)) for name in sections}
    read["run.seed"] = recipe["run"]["seed"]
    if stage in ("tokenize", "pretrain"):
        read["run.base"] = recipe["run"]["base"]
    if stage in FROM_BASE:
        read["[extend]"] = recipe["extend"] if recipe["extend"]["steps"] else None
    if stage == "tokenize":  # it lays the mix out in rows of this length
        read["pretrain.row_len"] = recipe["pretrain"]["row_len"]
    return read


def without_limits(section: Any) -> Any:
    """A section without what a stopped stage tells its user to raise."""
    return {k: v for k, v in section.items() if k not in LIMITS} if isinstance(section, dict) else section


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """One process at a time in a run directory, or two would write each other's files. A killed one leaves no lock."""
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is walking {directory}; wait for it, stop it, or give this run another --run.name"
            ) from None
        yield


def walk(run: Run, stages: tuple[str, ...] = STAGES) -> None:
    """Each stage in turn; finished ones are named and passed over."""
    limit_s = run.recipe.rl_data.reward_limit_s
    with alone(run.directory), Verifiers(own_limit_s=limit_s) as verifiers:
        check_own_data(run, verifiers)
        ahead = tuple(stage for stage in stages if not (is_done(run, stage) or run.is_off(stage)))
        planned = forecast(run.recipe, run.device, ahead)
        if run.recipe.plan.refuse:
            check_fits(planned, ahead, run.console)
        for stage in stages:
            if is_done(run, stage) or run.is_off(stage):
                said = "already done" if is_done(run, stage) else "off in this recipe"
                run.console.print(
                    f"[dim][{STAGES.index(stage) + 1}/{len(STAGES)} {stage}] {said}[/dim]", highlight=False
                )
                continue
            began, before_bytes = time.time(), begin_measuring(run.device)
            run.stage_dir(stage).mkdir(parents=True, exist_ok=True)
            with verifiers.recorded_in(run.stage_dir(stage) / "verdicts.jsonl"):
                summary = STEPS[stage](run, stage, verifiers)
            peak_bytes = peak_above(before_bytes, run.device)
            say_beside(planned, stage, run.directory, memory_bytes=peak_bytes, console=run.console)
            done = {"stage": stage, "last_session_s": round(time.time() - began, 1), **machine(run), **summary}
            if stage == "extend":  # it made another base, whose results are not the old one's
                (run.stage_dir("eval") / "results.json").unlink(missing_ok=True)
            if stage in CHECKPOINTS or stage == "extend":  # an evaluation or a report from before is out of date
                for later in ("eval", "report"):
                    (run.stage_dir(later) / "done.json").unlink(missing_ok=True)
            # last of all: behind it nobody comes back to this stage
            write_whole(run.stage_dir(stage) / "done.json", json.dumps(done, indent=2) + "\n")


def is_done(run: Run, stage: str) -> bool:
    return (run.stage_dir(stage) / "done.json").is_file()


def check_own_data(run: Run, verifiers: Verifiers) -> None:
    """The user's own files and rewards, before hours are spent on the stages ahead of them."""
    stream = run.stream()
    for verifier in {problem.verifier for problem in (*stream.own, *stream.own_held_out)}:
        verifiers.check(verifier)
    for config in (run.recipe.cold_start, run.recipe.reject, run.recipe.distil):
        if config.data:
            read_conversations(config.data)


def machine(run: Run) -> dict[str, Any]:
    return {"torch": torch.__version__, "device": str(run.device), "threads": torch.get_num_threads()}
