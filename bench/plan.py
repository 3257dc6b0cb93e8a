"""The plan beside the machine: runs planned first and measured after. Time within 20 %, memory within 10 %.

    python bench/plan.py [--threads 1] [--machine FILE] [--runs train-3M train-11M train-63M rl generate ...]

The method was developed on the first five; the last three, of other shapes, it had not seen when it was done.
The machine is measured first, by `abyssal plan --measure`'s microbenchmarks, in a process of its own; a run is then
planned from that file alone, and only then measured, in a process of its own too. This is done run by run: a machine
that others use as well is another one a minute later.

Training is forward, backward, AdamW and the balance of experts on 8 rows of 256 tokens (24 of 64 and 3 of 512 in
"short" and "long"), as stages/pretrain.py does it, at bench/common.py's sizes. RL is a step of GRPO of
runs/laptop.toml's model: 8 answers to each of 8 problems, every one 64 tokens long since no end token is drawn, their
comparison with the trainer, reference, update, and new weights for the engine. Generation is the engine on 16 requests
(4 in "few"), greedy. Times are medians of steps, the first two left out. With one thread they are the processor's,
which other jobs on the machine hardly lengthen; with more they are the wall's. Memory is the highest resident size of
the process less that after imports.
"""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from common import RESULTS, Size, append_result, make_ours, model_config
from plan_chart import chart, last_of_each

from abyssal.data.corpus import open_source
from abyssal.data.problems import ProblemSource, problem_at
from abyssal.engine.engine import Engine
from abyssal.loss.grpo import group_advantages
from abyssal.machine import keep_freed_memory, set_threads
from abyssal.model.config import ModelConfig
from abyssal.model.transformer import Transformer
from abyssal.optim.clip import clip_gradients
from abyssal.plan.answer_lengths import AnswerLengths
from abyssal.plan.generation import plan_generation
from abyssal.plan.layout import Layout
from abyssal.plan.machine_file import MachineSpec, read_machine
from abyssal.plan.memory_limit import forget_peak, resident_bytes
from abyssal.plan.rl_step import RlWork, plan_rl
from abyssal.plan.training import TrainingPlan, plan_training
from abyssal.rollout import agreement, sample_answers
from abyssal.stages.objective import Batch
from abyssal.stages.policy_update import GrpoConfig, answer_batch, update_policy
from abyssal.stages.pretrain import PretrainConfig, backward, balance
from abyssal.stages.recipe import read_recipe
from abyssal.stages.state import TrainState, apply_step, build_optimizers
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.chat import render
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Message, Problem, SamplingParams

Run = Literal[
    "train-3M", "train-11M", "train-63M", "rl", "generate",
    "train-3M-short", "train-11M-long", "generate-3M-few",
]  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
# size, rows, tokens of a row
TRAINED: dict[Run, tuple[Size, int, int]] = {
    "train-3M": ("3M", 8, 256),
    "train-11M": ("11M", 8, 256),
    "train-63M": ("63M", 8, 256),
    "train-3M-short": ("3M", 24, 64),
    "train-11M-long": ("11M", 3, 512),
}
GENERATED: dict[Run, tuple[Size, int]] = {"generate": ("11M", 16), "generate-3M-few": ("3M", 4)}  # size, requests
PROBLEMS, ANSWERS, NEW_TOKENS, ROWS_PER_PASS, COMPARED = 8, 8, 64, 16, 8
PROMPT, DRAWN = 32, 64
STEPS: dict[Run, int] = {"train-63M": 6, "rl": 5}  # timed, with the two left out; the others:
STEPS_OF_OTHERS = 8
TIME_WITHIN, MEMORY_WITHIN = 0.20, 0.10


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: tuple[Run, ...] = get_args(Run)
    threads: int = 1
    machine: Path | None = None  # measured before; None: measure anew for each run
    save: bool = True  # append the results to results/plan.jsonl and draw results/plan.svg
    only: Run | None = None  # this process measures one run and prints it; the script calls itself so


@dataclass(frozen=True, kw_only=True)
class Figures:
    seconds: float
    peak_bytes: float


def planned(run: Run, machine: MachineSpec) -> Figures:
    """From the machine's file and the run's sizes; nothing of the model is made."""
    if run == "rl":
        return planned_rl(machine)
    if run in GENERATED:
        size, requests = GENERATED[run]
        plan = plan_generation(
            model_config(size), machine=machine, requests=requests, prompt_tokens=PROMPT, answers=DRAWN, greedy=True
        )
        return Figures(seconds=plan.total_seconds, peak_bytes=machine.resident_bytes(lasting_bytes=plan.memory_bytes))
    size, rows, row_len = TRAINED[run]
    training = planned_training(model_config(size), machine, row_len=row_len, rows=rows)
    return Figures(
        seconds=training.step_seconds, peak_bytes=resident_bytes_of(training, machine, training.peak_memory_bytes)
    )


