"""R1's published cost of reinforcement learning beside what the plan makes of its published steps and lengths.

Published: steps, answers, limits, devices, hours (Nature supplement; arXiv 2501.12948v2). Not published as numbers, and
so inputs of ours: the mean length over R1-Zero's steps, which is a figure's curve; stage 1's steps and all of R1's
mean lengths; the layouts.
"""

from __future__ import annotations

from dataclasses import dataclass

from abyssal.model.presets import v3
from abyssal.plan.answer_lengths import AnswerLengths
from abyssal.plan.layout import Layout
from abyssal.plan.machine_file import MachineSpec, read_machine
from abyssal.plan.published import Published
from abyssal.plan.rl_step import RlCost, RlPlan, RlWork, plan_rl
from abyssal.plan.serving import ServingConfig, ServingLayout
from abyssal.plan.training import plan_training

R1_PAPER = "DeepSeek-R1 in Nature (2025), supplementary information: training cost (arXiv 2501.12948v2)"
DEVICES = 512  # 64 nodes of 8 H800
STEPS_PER_ROLLOUT = 16  # 8,192 answers, 512 in each optimizer step
PROMPT_TOKENS = 200  # not published
ACCEPTANCE = 0.85  # rollouts draft by MTP; V3 section 5.4.3 has 85 to 90 %
SFT_DATA_DEVICE_HOURS = 5e3  # published, and an input: what was computed for it is not said

# V3's training layout on fewer devices. An optimizer step's tokens lie in two micro-batches a pipeline rank, which
# DualPipe needs: 1,024 rows
TRAINING = Layout(
    pp=16, ep=32, dp=32, zero=1, schedule="dualpipe", micro_rows=1, recompute="selective", experts_nodes=4,
    precision="fp8", weights="bfloat16", moments="bfloat16", overlap_expert_communication=True, kernels="fused",
)  # fmt: skip
ROWS = 1024
ROLLOUT = ServingLayout(devices=32, ep=32, overlap=True, by_node=False)  # the prefill unit's size, V3 section 3.4.1


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Optimizer steps with a mean and a limit of their answers' tokens."""

    steps: int
    mean_tokens: float
    max_tokens: float


# figure 1b of the Nature article as others describe its curve: 2.5K at step 2,000, 4K at 4,000, 6K at 6,000, 15K to 16K
# at the end; from memory 0.5K at the start and 9K where the limit was doubled. Each stretch has the mean of its ends
R1_ZERO = (
    Stretch(steps=2000, mean_tokens=1500, max_tokens=32768),
    Stretch(steps=2000, mean_tokens=3250, max_tokens=32768),
    Stretch(steps=2000, mean_tokens=5000, max_tokens=32768),
    Stretch(steps=2200, mean_tokens=7500, max_tokens=32768),
    Stretch(steps=2200, mean_tokens=12500, max_tokens=65536),
)
# stage 2's 1,700 steps are published, stage 1's are not: as many. The SFT data's mean of 5,355 tokens stands for both
R1 = (Stretch(steps=3400, mean_tokens=5355, max_tokens=32768),)


def plan_stretch(machine: MachineSpec, stretch: Stretch) -> RlPlan:
    """One rollout and the steps that learn from it."""
    tokens = (PROMPT_TOKENS + stretch.mean_tokens) * DEVICES  # 512 answers in an optimizer step, as many as devices
    training = plan_training(
        v3(), machine=machine, layout=TRAINING, row_len=max(1, round(tokens / ROWS)), batch_rows=ROWS
    )
    work = RlWork(
        problems=512,
        answers=16,
        prompt_tokens=PROMPT_TOKENS,
        lengths=AnswerLengths(mean_tokens=stretch.mean_tokens, max_tokens=stretch.max_tokens),
        minibatches=STEPS_PER_ROLLOUT,
        draft_acceptance=ACCEPTANCE,
    )
    serving = ServingConfig(prompt_tokens=PROMPT_TOKENS, weights="fp8")
    return plan_rl(v3(), machine=machine, work=work, training=training, rollout=ROLLOUT, serving=serving)


def cost_of(machine: MachineSpec, stretches: tuple[Stretch, ...]) -> list[RlCost]:
    return [plan_stretch(machine, s).for_steps(s.steps / STEPS_PER_ROLLOUT) for s in stretches]


def published_rl() -> list[Published]:
    machine = read_machine("h800x2048")
    zero, r1 = (sum(cost.device_hours for cost in cost_of(machine, stretches)) for stretches in (R1_ZERO, R1))
    price = machine.price_usd_per_device_hour
    assert price is not None, "the published cost is at 2 USD an hour"
    whole = zero + SFT_DATA_DEVICE_HOURS + r1
    lengths = "mean lengths from descriptions of figure 1b, 0.5K to 16K, partly memory"
    assumed = "EP32 units, drafts kept 85 % of the time, prompts of 200 tokens"
    return [
        Published(
            name="R1-Zero: RL in 10,400 steps of 512 answers", unit="H800-hours", published=101e3, planned=zero,
            kind="measured", source=R1_PAPER, inputs=f"{lengths}; {assumed}",
        ),
        Published(
            name="R1: RL in two stages", unit="H800-hours", published=41e3, planned=r1, kind="measured",
            source=R1_PAPER,
            inputs=f"1,700 steps of stage 2 and, not published, as many of stage 1; 5,355 tokens; {assumed}",
        ),
        Published(
            name="R1: RL in all", unit="H800-hours", published=147e3, planned=whole, kind="measured", source=R1_PAPER,
            inputs="5K hours of SFT data are an input",
        ),
        Published(
            name="R1: cost of RL", unit="USD", published=294e3, planned=whole * price.value, kind="measured",
            source=R1_PAPER, inputs="2 USD an hour, as published",
        ),
        Published(
            name="R1: cost of the published hours", unit="USD", published=294e3,
            planned=(101e3 + SFT_DATA_DEVICE_HOURS + 41e3) * price.value, kind="arithmetic", source=R1_PAPER,
            inputs="101K + 5K + 41K hours",
        ),
    ]  # fmt: skip
