"""What each stage of the way does with a run: its inputs gathered, its work called, its summary returned."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from abyssal.checkpoint.load import load_checkpoint, load_config
from abyssal.checkpoint.save import save_checkpoint
from abyssal.data.preferences import request_at
from abyssal.data.problems import ProblemSource, problem_at
from abyssal.data.user_examples import read_conversations
from abyssal.data.worked import right_content, web_document, write_thinking
from abyssal.engine.engine import Engine
from abyssal.evals.page import write_report
from abyssal.model.config import ModelConfig
from abyssal.model.transformer import Transformer
from abyssal.record import Recorder, read_steps, seconds_of_work
from abyssal.reward.verifiers import Verifiers
from abyssal.stages.evaluation_sets import evaluation_sets
from abyssal.stages.extend import extend
from abyssal.stages.foreign import foreign_model, foreign_tokenizer
from abyssal.stages.measure import measure
from abyssal.stages.on_policy import distil_on_policy
from abyssal.stages.preference_judge import Judge
from abyssal.stages.pretrain import pretrain
from abyssal.stages.recipe import TracedSftConfig
from abyssal.stages.reward_model import load_scores, said_of, train_reward_model
from abyssal.stages.rl import RlConfig, reinforce
from abyssal.stages.run import CHECKPOINTS, FIRST_PROBLEM, SEED_NUMBER, STAGES, Run, write_whole
from abyssal.stages.sft import fine_tune
from abyssal.stages.tokenize import tokenize
from abyssal.stages.traces import sample_traces
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Conversation, Message

REWARD_MODEL_FIRST = 5_000_000  # its requests lie behind those that `align` itself draws


def run_tokenize(run: Run, stage: str, verifiers: Verifiers) -> dict[str, Any]:
    recipe = run.recipe
    with run.recorder_at(stage)(0) as recorder:
        given = None
        if base := recipe.run.base:
            given = foreign_tokenizer(Path(base), say=recorder.log)
            recorder.log(f"start from {base}: the [model] of the recipe gives way to its config.json")
        tokenizer = tokenize(
            run.stage_dir(stage),
            config=recipe.tokenizer,
            data=recipe.data,
            evaluation=evaluation_sets(
                run,
                seeds={stage: seed_of(run, stage) for stage in ("eval", "align")},
                first_pair=FIRST_PROBLEM["align"] + REWARD_MODEL_FIRST,
            ),
            row_len=recipe.pretrain.row_len,
            seed=recipe.run.seed,
            recorder=recorder,
            given=given,
        )
    return {"vocab_size": tokenizer.vocab_size} | ({"base": recipe.run.base} if recipe.run.base else {})


def run_pretrain(run: Run, stage: str, verifiers: Verifiers) -> dict[str, Any]:
    recipe, tokenizer = run.recipe, run.tokenizer()
    base, start = recipe.run.base, None
    if base:
        start = foreign_model(Path(base), tokenizer, dtype=recipe.pretrain.dtype, device=run.device)
        if not recipe.pretrain.steps:  # nothing to train: the checkpoint is the model that was given
            save_checkpoint(run.stage_dir(stage) / "checkpoint", start, tokenizer)
            return {"base": base}
    elif not recipe.pretrain.steps:
        raise ValueError("pretrain.steps=0 leaves the base untrained; train it, or name a checkpoint as run.base")
    pretrain(
        run.stage_dir(stage),
        config=recipe.pretrain,
        model_config=fitted(recipe.model, tokenizer) if start is None else start.config,
        tokens_dir=run.stage_dir("tokenize"),
        tokenizer=tokenizer,
        seed=recipe.run.seed,
        device=run.device,
        recorder_at=run.recorder_at(stage),
        start=start,
    )
    return {"base": base} if base else {}


def run_extend(run: Run, stage: str, verifiers: Verifiers) -> dict[str, Any]:
    recipe, base = run.recipe, run.stage_dir("pretrain") / "checkpoint"
    # a base of ours knows the rows it was trained on; one that came whole says itself how far it goes
    whole = bool(recipe.run.base) and not recipe.pretrain.steps
    k = STAGES.index(stage) + 1
    return extend(
        run.stage_dir(stage),
        config=recipe.extend,
        like=recipe.pretrain,
        data=recipe.data,
        documents=run.stage_dir("tokenize") / "documents",
        base=base,
        context=load_config(base).max_position_embeddings if whole else recipe.pretrain.row_len,
        first_problem=FIRST_PROBLEM[stage],
        tokenizer=run.tokenizer(),
        seed=seed_of(run, stage),
        device=run.device,
        recorder_at=lambda directory, title: lambda step: Recorder(
            directory, title, k, len(STAGES), resume_from_step=step, console=run.console
        ),
    )


def run_rl(run: Run, stage: str, verifiers: Verifiers, *, start: str | None) -> dict[str, Any]:
    """RL of `start`, or of the student's base when there is none."""
    config: RlConfig = getattr(run.recipe, stage)
    config, tokenizer = replace(config, seconds=seconds_allowed(run, stage, config.seconds)), run.tokenizer()
    model = student_base(run, tokenizer, config.dtype) if start is None else run.load(start, config.dtype)
    judge = trained_judge(run, stage, model) if config.preference_share else None
    reinforce(
        run.stage_dir(stage),
        config=config,
        model=model,
        tokenizer=tokenizer,
        stream=run.stream(config.instruction_share),
        first_problem=FIRST_PROBLEM[stage],
        verifiers=verifiers,
        seed=seed_of(run, stage),
        recorder_at=run.recorder_at(stage),
        judge=judge,
    )
    return {} if judge is None else {"reward_model": judge.heads}


