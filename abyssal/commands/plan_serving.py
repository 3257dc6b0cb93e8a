"""`abyssal plan --serve`: a model served on a machine, as a table over batch sizes and as a section of the page.

Owns which unit is planned where none is named, and the words. Does not own the numbers (plan/serving.py, offload.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from abyssal.evals.charts import Series, line_chart
from abyssal.evals.page_tables import NOTHING, table_of
from abyssal.evals.part_bars import Line, PartRow, part_bars
from abyssal.model.config import ModelConfig
from abyssal.plan.in_words import bytes_text, count_text, seconds_text, usd_text
from abyssal.plan.machine_file import MachineSpec
from abyssal.plan.offload import OffloadPlan, plan_offload
from abyssal.plan.serving import DecodePoint, ServingConfig, ServingLayout, ServingPlan, plan_serving
from abyssal.plan.stage_plan import parts_of

TITLES = ("requests a rank", "tokens/s a user", "tokens/s in all", "$ a million", "a step", "waits for")


@dataclass(frozen=True, kw_only=True)
class ServingAnswer:
    """`offload`: experts in the host's RAM, where the device alone is too small and there is a host."""

    name: str
    machine: str
    layout: ServingLayout
    plan: ServingPlan
    offload: OffloadPlan | None


def serving_answer(
    config: ModelConfig, *, name: str, machine: MachineSpec, serving: ServingConfig, layout: ServingLayout
) -> ServingAnswer:
    layout = layout if layout != ServingLayout() else smallest_unit(config, machine, serving)
    plan = plan_serving(config, machine=machine, serving=serving, layout=layout)
    offload = None
    if not plan.fits and machine.host is not None and config.feed_forward == "moe":
        offload = plan_offload(config, machine=machine, serving=serving)
    return ServingAnswer(name=name, machine=machine.title, layout=layout, plan=plan, offload=offload)


def smallest_unit(config: ModelConfig, machine: MachineSpec, serving: ServingConfig) -> ServingLayout:
    """The fewest devices that hold the model and one request: experts shared out, or, dense, every matrix."""
    layout = ServingLayout()
    n_devices = 1
    while n_devices <= machine.n_devices:
        is_moe = config.feed_forward == "moe"
        layout = (
            ServingLayout(devices=n_devices, ep=n_devices) if is_moe else ServingLayout(devices=n_devices, tp=n_devices)
        )
        if is_moe and config.n_routed_experts % n_devices:
            break
        if plan_serving(config, machine=machine, serving=serving, layout=layout, batches=(1,)).fits:
            return layout
        n_devices *= 2
    return layout