def resident_bytes_of(training: TrainingPlan, machine: MachineSpec, tensor_bytes: float) -> float:
    """Gradients, activations and scratch come and go with every step; what else there is lasts."""
    (rank,) = training.memory
    passing = rank.gradients_bytes + rank.activations_bytes + rank.temporary_bytes
    return machine.resident_bytes(lasting_bytes=tensor_bytes - passing, passing_bytes=passing)


def planned_training(
    config: ModelConfig, machine: MachineSpec, *, row_len: int, rows: int, micro_rows: int = 0
) -> TrainingPlan:
    layout = Layout(precision="float32", micro_rows=micro_rows)
    return plan_training(config, machine=machine, layout=layout, row_len=row_len, batch_rows=rows)


def planned_rl(machine: MachineSpec) -> Figures:
    config, tokenizer = rl_config(), rl_tokenizer()
    lengths = [len(prompt_ids(problem, tokenizer)) for problem in rl_problems()]
    row_len = -(-(max(lengths) + NEW_TOKENS) // 8) * 8
    training = planned_training(
        config, machine, row_len=row_len, rows=PROBLEMS * ANSWERS, micro_rows=ROWS_PER_PASS
    )
    work = RlWork(
        problems=PROBLEMS,
        answers=ANSWERS,
        prompt_tokens=round(statistics.mean(lengths)),
        lengths=AnswerLengths(mean_tokens=NEW_TOKENS, max_tokens=NEW_TOKENS),
        compare_answers=COMPARED,
    )
    plan = plan_rl(config, machine=machine, work=work, training=training)
    return Figures(seconds=plan.step_seconds, peak_bytes=resident_bytes_of(training, machine, plan.memory_bytes))


def training_steps(size: Size, rows: int, row_len: int) -> Callable[[], object]:
    config = model_config(size)
    model = make_ours(config, dtype=torch.float32)
    optimizers = build_optimizers(model, kind="adamw", lr=0.0, adamw_lr=1e-4, weight_decay=0.05)
    like = PretrainConfig(optimizer="adamw", rows=rows, row_len=row_len, dtype="float32")
    ids_BT = torch.randint(config.vocab_size, (rows, row_len), generator=torch.Generator().manual_seed(1))
    batch = Batch(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), None)

    def step() -> None:
        losses = backward(model, batch, like, 0)
        clip_gradients(model.parameters(), like.clip)
        apply_step(optimizers, 1.0)
        balance(model, losses.loads, like, 0)

    return step


def generation_steps(size: Size, requests: int) -> Callable[[], object]:
    config = model_config(size)
    engine = Engine(make_ours(config, dtype=torch.float32), eos_ids=(), max_batch=requests, record_experts=False)
    ids_BT = torch.randint(config.vocab_size, (requests, PROMPT), generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=0.0, max_tokens=DRAWN)
    return lambda: engine.generate(ids_BT.tolist(), params)


def rl_config() -> ModelConfig:
    return read_recipe(ROOT / "runs" / "laptop.toml").model


def rl_tokenizer() -> Tokenizer:
    texts = [document.text for document, _ in zip(open_source("python", seed=0).documents(), range(20), strict=False)]
    return Tokenizer(train_bpe(texts, vocab_size=rl_config().vocab_size))


def rl_problems() -> list[Problem]:
    return [problem_at(ProblemSource(), 0, i) for i in range(PROBLEMS)]


def prompt_ids(problem: Problem, tokenizer: Tokenizer) -> list[int]:
    return render([Message(role="user", content=problem.prompt)], tokenizer, add_generation_prompt=True).ids