def trained_judge(run: Run, stage: str, policy: Transformer) -> Judge:
    """A reward model made from the policy that `align` starts from; its accuracy is said aloud."""
    directory, config, tokenizer = run.stage_dir(stage) / "reward_model", run.recipe.reward_model, run.tokenizer()
    k = STAGES.index(stage) + 1
    train_reward_model(
        directory,
        config=config,
        policy=policy,
        tokenizer=tokenizer,
        source=run.recipe.data.problems,
        first=FIRST_PROBLEM[stage] + REWARD_MODEL_FIRST,
        seed=seed_of(run, stage),
        recorder_at=lambda step: Recorder(
            directory, "reward model", k, len(STAGES), resume_from_step=step, console=run.console
        ),
    )
    scores, heads = load_scores(directory, config=config, tokenizer=tokenizer, device=run.device)
    for head, facts in heads.items():
        run.console.print(f"reward model: {said_of(head, facts)}", highlight=False)
    return Judge(scores, heads, clip=run.recipe.align.preference_clip)


def run_on_policy(run: Run, stage: str, verifiers: Verifiers) -> dict[str, Any]:
    """The student learns from what r1 would have said at each place of the student's own answers."""
    config, tokenizer = run.recipe.on_policy, run.tokenizer()
    config = replace(config, seconds=seconds_allowed(run, stage, config.seconds))
    from_base = config.start == "base"
    distil_on_policy(
        run.stage_dir(stage),
        config=config,
        model=student_base(run, tokenizer, config.dtype) if from_base else run.load("student", config.dtype),
        teacher=run.load("r1", config.dtype),
        tokenizer=tokenizer,
        stream=run.stream(),
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
    if config.traces.problems and not (directory / "traces.jsonl").is_file():
        model = run.load(teacher, config.sft.dtype)
        engine = Engine(
            model, eos_ids=[tokenizer.eos_id], max_batch=256, record_experts=False, vocab_size=tokenizer.vocab_size
        )
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
    if (directory / "traces").is_dir():
        write_whole(directory / "traces" / "done.json", "{}\n")
    traces = read_conversations(directory / "traces.jsonl") if config.traces.problems else []
    general = general_data(run, config.general, first=FIRST_PROBLEM[stage] + config.traces.problems)
    general += request_data(run, config.requests, first=FIRST_PROBLEM[stage])
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
    names = [n for n in CHECKPOINTS.values() if (run.stage_dir(run.stage_of(n)) / "done.json").is_file()]
    if not names:
        raise ValueError(f"{run.directory} has no checkpoint to evaluate yet; run `abyssal pretrain` first")
    with run.recorder_at(stage)(0) as recorder:
        measure(
            run.stage_dir(stage),
            config=run.recipe.eval,
            source=run.recipe.data.problems,
            load=run.load,
            checkpoint=run.checkpoint,
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
    "extend": run_extend,
    "zero": partial(run_rl, start="base"),  # R1-Zero: no SFT before it
    "cold_start": partial(run_traced_sft, teacher="zero", start="base"),
    "reason": partial(run_rl, start="dev1"),
    "reject": partial(run_traced_sft, teacher="dev2", start="base"),  # from the base again, as R1 does
    "align": partial(run_rl, start="dev3"),
    "distil": partial(run_traced_sft, teacher="r1", start=None),
    "student_rl": partial(run_rl, start=None),  # R1 section 4.1: the small model by RL alone
    "on_policy": run_on_policy,
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


def seconds_allowed(run: Run, stage: str, seconds: float) -> float:
    """0 stands for what `distil` took in all: r1's writing of the traces and the SFT on them."""
    if seconds:
        return seconds
    directory = run.stage_dir("distil")
    if not (directory / "done.json").is_file():
        raise ValueError(f"{stage}.seconds=0 is as many as distil took, which is not done; run `abyssal distil` first")
    return sum(seconds_of_work(read_steps(part / "metrics.jsonl")) for part in (directory / "traces", directory))


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


def request_data(run: Run, count: int, *, first: int) -> list[Conversation]:
    """Open requests thought about and answered, some carelessly: what is left for the rewards of `align` to better."""
    data = run.recipe.data
    mix = replace(data.web, worked_share=1.0)
    return [
        web_document(request_at(data.problems, run.recipe.run.seed, i), random.Random(f"requests {i}"), mix)
        for i in range(first, first + count)
    ]


def fitted(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model's table covers the vocabulary, padded to 64 rows as its kernels like."""
    return replace(config, vocab_size=-(-tokenizer.vocab_size // 64) * 64)


def seed_of(run: Run, stage: str) -> int:
    """Stages must not draw with each other's noise."""
    return run.recipe.run.seed * 1_000_003 + SEED_NUMBER[stage] * 10_000_019
