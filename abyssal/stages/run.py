"""A run under way: its stages by name, its directory, the checkpoints and problems that its stages read.

Owns names and places. Does not own the order of work (way.py) nor what a stage does (steps.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from abyssal.checkpoint.load import load_checkpoint
from abyssal.data.user_examples import read_user_problems
from abyssal.model.transformer import Transformer
from abyssal.record import Recorder
from abyssal.stages.recipe import Recipe
from abyssal.stages.rl import ProblemStream
from abyssal.tokens.tokenizer import Tokenizer

# stage -> the checkpoint it leaves, in the order of the way
STAGES = (
    "tokenize", "pretrain", "extend", "zero", "cold_start", "reason", "reject", "align",
    "distil", "student_rl", "on_policy", "eval", "report",
)  # fmt: skip
CHECKPOINTS = {
    "pretrain": "base",
    "zero": "zero",
    "cold_start": "dev1",
    "reason": "dev2",
    "reject": "dev3",
    "align": "r1",
    "distil/base": "student_base",  # what the three arms of the student start from
    "distil": "student",
    "student_rl": "student_rl",
    "on_policy": "student_opd",
}
OPTIONAL = ("extend", "student_rl", "on_policy")  # passed over in a recipe that gives them no steps
FIRST_PROBLEM = {
    "extend": 3_000_000,
    "zero": 5_000_000,
    "cold_start": 10_000_000,
    "reason": 20_000_000,
    "reject": 30_000_000,
    "align": 40_000_000,
    "distil": 50_000_000,
    "student_rl": 60_000_000,
    "on_policy": 70_000_000,
}  # stages draw from parts of the problem stream that do not overlap; pretraining has its beginning
# fixed, whatever stands between them: a run begun before a stage was added goes on with the noise it had
SEED_NUMBER = {
    "tokenize": 1, "pretrain": 2, "zero": 3, "cold_start": 4, "reason": 5, "reject": 6, "align": 7, "distil": 8,
    "eval": 9, "report": 10, "student_rl": 11, "on_policy": 12, "extend": 13,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run under way. `tokenizer` and checkpoints are read from its directory when a stage needs them."""

    recipe: Recipe
    directory: Path
    device: torch.device
    console: Console

    def is_off(self, stage: str) -> bool:
        return stage in OPTIONAL and getattr(self.recipe, stage).steps == 0

    def stage_dir(self, stage: str) -> Path:
        return self.directory / stage

    def stage_of(self, name: str) -> str:
        """Who leaves a checkpoint. Where the context is extended, the longer one is the base of all later stages."""
        if name == "base" and not self.is_off("extend"):
            return "extend"
        return next(stage for stage, leaves in CHECKPOINTS.items() if leaves == name)

    def checkpoint(self, name: str) -> Path:
        return self.stage_dir(self.stage_of(name)) / "checkpoint"

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.stage_dir("tokenize") / "tokenizer")

    def load(self, name: str, dtype: str) -> Transformer:
        return load_checkpoint(self.checkpoint(name), dtype=dtype, device=self.device).model

    def recorder_at(self, stage: str) -> Callable[[int], Recorder]:
        k = STAGES.index(stage) + 1
        return lambda step: Recorder(
            self.stage_dir(stage), stage, k, len(STAGES), resume_from_step=step, console=self.console
        )

    def stream(self, config_instructions: float = 0.0) -> ProblemStream:
        files = self.recipe.rl_data
        own = tuple(read_user_problems(files.train)) if files.train else ()
        own_held_out = tuple(read_user_problems(files.held_out, distinct=True)) if files.held_out else ()
        if bool(own) != bool(own_held_out):
            raise ValueError(
                f"rl_data.train={files.train!r} and rl_data.held_out={files.held_out!r}: give both, or the measure "
                f"would be of other problems than the training"
            )
        trained_on = {problem.key for problem in own}
        if both := [problem.prompt for problem in own_held_out if problem.key in trained_on]:
            raise ValueError(
                f"{len(both)} problems of {files.held_out} stand in {files.train} too, first {both[0][:80]!r}; "
                f"take them out of one: what is trained on measures nothing"
            )
        source = replace(self.recipe.data.problems, instruction_share=config_instructions)
        return ProblemStream(source=source, seed=self.recipe.run.seed, own=own, own_held_out=own_held_out)


def write_whole(path: Path, text: str) -> None:
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_text(text, encoding="utf-8")
    os.replace(partial_path, path)
