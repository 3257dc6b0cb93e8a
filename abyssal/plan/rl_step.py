"""What a step of reinforcement learning takes: rollout, reward, reference, update, with answer lengths as input.

One step is one rollout: P problems with G answers each, learned from in `minibatches` optimizer steps (stages/rl.py; R1
draws 8,192 answers and takes 16). On one device the project's own engine draws; on a cluster, serving units do, on all
devices, before the same devices train (R1, supplementary section on infrastructure). Letters: P, G, A = P x G answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from abyssal.model.config import ModelConfig
from abyssal.plan.answer_lengths import AnswerLengths
from abyssal.plan.generation import FEW, plan_generation
from abyssal.plan.machine_file import MachineSpec, Precision
from abyssal.plan.served_weights import served_weights
from abyssal.plan.serving import ServingConfig, ServingLayout, cache_bytes_per_token, decode_point, prefill_point
from abyssal.plan.training import TrainingPlan
from abyssal.plan.weight_forms import weight_form

SECONDS_PER_HOUR = 3600.0
FORWARD_SHARE = 1 / 3  # of a training pass: backward has two products for forward's one


@dataclass(frozen=True, kw_only=True)
class RlWork:
    """One step, as [zero], [reason] and [align] have it. Lengths in tokens."""

    problems: int
    answers: int  # to each problem
    prompt_tokens: int
    lengths: AnswerLengths
    minibatches: int = 1  # optimizer steps
    learnable_share: float = 1.0  # of the answers: groups all right or all wrong teach nothing and are left out
    has_reference: bool = True  # kl_weight above 0: a frozen copy of the policy says what it thinks of each answer
    reward_seconds: float = 0.0  # grading, as far as nothing hides it; R1's ran beside the rest
    compare_answers: int = 0  # computed again to measure how far the engine is from the trainer
    draft_acceptance: float = 0.0  # of an MTP draft in the rollout, on serving units

    def __post_init__(self) -> None:
        for name in ("problems", "answers", "prompt_tokens", "minibatches"):
            if (count := getattr(self, name)) < 1:
                raise ValueError(f"{name}={count} must be at least 1")
        for name in ("learnable_share", "draft_acceptance"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ValueError(f"{name}={share} is a share; use 0 to 1")
        if self.reward_seconds < 0 or self.compare_answers < 0:
            raise ValueError(
                f"reward_seconds={self.reward_seconds} and compare_answers={self.compare_answers} must be 0 or more"
            )

    @property
    def n_answers(self) -> int:
        return self.problems * self.answers

    @property
    def drawn_tokens(self) -> float:
        return self.n_answers * self.lengths.mean_tokens

    @property
    def trained_tokens(self) -> float:
        """Prompts are part of each answer's row, and rows of like length are as wide as the longest, in eights
        (stages/policy_update.py)."""
        width = 8 * math.ceil((self.prompt_tokens + self.lengths.mean_tokens) / 8)
        return self.learnable_share * self.n_answers * width


@dataclass(frozen=True, kw_only=True)
class RlCost:
    steps: float
    hours: float
    device_hours: float
    cost_usd: float | None


@dataclass(frozen=True, kw_only=True)
class RlPlan:
    """One step by part; the parts add up."""

    work: RlWork
    n_devices: int
    price_usd_per_device_hour: float | None
    rollout_seconds: float
    reward_seconds: float
    reference_seconds: float
    update_seconds: float
    compare_seconds: float
    tail_seconds: float  # of the rollout, with no more than a tenth of the answers still running
    longest_tokens: float  # expected length of the longest answer, which the rollout waits for
    drawing_bytes: float  # of one device while it draws: cache and, on serving units, their weights
    memory_bytes: float  # of one device at its fullest
    memory_limit_bytes: float

    @property
    def step_seconds(self) -> float:
        return (
            self.rollout_seconds + self.reward_seconds + self.reference_seconds + self.update_seconds
            + self.compare_seconds
        )  # fmt: skip

    @property
    def tokens_per_second(self) -> float:
        """Drawn, over the whole step."""
        return self.work.drawn_tokens / self.step_seconds

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.memory_limit_bytes

    @property
    def bottleneck(self) -> str:
        parts = {
            "rollout": self.rollout_seconds,
            "reward": self.reward_seconds,
            "the reference's log-probs": self.reference_seconds,
            "update": self.update_seconds,
        }
        longest = max(parts, key=lambda name: parts[name])
        if longest == "rollout" and self.tail_seconds > self.rollout_seconds / 2:
            return "rollout: its last tenth of answers, while most of the machine waits"
        return longest

    def for_steps(self, steps: float) -> RlCost:
        hours = steps * self.step_seconds / SECONDS_PER_HOUR
        price = self.price_usd_per_device_hour
        return RlCost(
            steps=steps,
            hours=hours,
            device_hours=hours * self.n_devices,
            cost_usd=None if price is None else price * hours * self.n_devices,
        )


def plan_rl(
    config: ModelConfig,
    *,
    machine: MachineSpec,
    work: RlWork,
    training: TrainingPlan,
    rollout: ServingLayout | None = None,
    serving: ServingConfig | None = None,
    precision: Precision = "float32",
) -> RlPlan:
    """`training`: how this policy trains, on rows as long as an answer may be. `rollout`: the serving units that draw,
    weights and cache as `serving` says; None: the project's own engine on one device, in `precision`."""
    step = training.step
    per_token = (step.total_seconds - step.optimizer_seconds - step.gradient_communication_seconds) / (
        training.tokens_per_step
    )
    per_update = step.optimizer_seconds + step.gradient_communication_seconds
    update = work.trained_tokens * per_token + work.minibatches * per_update
    reference = FORWARD_SHARE * work.trained_tokens * per_token if work.has_reference else 0.0
    compared = min(work.compare_answers, work.n_answers) * (work.prompt_tokens + work.lengths.mean_tokens)
    limit = machine.memory_bytes * machine.usable_memory_share.value
    if rollout is None:
        seconds, tail, drawing_bytes = _own_rollout(config, machine=machine, work=work, precision=precision)
        reference_bytes = served_weights(config, form=weight_form("float32"), with_drafts=True).total_bytes
        # it computes while the policy's activations wait for backward, and holds a layer's own at a time
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        reference_bytes += max(rank.activations_bytes for rank in training.memory) / layers
        memory = training.peak_memory_bytes + drawing_bytes + (reference_bytes if work.has_reference else 0.0)
        n_devices = 1
    else:
        serving = serving or ServingConfig()
        serving = replace(serving, prompt_tokens=work.prompt_tokens, draft_acceptance=work.draft_acceptance)
        n_devices = training.layout.n_devices
        seconds, tail, drawing_bytes = _units_rollout(
            config, machine=machine, work=work, layout=rollout, serving=serving, n_devices=n_devices
        )
        memory = max(training.peak_memory_bytes, drawing_bytes)  # weights leave the device between the two
    return RlPlan(
        work=work,
        n_devices=n_devices,
        price_usd_per_device_hour=training.price_usd_per_device_hour,
        rollout_seconds=seconds,
        reward_seconds=work.reward_seconds,
        reference_seconds=reference,
        update_seconds=update,
        compare_seconds=FORWARD_SHARE * compared * per_token,
        tail_seconds=tail,
        longest_tokens=work.lengths.longest_tokens(work.n_answers),
        drawing_bytes=drawing_bytes,
        memory_bytes=memory,
        memory_limit_bytes=limit,
    )


