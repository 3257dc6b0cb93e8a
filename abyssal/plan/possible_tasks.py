"""Tasks that a machine may be asked to do with a model: pretrain, fine-tune, distil, reinforce, serve; each an answer.

Training is planned as this project trains on one device: FP32 masters, gradients and moments. Owns how much work a task
is taken to be, and from when on it is called slow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from abyssal.model.config import ModelConfig
from abyssal.plan.answer_lengths import AnswerLengths
from abyssal.plan.in_words import bytes_text, count_text, seconds_text
from abyssal.plan.layout import Layout
from abyssal.plan.machine_file import MachineSpec
from abyssal.plan.offload import plan_offload
from abyssal.plan.parameters import count
from abyssal.plan.rl_step import RlPlan, RlWork, plan_rl
from abyssal.plan.served_weights import served_weights
from abyssal.plan.serving import ServingConfig, ServingLayout, plan_serving
from abyssal.plan.training import TrainingPlan, plan_training
from abyssal.plan.weight_forms import weight_form

Task = Literal["pretrain", "fine_tune", "distil", "reinforce", "serve"]
Verdict = Literal["yes", "slow", "no"]
TASKS: tuple[Task, ...] = ("pretrain", "fine_tune", "distil", "reinforce", "serve")

SECONDS_PER_DAY = 86400.0
TOKENS_PER_PARAMETER = 20  # pretraining: Hoffmann et al. 2022
FINE_TUNE_TOKENS = 10e6  # some two thousand conversations with their thinking
DISTIL_TOKENS = 2 * 804_745 * 5355.0  # R1's conversations and their mean length, two epochs (R1, supplementary)
RL_STEPS = 500
RL_WORK = RlWork(
    problems=16, answers=16, prompt_tokens=128, lengths=AnswerLengths(mean_tokens=512, max_tokens=2048)
)  # one step; groups of 16 as R1's
ROW_LEN, BATCH_ROWS = 2048, 64  # 131,072 tokens a step
MICRO_ROWS = (1, 4, 16, 64)
# seconds up to which a task is called ready, and slow; beyond, nobody would wait
PATIENCE_SECONDS = {
    "pretrain": (30 * SECONDS_PER_DAY, 365 * SECONDS_PER_DAY),
    "fine_tune": (2 * SECONDS_PER_DAY, 30 * SECONDS_PER_DAY),
    "distil": (30 * SECONDS_PER_DAY, 365 * SECONDS_PER_DAY),
    "reinforce": (14 * SECONDS_PER_DAY, 90 * SECONDS_PER_DAY),
}
# about as fast as people read, and as slow as anybody bears
READING_TOKENS_PER_SECOND, PATIENT_TOKENS_PER_SECOND = 5.0, 1.0
WIDE, NARROW = ("bfloat16", "fp8", "q8_0", "q4_k_m"), ("q2_k",)  # widest first; two bits are the last resort
TOGETHER = 8  # requests, where experts lie in RAM and many cannot be held
SERVED = ServingConfig(prompt_tokens=1024, answer_tokens=1024, prefill_tokens=2048)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One task on one model. `short` and `detail` are for a cell of the picture, `words` is a sentence."""

    model: str
    task: Task
    verdict: Verdict
    short: str
    detail: str
    words: str
    seconds: float | None = None  # of the task, where it is one that ends
    tokens_per_second: float | None = None  # trained, drawn by RL, or served to one user
    tokens_per_second_in_all: float | None = None  # served
    context_tokens: int | None = None  # served
    weights: str | None = None  # served: their form
    experts: str | None = None  # served: where routed ones are computed, if not all on the device
    memory_bytes: float | None = None  # needed of one device
    memory_limit_bytes: float | None = None


def trainings(config: ModelConfig, machine: MachineSpec) -> list[TrainingPlan]:
    """With the smallest micro-batch first, and larger ones as long as they fit; of several devices, all share what is
    trained (ZeRO-3)."""
    n = machine.n_devices
    plans: list[TrainingPlan] = []
    for micro_rows in MICRO_ROWS:
        plan = plan_training(
            config,
            machine=machine,
            layout=Layout(dp=n, zero=3 if n > 1 else 0, micro_rows=micro_rows),
            row_len=min(ROW_LEN, config.max_position_embeddings),
            batch_rows=BATCH_ROWS * n,
            advise=False,
        )
        if plans and not plan.fits:
            break
        plans.append(plan)
        if not plan.fits:
            break
    return plans


def pretrain(name: str, config: ModelConfig, training: TrainingPlan) -> Answer:
    tokens = TOKENS_PER_PARAMETER * float(count(config))
    seconds = tokens / training.tokens_per_second
    return _trained(name, "pretrain", training, seconds, f"{count_text(tokens)} tokens, 20 a parameter,")


