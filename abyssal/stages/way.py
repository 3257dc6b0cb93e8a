"""The way: every stage in order, each taking up where it stopped and leaving a checkpoint in DeepSeek's own name.

    tokenize -> pretrain (base) -> zero (zero) -> cold_start (dev1) -> reason (dev2) -> reject (dev3) -> align (r1)
             -> distil (student) -> eval -> report

A stage is done when its done.json is there. Everything before that line can be killed at any moment.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from abyssal.checkpoint.save import load_checkpoint
from abyssal.data.problems import ProblemSource, problem_at
from abyssal.data.user_examples import read_conversations, read_user_problems
from abyssal.data.worked import right_content, write_thinking
from abyssal.engine.engine import Engine
from abyssal.evals.page import write_report
from abyssal.machine import keep_freed_memory, resolve_device, set_threads
from abyssal.model.config import ModelConfig
from abyssal.model.transformer import Transformer
from abyssal.record import Recorder
from abyssal.reward.verifiers import Verifiers
from abyssal.stages.measure import measure
from abyssal.stages.pretrain import pretrain
from abyssal.stages.recipe import Recipe, TracedSftConfig, read_recipe, to_toml
from abyssal.stages.rl import ProblemStream, RlConfig, reinforce
from abyssal.stages.sft import fine_tune
from abyssal.stages.tokenize import tokenize
from abyssal.stages.traces import sample_traces
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Conversation, Message

# stage -> the checkpoint it leaves, in the order of the way
STAGES = ("tokenize", "pretrain", "zero", "cold_start", "reason", "reject", "align", "distil", "eval", "report")
CHECKPOINTS = {
    "pretrain": "base",
    "zero": "zero",
    "cold_start": "dev1",
    "reason": "dev2",
    "reject": "dev3",
    "align": "r1",
    "distil": "student",
}
# the sections of the recipe that a stage reads, where they are not its own and rl_data
READS: dict[str, tuple[str, ...]] = {
    "tokenize": ("tokenizer", "data"),
    "pretrain": ("model", "pretrain"),
    "distil": ("student", "student_pretrain", "distil", "rl_data"),
    "report": (),
}
FIRST_PROBLEM = {
    "zero": 5_000_000,
    "cold_start": 10_000_000,
    "reason": 20_000_000,
    "reject": 30_000_000,
    "align": 40_000_000,
    "distil": 50_000_000,
}  # stages draw from parts of the problem stream that do not overlap; pretraining has its beginning
# what a stage leaves behind that a later start takes up
LEFT_BEHIND = ("checkpoint", "checkpoint.old", "traces.jsonl", "base", "results.json", "done.json")


@dataclass(frozen=True)
class Run:
    """A run under way. `tokenizer` and checkpoints are read from its directory when a stage needs them."""

    recipe: Recipe
    directory: Path
    device: torch.device
    console: Console

    def stage_dir(self, stage: str) -> Path:
        return self.directory / stage

    def checkpoint(self, name: str) -> Path:
        stage = next(stage for stage, leaves in CHECKPOINTS.items() if leaves == name)
        return self.stage_dir(stage) / "checkpoint"

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
        own_held_out = tuple(read_user_problems(files.held_out)) if files.held_out else ()
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


def open_run(recipe: Recipe, console: Console) -> Run:
    """The run directory with its recipe; a recipe that differs where stages have already run is refused."""
    set_threads(recipe.run.threads or None)
    keep_freed_memory()
    run = Run(recipe, recipe.directory, resolve_device(recipe.run.device), console)
    saved = run.directory / "recipe.toml"
    if saved.is_file():
        check_same(asdict(read_recipe(saved)), asdict(recipe), run)
    run.directory.mkdir(parents=True, exist_ok=True)
    write_whole(saved, to_toml(recipe))
    return run


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
    read = {f"[{section}]": recipe.get(section) for section in READS.get(stage, (stage, "rl_data"))}
    read["run.seed"] = recipe["run"]["seed"]
    if stage == "tokenize":  # it lays the mix out in rows of this length
        read["pretrain.row_len"] = recipe["pretrain"]["row_len"]
    return read


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
    with alone(run.directory), Verifiers() as verifiers:
        check_own_data(run, verifiers)
        for stage in stages:
            if (run.stage_dir(stage) / "done.json").is_file():
                run.console.print(
                    f"[dim][{STAGES.index(stage) + 1}/{len(STAGES)} {stage}] already done[/dim]", highlight=False
                )
                continue
            began = time.time()
            run.stage_dir(stage).mkdir(parents=True, exist_ok=True)
            summary = STEPS[stage](run, stage, verifiers)
            done = {"stage": stage, "last_session_s": round(time.time() - began, 1), **machine(run), **summary}
            write_whole(run.stage_dir(stage) / "done.json", json.dumps(done, indent=2) + "\n")
            if stage in CHECKPOINTS:  # an evaluation or a report from before is out of date
                for later in ("eval", "report"):
                    (run.stage_dir(later) / "done.json").unlink(missing_ok=True)


def check_own_data(run: Run, verifiers: Verifiers) -> None:
    """The user's own files and rewards, before hours are spent on the stages ahead of them."""
    stream = run.stream()
    for verifier in {problem.verifier for problem in (*stream.own, *stream.own_held_out)}:
        verifiers.check(verifier)
    for config in (run.recipe.cold_start, run.recipe.reject, run.recipe.distil):
        if config.data:
            read_conversations(config.data)