def print_serving(answer: ServingAnswer, console: Console) -> None:
    plan, layout = answer.plan, answer.layout
    console.print(
        Text.assemble(
            ("\nserving ", "bold"), (answer.name, "bold"), f" with {plan.config.weights} weights on {layout.devices:,} "
            f"device{'s' * (layout.devices > 1)} of {answer.machine}",
        ),
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for line in facts(plan):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    if plan.fits:
        table = Table(box=None, pad_edge=False, padding=(0, 1))
        for title in TITLES:
            table.add_column(title, justify="left" if title == "waits for" else "right", no_wrap=True)
        for point in fitting(plan):
            table.add_row(*row_of(point), style="bold" if point is plan.best else "")
        console.print(table)
    if answer.offload is not None:
        for line in offload_lines(answer.offload):
            console.print(f"  {line}", highlight=False, soft_wrap=True)


def facts(plan: ServingPlan) -> list[str]:
    """What there is to say beside the table."""
    asked = f"prompts of {plan.config.prompt_tokens:,} tokens, answers of {plan.config.answer_tokens:,}"
    room = f"{bytes_text(plan.weights.total_bytes)} of weights on a device of {bytes_text(plan.memory_limit_bytes)}"
    lines = [f"{asked}; {room}; the cache takes {bytes_text(plan.cache_bytes_per_token)} a token"]
    if not plan.fits:
        return [*lines, plan.bottleneck]
    lines.append(
        f"at most {plan.largest_batch:,} requests a rank, or one of {count_text(plan.largest_context_tokens)} tokens; "
        f"prefill {count_text(plan.prefill.tokens_per_second)} tokens/s, first token after "
        f"{seconds_text(plan.prefill.first_token_seconds)}"
    )
    if plan.drafts is not None:
        lines.append(
            f"MTP drafts kept {plan.drafts.acceptance:.0%} of the time give {plan.drafts.times_tokens_per_second:.2f} "
            f"times the tokens; a step takes {plan.drafts.step_times:.2f} times as long"
        )
    return [*lines, plan.bottleneck]


def offload_lines(plan: OffloadPlan) -> list[str]:
    if not plan.fits:
        return [f"with experts in RAM: {plan.why_not}"]
    return [
        f"with experts in RAM, computed on the {plan.decode_place}: "
        f"{count_text(plan.decode_tokens_per_second_per_user)} tokens/s, prefill "
        f"{count_text(plan.prefill_tokens_per_second)} tokens/s, first token after "
        f"{seconds_text(plan.first_token_seconds)}",
        f"{bytes_text(plan.device_bytes)} on the device ({plan.device_share:.0%} of the experts), "
        f"{bytes_text(plan.host_bytes)} in RAM; at most {count_text(plan.largest_context_tokens)} tokens of context; "
        f"{plan.bottleneck}",
    ]


def fitting(plan: ServingPlan) -> list[DecodePoint]:
    return [point for point in plan.decode if point.fits]


def row_of(point: DecodePoint) -> tuple[str, ...]:
    cost = point.cost_usd_per_million_tokens
    return (
        f"{point.requests_per_rank:,}",
        f"{point.tokens_per_second_per_user:,.3g}",
        count_text(point.tokens_per_second),
        NOTHING if cost is None else usd_text(cost),
        seconds_text(point.step.total_seconds),
        point.step.bottleneck,
    )


def serving_section(answer: ServingAnswer) -> Markup:
    """The curve of speed for each against speed in all, the memory of a device, the table."""
    plan, layout = answer.plan, answer.layout
    said = Markup("").join(Markup("{}. ").format(line[0].upper() + line[1:]) for line in facts(plan))
    if answer.offload is not None:
        said += Markup("").join(Markup("{}. ").format(line) for line in offload_lines(answer.offload))
    head = Markup('<p class="note">{} device{} of {}, {} weights. {}</p>').format(
        f"{layout.devices:,}", "s" * (layout.devices > 1), answer.machine, plan.config.weights, said
    )
    if not plan.fits:
        return head
    points = fitting(plan)
    curve = line_chart(
        [
            Series(
                name="batch sizes",
                points=[(point.tokens_per_second, point.tokens_per_second_per_user) for point in points],
                sparse=True,
            )
        ],
        title="What a user gets against what all get",
        x_label="tokens a second in all (log scale)",
        y_label="tokens a second for each user",
        log_x=True,
        width=640,
        height=320,
    )
    best = plan.best
    assert best is not None
    held = best.requests_per_rank * plan.config.held_tokens * plan.cache_bytes_per_token
    memory = part_bars(
        [PartRow("device", parts_of(plan.weights, "_bytes") | {"cache": held})],
        title=f"Memory of a device with {best.requests_per_rank:,} requests",
        text=bytes_text,
        limit=Line(plan.memory_limit_bytes, "there are"),
        row_height=34,
    )
    return Markup('{}<figure class="wide">{}</figure><figure class="full">{}</figure>{}').format(
        head, Markup(curve), Markup(memory), table_of(TITLES, [row_of(point) for point in points])
    )


def served_from(serving: ServingConfig, config: ModelConfig) -> ServingConfig:
    """Prompts and answers no longer than the model was made for."""
    most = config.max_position_embeddings
    if serving.most_tokens <= most:
        return serving
    return replace(serving, prompt_tokens=max(1, most // 2), answer_tokens=max(1, most // 2))