def fine_tune(name: str, training: TrainingPlan) -> Answer:
    seconds = FINE_TUNE_TOKENS / training.tokens_per_second
    return _trained(name, "fine_tune", training, seconds, f"{count_text(FINE_TUNE_TOKENS)} tokens of conversations")


def distil(name: str, training: TrainingPlan, teacher: Answer | None) -> Answer:
    seconds = DISTIL_TOKENS / training.tokens_per_second
    answer = _trained(
        name, "distil", training, seconds, f"two epochs of 800K given traces ({count_text(DISTIL_TOKENS)} tokens)"
    )
    if teacher is None or answer.verdict == "no" or teacher.tokens_per_second_in_all is None:
        return answer
    drawn = seconds_text(FINE_TUNE_TOKENS / teacher.tokens_per_second_in_all)
    more = f" Served here, {teacher.model} draws {count_text(FINE_TUNE_TOKENS)} tokens of traces in {drawn}."
    return replace(answer, words=answer.words + more)


def reinforce(name: str, config: ModelConfig, machine: MachineSpec, trainings: list[TrainingPlan]) -> Answer:
    """With the fastest micro-batch that leaves room for the engine and the reference."""
    most = config.max_position_embeddings - RL_WORK.prompt_tokens
    lengths = RL_WORK.lengths
    if lengths.max_tokens > most:
        lengths = AnswerLengths(mean_tokens=most / 4, max_tokens=most)
    work = replace(RL_WORK, lengths=lengths)
    unit = None
    if machine.n_devices > 1:  # the project's own engine draws on one device, so serving units do
        unit = next((unit for unit in _units(config, machine) if _holds(config, machine, unit)), ServingLayout())

    def plan_with(training: TrainingPlan) -> RlPlan:
        return plan_rl(
            config, machine=machine, work=work, training=training, rollout=unit, serving=SERVED,
            precision=training.precision,
        )  # fmt: skip

    plan = plan_with(trainings[0])
    beside = plan.memory_bytes - trainings[0].peak_memory_bytes  # the same whatever the micro-batch
    fitting = [t for t in trainings if t.peak_memory_bytes + beside <= plan.memory_limit_bytes]
    if fitting:
        plan = plan_with(max(fitting, key=lambda training: training.tokens_per_second))
    seconds = plan.for_steps(RL_STEPS).hours * 3600
    what = f"{RL_STEPS} steps of {RL_WORK.n_answers} answers, waiting for {plan.bottleneck},"
    return _judged(
        name, "reinforce", seconds, what, rate=plan.tokens_per_second, needed=plan.memory_bytes,
        limit=plan.memory_limit_bytes,
    )  # fmt: skip


def _holds(config: ModelConfig, machine: MachineSpec, unit: ServingLayout) -> bool:
    return plan_serving(config, machine=machine, serving=_asked(config, SERVED.weights), layout=unit, batches=(1,)).fits


def _trained(name: str, task: Task, training: TrainingPlan, seconds: float, what: str) -> Answer:
    return _judged(
        name, task, seconds, what, rate=training.tokens_per_second, needed=training.peak_memory_bytes,
        limit=training.memory_limit_bytes,
    )  # fmt: skip


def _judged(
    name: str, task: Task, seconds: float, what: str, *, rate: float, needed: float, limit: float
) -> Answer:
    if needed > limit:
        return Answer(
            model=name, task=task, verdict="no", short=f"needs {bytes_text(needed)}", detail="",
            words=f"{name} needs {bytes_text(needed)} of {bytes_text(limit)}.", memory_bytes=needed,
            memory_limit_bytes=limit,
        )  # fmt: skip
    ready, slow = PATIENCE_SECONDS[task]
    verdict: Verdict = "yes" if seconds <= ready else "slow" if seconds <= slow else "no"
    return Answer(
        model=name, task=task, verdict=verdict, short=_long(seconds), detail=f"{count_text(rate)} tokens/s",
        words=f"{name}: {what} take {_long(seconds)} at {count_text(rate)} tokens/s.", seconds=seconds,
        tokens_per_second=rate, memory_bytes=needed, memory_limit_bytes=limit,
    )  # fmt: skip


