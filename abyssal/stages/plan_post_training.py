"""The plans of all stages behind the base: RL, traces and SFT on them, on-policy distillation.

On one device the project's own engine draws and its trainer learns, in turn; on a cluster serving units draw on all
devices ([plan.rollout]) and [parallel] says how the same devices train. Letters: P problems, G answers to each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from abyssal.model.config import ModelConfig
from abyssal.plan.answer_lengths import AnswerLengths
from abyssal.plan.generation import plan_generation
from abyssal.plan.loaded_weights import loaded_bytes
from abyssal.plan.machine_file import MachineSpec, Precision
from abyssal.plan.rl_step import FORWARD_SHARE, RlPlan, RlWork, plan_rl
from abyssal.plan.serving import ServingConfig
from abyssal.plan.stage_plan import StagePlan, of_training, parts_of
from abyssal.plan.training import TrainingPlan
from abyssal.plan.weight_updates import Optimizer
from abyssal.stages.on_policy import OnPolicyConfig
from abyssal.stages.plan_pretraining import rows_of_text
from abyssal.stages.planned_work import DType, assumed_means, base_config, is_one_device, means_of, trained
from abyssal.stages.recipe import Recipe, TracedSftConfig
from abyssal.stages.rl import RlConfig

LESS_MEMORY = "fewer answers at once, shorter ones or fewer rows_per_pass need less memory"
TRACED_AT_ONCE = 256  # answers; see sample_traces
SHORTEST = 512  # tokens of a micro-batch, below which cutting it further helps nobody
OURS_TO_A_ROLLOUT = 8192  # answers of a rollout that draws traces on a cluster, as many as R1's


def reinforcing(recipe: Recipe, machine: MachineSpec, stage: str) -> Iterator[StagePlan]:
    config: RlConfig = getattr(recipe, stage)
    if not config.steps:
        return
    model = recipe.student if stage == "student_rl" else base_config(recipe)
    means = means_of(recipe, stage, config.max_tokens)
    assumed = assumed_means(recipe, stage)
    if config.preference_share:
        assumed += ("what the reward model takes, to train and to ask, is left out",)
    for k, mean in enumerate(means):
        work = RlWork(
            problems=config.problems,
            answers=config.answers,
            prompt_tokens=recipe.plan.prompt_tokens,
            lengths=AnswerLengths(mean_tokens=mean, max_tokens=config.max_tokens),
            minibatches=config.grpo.minibatches,
            has_reference=config.grpo.kl_weight > 0,
            draft_acceptance=recipe.plan.draft_acceptance,
        )
        training = update_of(
            recipe, machine, model, work, dtype=config.dtype, optimizer="adamw", rows_per_pass=config.rows_per_pass
        )
        plan = drawn_and_learned(recipe, machine, model, work, training, config.dtype)
        yield of_rl(
            plan, training, machine, stage=stage if k == len(means) - 1 else f"{stage}/{k + 1}",
            n_steps=config.steps / len(means), assumed=assumed,
        )  # fmt: skip


def update_of(
    recipe: Recipe,
    machine: MachineSpec,
    model: ModelConfig,
    work: RlWork,
    *,
    dtype: DType,
    optimizer: Optimizer,
    rows_per_pass: int,
) -> TrainingPlan:
    """One optimizer step on drawn answers. On one device they are packed into rows as long as the longest; on a cluster
    into as many rows as fill the pipeline, two micro-batches a rank, or more and shorter ones until they fit."""
    tokens = work.trained_tokens / work.minibatches
    if is_one_device(recipe, machine):
        longest = math.ceil(work.prompt_tokens + work.lengths.longest_tokens(work.n_answers))
        rows = max(1, math.ceil(tokens / longest))
        micro_rows = min(rows, rows_per_pass)
        rows = math.ceil(rows / micro_rows) * micro_rows
        row_len = max(1, math.ceil(tokens / rows))
        return trained(
            recipe, machine, model, optimizer=optimizer, dtype=dtype, row_len=row_len, rows=rows, micro_rows=micro_rows
        )
    layout = recipe.parallel.on(machine)
    rows = layout.dp * 2 * layout.pp * max(1, layout.micro_rows)
    while True:
        row_len = max(layout.cp, round(tokens / rows / layout.cp) * layout.cp)
        plan = trained(recipe, machine, model, optimizer=optimizer, dtype=dtype, row_len=row_len, rows=rows)
        if plan.fits or row_len < SHORTEST:
            return plan
        rows *= 2


def drawn_and_learned(
    recipe: Recipe, machine: MachineSpec, model: ModelConfig, work: RlWork, training: TrainingPlan, dtype: Precision
) -> RlPlan:
    told = recipe.plan
    if is_one_device(recipe, machine):
        return plan_rl(model, machine=machine, work=work, training=training, precision=dtype)
    serving = ServingConfig(prompt_tokens=told.prompt_tokens, weights=told.rollout_weights)
    return plan_rl(model, machine=machine, work=work, training=training, rollout=told.rollout, serving=serving)


def of_rl(
    plan: RlPlan,
    training: TrainingPlan,
    machine: MachineSpec,
    *,
    stage: str,
    n_steps: float,
    assumed: tuple[str, ...],
    more_seconds: dict[str, float] | None = None,
    more_bytes: dict[str, float] | None = None,
) -> StagePlan:
    """Memory is training's fullest rank, and what drawing and the reference need beyond it."""
    work = plan.work
    fullest = max(training.memory, key=lambda rank: rank.total_bytes)
    beyond = {"drawing and reference": max(0.0, plan.memory_bytes - fullest.total_bytes)}
    seconds = {name: s for name, s in parts_of(plan, "_seconds").items() if name not in ("tail",)}
    return StagePlan(
        stage=stage,
        what=f"{work.problems:,} x {work.answers} answers of {work.lengths.mean_tokens:,.0f} tokens",
        n_steps=n_steps,
        tokens=n_steps * work.drawn_tokens,
        n_devices=plan.n_devices,
        price_usd_per_device_hour=plan.price_usd_per_device_hour,
        step_seconds_by_part=seconds | (more_seconds or {}),
        memory_bytes_by_part=(parts_of(fullest, "_bytes") | beyond | (more_bytes or {}),),
        memory_limit_bytes=plan.memory_limit_bytes,
        bottleneck=plan.bottleneck,
        advice="" if plan.fits else training.advice or LESS_MEMORY,
        training=training,
        answer_tokens=work.lengths.mean_tokens,
        assumed=assumed,
    )