def run_tokenize(run: Run, stage: str, verifiers: Verifiers) -> dict[str, Any]:
    recipe = run.recipe
    with run.recorder_at(stage)(0) as recorder:
        tokenizer = tokenize(
            run.stage_dir(stage),
            config=recipe.tokenizer,
            data=recipe.data,
            row_len=recipe.pretrain.row_len,
            seed=recipe.run.seed,
            recorder=recorder,
        )
    return {"vocab_size": tokenizer.vocab_size}


def run_pretrain(run: Run, stage: str, verifiers: Verifiers) -> dict[str, Any]:
    recipe, tokenizer = run.recipe, run.tokenizer()
    pretrain(
        run.stage_dir(stage),
        config=recipe.pretrain,
        model_config=fitted(recipe.model, tokenizer),
        tokens_dir=run.stage_dir("tokenize"),
        tokenizer=tokenizer,
        seed=recipe.run.seed,
        device=run.device,
        recorder_at=run.recorder_at(stage),
    )
    return {}


def run_rl(run: Run, stage: str, verifiers: Verifiers, *, start: str) -> dict[str, Any]:
    config: RlConfig = getattr(run.recipe, stage)
    reinforce(
        run.stage_dir(stage),
        config=config,
        model=run.load(start, config.dtype),
        tokenizer=run.tokenizer(),
        stream=run.stream(config.instruction_share),
        first_problem=FIRST_PROBLEM[stage],
        verifiers=verifiers,
        seed=seed_of(run, stage),
        recorder_at=run.recorder_at(stage),
    )
    return {}


def run_traced_sft(run: Run, stage: str, verifiers: Verifiers, *, teacher: str, start: str | None) -> dict[str, Any]:
    """Traces of `teacher`, then SFT of `start`, or of a new student when there is none."""
    config: TracedSftConfig = getattr(run.recipe, stage)
    tokenizer, directory = run.tokenizer(), run.stage_dir(stage)
    if not (directory / "traces.jsonl").is_file():
        model = run.load(teacher, config.sft.dtype)
        engine = Engine(model, eos_ids=[tokenizer.eos_id], max_batch=256, record_experts=False)
        with Recorder(
            directory / "traces", f"{stage} traces", STAGES.index(stage) + 1, len(STAGES), console=run.console
        ) as recorder:
            sample_traces(
                directory,
                config=config.traces,
                engine=engine,
                tokenizer=tokenizer,
                stream=run.stream(),
                first_problem=FIRST_PROBLEM[stage],
                verifiers=verifiers,
                seed=seed_of(run, stage),
                recorder=recorder,
            )
        write_whole(directory / "traces" / "done.json", "{}\n")
    traces = read_conversations(directory / "traces.jsonl")
    general = general_data(run, config.general, first=FIRST_PROBLEM[stage] + config.traces.problems)
    own = read_conversations(config.data) if config.data else []
    model = student_base(run, tokenizer, config.sft.dtype) if start is None else run.load(start, config.sft.dtype)
    fine_tune(
        directory,
        config=config.sft,
        model=model,
        tokenizer=tokenizer,
        conversations=traces + general + own,
        seed=seed_of(run, stage),
        recorder_at=run.recorder_at(stage),
    )
    return {"traces": len(traces), "general": len(general), "own": len(own)}