def rl_steps(tokenizer: Tokenizer, problems: list[Problem]) -> Callable[[], object]:
    """A step as stages/rl.py takes it, grading apart: its rewards are drawn by lot, so that every answer is learned."""
    config = rl_config()
    model, reference = (Transformer(config).init_weights(torch.Generator().manual_seed(0)) for _ in range(2))
    reference.requires_grad_(False)
    state = TrainState(model, build_optimizers(model, kind="adamw", lr=0.0, adamw_lr=1e-5, weight_decay=0.0))
    engine = Engine(
        model, eos_ids=(), max_batch=PROBLEMS * ANSWERS, record_sampling=True, vocab_size=tokenizer.vocab_size
    )
    params, shuffle = SamplingParams(max_tokens=NEW_TOKENS), torch.Generator().manual_seed(0)

    def step() -> None:
        rollouts = sample_answers(engine, tokenizer, problems, answers_per_problem=ANSWERS, params=params, seed=0)
        assert all(len(rollout.completion.ids) == NEW_TOKENS for rollout in rollouts)
        scores_PG = torch.rand(PROBLEMS, ANSWERS, generator=shuffle)
        completions = [rollout.completion for rollout in rollouts]
        agreement(model, completions[:COMPARED], replay=True, vocab_size=tokenizer.vocab_size)
        answers = answer_batch(
            rollouts,
            group_advantages(scores_PG).flatten().tolist(),
            row_len=0,
            pad_id=tokenizer.pad_id,
            device=torch.device("cpu"),
            vocab_size=tokenizer.vocab_size,
        )
        update_policy(
            state,
            answers,
            reference=reference,
            config=GrpoConfig(),
            lr_fraction=1.0,
            rows_per_pass=ROWS_PER_PASS,
            shuffle=shuffle,
        )
        engine.load_weights(model)

    return step


def measured(run: Run, threads: int) -> dict[str, Any]:
    """In this process, which has done nothing else."""
    set_threads(threads)
    keep_freed_memory()  # as our commands do
    importlib.import_module("torch._dynamo")  # as torch does it at an optimizer's first step
    asked = (rl_tokenizer(), rl_problems()) if run == "rl" else None
    before = resident_bytes()
    forget_peak()
    if asked is not None:
        step = rl_steps(*asked)
    elif run in GENERATED:
        step = generation_steps(*GENERATED[run])
    else:
        step = training_steps(*TRAINED[run])
    clock, times = time.process_time if threads == 1 else time.perf_counter, []
    for _ in range(STEPS.get(run, STEPS_OF_OTHERS)):
        began = clock()
        step()
        times.append(clock() - began)
    return {"times": times, "peak_bytes": resident_bytes("VmHWM") - before}


def in_own_process(run: Run, threads: int) -> tuple[Figures, list[float]]:
    command = [sys.executable, __file__, "--only", run, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{run} failed: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    times = found["times"][2:]
    return Figures(seconds=statistics.median(times), peak_bytes=found["peak_bytes"]), times


def machine_of(options: Options) -> MachineSpec:
    if options.machine is not None:
        return read_machine(options.machine)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "here.toml"
        code = (
            "from pathlib import Path; from abyssal.plan.measure_machine import measure_machine; "
            f"measure_machine(threads={options.threads}, out=Path({str(path)!r}), device='cpu')"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
        return read_machine(path)


def off(planned: float, measured: float) -> float:
    return planned / measured - 1


def main(options: Options) -> None:
    if options.only is not None:
        print(json.dumps(measured(options.only, options.threads)))
        return
    print(f"{'run':>10} {'planned':>10} {'measured':>10} {'off':>7}  {'planned':>9} {'measured':>9} {'off':>7}")
    for run in options.runs:
        plan = planned(run, machine_of(options))  # before anything of it is run
        found, times = in_own_process(run, options.threads)
        time_off, memory_off = off(plan.seconds, found.seconds), off(plan.peak_bytes, found.peak_bytes)
        held = abs(time_off) <= TIME_WITHIN and abs(memory_off) <= MEMORY_WITHIN
        print(
            f"{run:>10} {1e3 * plan.seconds:7.0f} ms {1e3 * found.seconds:7.0f} ms {100 * time_off:+6.1f}%"
            f"  {plan.peak_bytes / 1e6:6.0f} MB {found.peak_bytes / 1e6:6.0f} MB {100 * memory_off:+6.1f}%"
            f"  {'held' if held else 'MISSED'}",
            flush=True,
        )
        if options.save:
            append_result("plan", {
                "run": run, "planned_seconds": plan.seconds, "measured_seconds": found.seconds, "times": times,
                "planned_peak_bytes": plan.peak_bytes, "measured_peak_bytes": found.peak_bytes,
                "clock": "process" if options.threads == 1 else "wall", "held": held,
            })  # fmt: skip
    if options.save:
        rows = last_of_each(RESULTS / "plan.jsonl")
        picture = chart(rows, time_within=TIME_WITHIN, memory_within=MEMORY_WITHIN)
        (RESULTS / "plan.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