def traced_tuning(recipe: Recipe, machine: MachineSpec, stage: str) -> Iterator[StagePlan]:
    """The student's base where there is one to train, then traces of the teacher, then SFT on them."""
    config: TracedSftConfig = getattr(recipe, stage)
    model = recipe.student if stage == "distil" else base_config(recipe)
    if stage == "distil":
        yield from rows_of_text(recipe, machine, recipe.student, recipe.student_pretrain, stage="distil/base")
    traces, sft = config.traces, config.sft
    (mean, *_) = means_of(recipe, stage, traces.max_tokens)
    assumed = assumed_means(recipe, stage)
    if traces.problems:
        yield tracing(recipe, machine, base_config(recipe), config, stage=stage, mean=mean, assumed=assumed)
    kept = recipe.plan.conversations.get(stage)
    if kept is None:
        kept = traces.problems * traces.keep_per_problem + config.general + config.requests
        assumed += ("every problem leaves as many traces as it may, where [plan.conversations] does not say otherwise",)
    each = recipe.plan.conversation_tokens or recipe.plan.prompt_tokens + mean
    training = trained(
        recipe, machine, model, optimizer=sft.optimizer, dtype=sft.dtype, row_len=sft.row_len, rows=sft.rows
    )
    if kept:
        yield of_training(
            training,
            stage=stage,
            what=f"{kept:,} conversations of {each:,.0f} tokens, {sft.epochs} times",
            tokens=sft.epochs * kept * each,
            assumed=assumed,
        )