def serve(name: str, config: ModelConfig, machine: MachineSpec) -> Answer:
    """What one would rather have of what is fast enough; else of what is slow."""
    found = list(_served(name, config, machine))
    if not found:
        needed = served_weights(config, form=weight_form(NARROW[-1])).total_bytes
        return Answer(
            model=name, task="serve", verdict="no", short=f"needs {bytes_text(needed)}", detail="even in 2 bits",
            words=f"{name} needs {bytes_text(needed)} even in {NARROW[-1]}.", memory_bytes=needed,
        )  # fmt: skip
    for verdict in ("yes", "slow"):
        if good := [answer for answer in found if answer.verdict == verdict]:
            return good[0]
    return found[-1]


def _served(name: str, config: ModelConfig, machine: MachineSpec) -> Iterator[Answer]:
    """In the order of what one would rather have: on the devices alone, with experts in RAM, in two bits; of each the
    widest weights first."""
    wide = [form for form in WIDE if form != "fp8" or machine.computes_in("fp8") == "fp8"]
    for forms in (wide, NARROW):
        yield from _on_devices(name, config, machine, forms)
        if machine.host is not None and config.feed_forward == "moe":
            yield from _with_ram(name, config, machine, forms)


def _on_devices(
    name: str, config: ModelConfig, machine: MachineSpec, forms: Sequence[str]
) -> Iterator[Answer]:
    """On the fewest devices that hold the model and a request."""
    for form in forms:
        serving = _asked(config, form)
        for layout in _units(config, machine):
            plan = plan_serving(config, machine=machine, serving=serving, layout=layout, batches=(1, 8, 64))
            if plan.best is not None:
                yield _as_served(
                    name, form, plan.decode[0].tokens_per_second_per_user, in_all=plan.best.tokens_per_second,
                    context=plan.largest_context_tokens, devices=layout.devices, memory=plan.weights.total_bytes,
                    limit=plan.memory_limit_bytes,
                )  # fmt: skip
                break


def _with_ram(name: str, config: ModelConfig, machine: MachineSpec, forms: Sequence[str]) -> Iterator[Answer]:
    for form in forms:
        serving = _asked(config, form)
        alone, together = (plan_offload(config, machine=machine, serving=serving, requests=n) for n in (1, TOGETHER))
        if alone.fits:
            yield _as_served(
                name, form, alone.decode_tokens_per_second_per_user,
                in_all=(together if together.fits else alone).decode_tokens_per_second,
                context=alone.largest_context_tokens, place=alone.decode_place, memory=alone.device_bytes,
                limit=machine.memory_bytes * machine.usable_memory_share.value,
            )  # fmt: skip


def _asked(config: ModelConfig, form: str) -> ServingConfig:
    """Prompts and answers no longer than the model was made for."""
    most = min(SERVED.most_tokens, config.max_position_embeddings)
    return replace(SERVED, prompt_tokens=most // 2, answer_tokens=most // 2, weights=form)


def _as_served(
    name: str, form: str, rate: float, *, in_all: float, context: int, memory: float, limit: float, devices: int = 1,
    place: str | None = None,
) -> Answer:  # fmt: skip
    verdict: Verdict = "no"
    if rate >= PATIENT_TOKENS_PER_SECOND:
        verdict = "yes" if rate >= READING_TOKENS_PER_SECOND else "slow"
    where = {None: "", "cpu": ", experts in RAM on the CPU", "stream": ", experts streamed from RAM"}.get(place, "")
    on = f" on {devices} devices" if devices > 1 else ""
    return Answer(
        model=name, task="serve", verdict=verdict, short=f"{count_text(rate)} tokens/s",
        detail=f"{SHORT[form]}{', RAM' if where else ''}{on.removesuffix(' devices')}, {count_text(context)}",
        words=f"{name} in {form}{where}{on}: {count_text(rate)} tokens/s for one user, {count_text(in_all)} in all, "
        f"up to {count_text(context)} tokens of context.",
        tokens_per_second=rate, tokens_per_second_in_all=in_all, context_tokens=context, weights=form,
        experts=place if where else None, memory_bytes=memory, memory_limit_bytes=limit,
    )  # fmt: skip


SHORT = {"bfloat16": "16 bit", "fp8": "FP8", "q8_0": "8 bit", "q4_k_m": "4 bit", "q2_k": "2 bit"}


def _units(config: ModelConfig, machine: MachineSpec) -> Iterator[ServingLayout]:
    """From one device to all, in powers of two: experts shared out, or, dense, every matrix."""
    n = 1
    while n <= machine.n_devices:
        if config.feed_forward != "moe":
            yield ServingLayout(devices=n, tp=n)
        elif config.n_routed_experts % n == 0:
            yield ServingLayout(devices=n, ep=n)
        n *= 2


def _long(seconds: float) -> str:
    days = seconds / SECONDS_PER_DAY
    return f"{days / 365:.3g} years" if days > 730 else seconds_text(seconds)