def _own_rollout(
    config: ModelConfig, *, machine: MachineSpec, work: RlWork, precision: Precision
) -> tuple[float, float, float]:
    """(seconds, those of its tail, bytes) of the project's own engine."""
    plan = plan_generation(
        config,
        machine=machine,
        requests=work.n_answers,
        prompt_tokens=work.prompt_tokens,
        answers=work.lengths,
        precision=precision,
        answers_per_prompt=work.answers,
    )
    # it computes with the trainer's weights
    return plan.total_seconds, plan.tail_seconds, plan.memory_bytes - plan.weights_bytes


def _units_rollout(
    config: ModelConfig,
    *,
    machine: MachineSpec,
    work: RlWork,
    layout: ServingLayout,
    serving: ServingConfig,
    n_devices: int,
) -> tuple[float, float, float]:
    """The same of serving units on all devices. Answers are spread evenly and none moves."""
    if n_devices % layout.devices:
        raise ValueError(f"rollout.devices={layout.devices} does not divide the {n_devices} devices")
    n_ranks = n_devices // layout.devices * layout.dp
    prefill = prefill_point(config, machine=machine, serving=serving, layout=layout)
    rate = prefill.tokens_per_second * (n_devices // layout.devices)
    seconds, tail = work.problems * work.prompt_tokens / rate, 0.0
    for stretch in work.lengths.stretches(work.n_answers):
        on_rank = max(1, round(stretch.running / n_ranks))
        at = replace(serving, prompt_tokens=max(1, round(work.prompt_tokens + stretch.drawn_tokens)), answer_tokens=1)
        point = decode_point(config, machine=machine, serving=at, layout=layout, requests=on_rank)
        taken = stretch.n_steps / point.tokens_per_second_per_user
        seconds += taken
        tail += taken if stretch.running <= FEW * work.n_answers else 0.0
    weights = served_weights(
        config, form=weight_form(serving.weights), tp=layout.tp, ep=layout.ep, experts=layout.physical_experts(config)
    )
    held = work.n_answers / n_ranks * (work.prompt_tokens + work.lengths.mean_tokens)
    return seconds, tail, weights.total_bytes + held * cache_bytes_per_token(config, serving, tp=layout.tp)