def run_eval(run: Run, stage: str, verifiers: Verifiers) -> dict[str, Any]:
    names = [name for stage_, name in CHECKPOINTS.items() if (run.stage_dir(stage_) / "done.json").is_file()]
    if not names:
        raise ValueError(f"{run.directory} has no checkpoint to evaluate yet; run `abyssal pretrain` first")
    with run.recorder_at(stage)(0) as recorder:
        measure(
            run.stage_dir(stage),
            config=run.recipe.eval,
            source=run.recipe.data.problems,
            load=lambda name: run.load(name, "float32"),
            names=names,
            tokenizer=run.tokenizer(),
            verifiers=verifiers,
            seed=seed_of(run, stage),
            stream=run.stream(),
            recorder=recorder,
        )
    return {"checkpoints": names}


def run_report(run: Run, stage: str, verifiers: Verifiers) -> dict[str, Any]:
    return {"page": str(write_report(run.directory))}


STEPS: dict[str, Callable[[Run, str, Verifiers], dict[str, Any]]] = {
    "tokenize": run_tokenize,
    "pretrain": run_pretrain,
    "zero": partial(run_rl, start="base"),  # R1-Zero: no SFT before it
    "cold_start": partial(run_traced_sft, teacher="zero", start="base"),
    "reason": partial(run_rl, start="dev1"),
    "reject": partial(run_traced_sft, teacher="dev2", start="base"),  # from the base again, as R1 does
    "align": partial(run_rl, start="dev3"),
    "distil": partial(run_traced_sft, teacher="r1", start=None),
    "eval": run_eval,
    "report": run_report,
}


def student_base(run: Run, tokenizer: Tokenizer, dtype: str) -> Transformer:
    """A small dense model pretrained on the same rows as the base: what R1's students were before they were taught."""
    directory = run.stage_dir("distil") / "base"
    config = run.recipe.student_pretrain
    if not (directory / "done.json").is_file():
        directory.mkdir(parents=True, exist_ok=True)
        k = STAGES.index("distil") + 1
        pretrain(
            directory,
            config=config,
            model_config=fitted(run.recipe.student, tokenizer),
            tokens_dir=run.stage_dir("tokenize"),
            tokenizer=tokenizer,
            seed=run.recipe.run.seed,
            device=run.device,
            recorder_at=lambda step: Recorder(
                directory, "student base", k, len(STAGES), resume_from_step=step, console=run.console
            ),
        )
        write_whole(directory / "done.json", "{}\n")
    return load_checkpoint(directory / "checkpoint", dtype=dtype, device=run.device).model


def general_data(run: Run, count: int, *, first: int) -> list[Conversation]:
    """Questions with a rule about the form of the answer, worked out and answered as the rule asks, in one language."""
    source: ProblemSource = replace(run.recipe.data.problems, instruction_share=1.0)
    conversations = []
    for index in range(first, first + count):
        problem = problem_at(source, run.recipe.run.seed, index)
        thinking = None
        if problem.steps:
            thinking = write_thinking(
                problem, words=problem.language, brevity="full", rng=random.Random(f"general {index}")
            )
        answer = Message(role="assistant", content=right_content(problem), thinking=thinking)
        conversations.append([Message(role="user", content=problem.prompt), answer])
    return conversations


def fitted(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model's table covers the vocabulary, padded to 64 rows as its kernels like."""
    return replace(config, vocab_size=-(-tokenizer.vocab_size // 64) * 64)


def seed_of(run: Run, stage: str) -> int:
    """Stages must not draw with each other's noise."""
    return run.recipe.run.seed * 1_000_003 + (STAGES.index(stage) + 1) * 10_000_019


def machine(run: Run) -> dict[str, Any]:
    return {"torch": torch.__version__, "device": str(run.device), "threads": torch.get_num_threads()}


def write_whole(path: Path, text: str) -> None:
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_text(text, encoding="utf-8")
    os.replace(partial_path, path)