def tracing(
    recipe: Recipe,
    machine: MachineSpec,
    teacher: ModelConfig,
    config: TracedSftConfig,
    *,
    stage: str,
    mean: float,
    assumed: tuple[str, ...],
) -> StagePlan:
    """Answers that are only drawn: a step is a batch of them."""
    traces = config.traces
    lengths = AnswerLengths(mean_tokens=mean, max_tokens=traces.max_tokens)
    at_once = TRACED_AT_ONCE if is_one_device(recipe, machine) else OURS_TO_A_ROLLOUT
    problems = min(traces.problems, max(1, at_once // traces.answers))
    limit = machine.memory_bytes * machine.usable_memory_share.value
    price = machine.price_usd_per_device_hour
    if is_one_device(recipe, machine):
        dtype: Precision = "bfloat16" if config.sft.dtype == "bfloat16" else "float32"
        drawn = plan_generation(
            teacher, machine=machine, requests=problems * traces.answers, prompt_tokens=recipe.plan.prompt_tokens,
            answers=lengths, precision=dtype, answers_per_prompt=traces.answers,
        )  # fmt: skip
        seconds = parts_of(drawn, "_seconds")
        seconds.pop("tail")
        memory, bottleneck, n_devices = parts_of(drawn, "_bytes"), drawn.bottleneck, 1
    else:
        work = RlWork(
            problems=problems, answers=traces.answers, prompt_tokens=recipe.plan.prompt_tokens, lengths=lengths,
            has_reference=False, draft_acceptance=recipe.plan.draft_acceptance,
        )  # fmt: skip
        training = update_of(recipe, machine, teacher, work, dtype="auto", optimizer="adamw", rows_per_pass=1)
        rollout = drawn_and_learned(recipe, machine, teacher, work, training, "bfloat16")
        seconds, memory = {"rollout": rollout.rollout_seconds}, {"weights and cache": rollout.drawing_bytes}
        bottleneck, n_devices = rollout.bottleneck, rollout.n_devices
    n_steps = traces.problems / problems
    return StagePlan(
        stage=f"{stage}/traces",
        what=f"{problems:,} x {traces.answers} answers of {mean:,.0f} tokens",
        n_steps=n_steps,
        tokens=n_steps * problems * traces.answers * mean,
        n_devices=n_devices,
        price_usd_per_device_hour=None if price is None else price.value,
        step_seconds_by_part=seconds,
        memory_bytes_by_part=(memory,),
        memory_limit_bytes=limit,
        bottleneck=bottleneck,
        advice="" if sum(memory.values()) <= limit else "shorter answers need less memory",
        assumed=assumed,
    )


def distilling_on_policy(recipe: Recipe, machine: MachineSpec, stage: str) -> Iterator[StagePlan]:
    """The student draws, the teacher says what it thinks of each token, the student learns."""
    config: OnPolicyConfig = recipe.on_policy
    if not config.steps:
        return
    (mean, *_) = means_of(recipe, stage, config.max_tokens)
    work = RlWork(
        problems=config.problems,
        answers=config.answers,
        prompt_tokens=recipe.plan.prompt_tokens,
        lengths=AnswerLengths(mean_tokens=mean, max_tokens=config.max_tokens),
        has_reference=False,
        draft_acceptance=recipe.plan.draft_acceptance,
    )
    training, teacher = (
        update_of(
            recipe, machine, model, work, dtype=config.dtype, optimizer=config.optimizer,
            rows_per_pass=config.rows_per_pass,
        )
        for model in (recipe.student, base_config(recipe))
    )  # fmt: skip
    plan = drawn_and_learned(recipe, machine, recipe.student, work, training, config.dtype)
    scored = FORWARD_SHARE * work.trained_tokens * teacher.step.compute_seconds / teacher.tokens_per_step
    held = sum(loaded_bytes(base_config(recipe), "master", compute_bytes=4).values())
    yield of_rl(
        plan, training, machine, stage=stage, n_steps=config.steps, assumed=assumed_means(recipe, stage),
        more_seconds={"teacher": scored}, more_bytes={"teacher": held} if is_one_device(recipe, machine) else None,
    )  # fmt: skip
