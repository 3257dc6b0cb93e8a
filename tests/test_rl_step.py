"""Steps of reinforcement learning on machines of round figures, by hand; and what must hold for all."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from round_machine import given as sourced
from round_machine import linked, round_machine

from abyssal.model.presets import r1_distill_llama_8b, smollm2_135m, v2_lite, v3
from abyssal.plan.answer_lengths import AnswerLengths
from abyssal.plan.layout import Layout
from abyssal.plan.memory import RankMemory
from abyssal.plan.rl_step import RlPlan, RlWork, plan_rl
from abyssal.plan.serving import ServingConfig, ServingLayout
from abyssal.plan.training import StepSeconds, TrainingPlan, plan_training

CPU = round_machine(kind="cpu", seconds_per_operation=sourced(1e-6))
WORK = RlWork(
    problems=4, answers=8, prompt_tokens=100, lengths=AnswerLengths(mean_tokens=100, max_tokens=200), minibatches=2
)


@cache
def training(n_devices: int = 1) -> TrainingPlan:
    """1,000 tokens take 10 seconds, and a step of the optimizer 5 more."""
    memory = RankMemory(
        rank=0, weights_bytes=0.0, master_bytes=10e9, moments_bytes=20e9, gradients_bytes=10e9, activations_bytes=5e9,
        temporary_bytes=0.0,
    )  # fmt: skip
    step = StepSeconds(
        compute_seconds=10.0, exposed_communication_seconds=0.0, bubble_seconds=0.0, gradient_communication_seconds=0.0,
        optimizer_seconds=5.0,
    )  # fmt: skip
    machine = round_machine(**linked(n_devices, devices_per_node=n_devices))
    some = plan_training(
        smollm2_135m(), machine=machine, layout=Layout(dp=n_devices), row_len=64, batch_rows=n_devices
    )
    return replace(some, step=step, tokens_per_step=1000, memory=(memory,))


def plan(**changes: Any) -> RlPlan:
    asked = {"machine": CPU, "work": WORK, "training": training()} | changes
    return plan_rl(v2_lite(), **asked)


def test_the_update_by_hand():
    """32 answers of 100 tokens behind prompts of 100 are 6,400 tokens: 64 s, and two optimizer steps of 5 s. The
    reference computes a third of that, without an optimizer."""
    made = plan()
    assert made.update_seconds == pytest.approx(64 + 10)
    assert made.reference_seconds == pytest.approx(64 / 3)
    half = plan(work=replace(WORK, learnable_share=0.5, has_reference=False, compare_answers=8, reward_seconds=7.0))
    assert half.update_seconds == pytest.approx(32 + 10) and half.reference_seconds == 0
    assert half.compare_seconds == pytest.approx(8 * 200 * 0.01 / 3) and half.reward_seconds == 7


def test_the_parts_are_the_step_and_the_step_has_its_price():
    made = plan()
    assert made.step_seconds == pytest.approx(made.rollout_seconds + made.update_seconds + made.reference_seconds)
    cost = made.for_steps(3600 / made.step_seconds)
    assert cost.hours == pytest.approx(1) and cost.device_hours == pytest.approx(1)
    assert cost.cost_usd == pytest.approx(3.6)
    assert made.tokens_per_second == pytest.approx(3200 / made.step_seconds)
    assert made.bottleneck == "update"


def test_memory_on_one_device_is_all_at_once():
    """Trainer 45 GB; the reference is one more copy of 15.7e9 weights in FP32, the engine's packed copy another."""
    made = plan()
    assert made.memory_bytes == pytest.approx(45e9 + 2 * 4 * 15.7e9, rel=0.01)
    assert not made.fits
    assert plan(work=replace(WORK, has_reference=False)).memory_bytes == pytest.approx(45e9 + 4 * 15.7e9, rel=0.01)


def test_one_serving_unit_waits_for_the_longest_answer():
    """Llama 8B on one device reads its 15 GB a step: 15 ms; 32 answers, the longest of about 196 tokens."""
    machine = round_machine()
    made = plan_rl(
        r1_distill_llama_8b(), machine=machine, work=WORK, training=training(), rollout=ServingLayout(),
        serving=ServingConfig(weights="bfloat16"),
    )  # fmt: skip
    assert made.longest_tokens == pytest.approx(200 * 32 / 33, rel=0.01)
    assert made.rollout_seconds == pytest.approx(made.longest_tokens * 15.2e-3, rel=0.05)
    assert made.memory_bytes == 45e9  # it trains and draws in turn


def test_drafts_shorten_the_rollout():
    machine = round_machine(**linked(64))
    shape: dict[str, Any] = {
        "machine": machine, "training": training(64), "rollout": ServingLayout(devices=64, ep=64),
        "serving": ServingConfig(weights="bfloat16"),
    }  # fmt: skip
    plain, drafted = (
        plan_rl(v3(), work=replace(WORK, draft_acceptance=share), **shape).rollout_seconds for share in (0.0, 0.9)
    )
    assert 0.5 < drafted / plain < 0.75


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.floats(0.05, 0.9), st.integers(16, 2000))
def test_more_of_anything_takes_longer(problems: int, more: int, mean: float, longest: int):
    def step(n: int, tokens: int) -> RlPlan:
        lengths = AnswerLengths(mean_tokens=mean * tokens, max_tokens=tokens)
        return plan(work=replace(WORK, problems=n, lengths=lengths))

    base = step(problems, longest)
    assert step(problems + more, longest).step_seconds >= base.step_seconds * (1 - 1e-3)
    assert step(problems, longest + more).step_seconds >= base.step_seconds * (1 - 1e-3)
    assert 0 <= base.tail_seconds <= base.rollout_seconds


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: replace(WORK, problems=0), "problems=0 must be at least 1"),
        (lambda: replace(WORK, learnable_share=1.5), "learnable_share=1.5 is a share"),
        (lambda: replace(WORK, reward_seconds=-1.0), "must be 0 or more"),
        (
            lambda: plan(machine=round_machine(**linked(12, devices_per_node=12)), training=training(12),
                         rollout=ServingLayout(devices=8)),
            "rollout.devices=8 does not divide the 12 devices",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make: Any, says: str):
    with pytest.raises(ValueError, match=says):
        make()
