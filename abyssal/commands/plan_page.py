"""The plan as one self-contained page: what it takes in a sentence and tiles, then memory, time, schedule, serving.

Owns what the page says and in which order. Does not own the numbers (plan/), the drawings (evals/part_bars.py,
plan/draw_schedule.py) nor the sheet (evals/page.py). Light and dark, no network, no file but itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from abyssal.commands.plan_tables import cost_text
from abyssal.evals.page import document
from abyssal.evals.page_tables import NOTHING, table_of
from abyssal.evals.part_bars import Line, PartRow, part_bars
from abyssal.plan.draw_schedule import draw_schedule
from abyssal.plan.in_words import bytes_text, count_text, hours_text, percent_text, seconds_text, usd_text
from abyssal.plan.machine_figures import machine_figures
from abyssal.plan.machine_file import MachineSpec
from abyssal.plan.simulate import simulate
from abyssal.plan.stage_plan import RecipePlan, StagePlan
from abyssal.plan.training import TrainingPlan

Section = tuple[str, str, Markup]  # anchor, title, body
NO_HEADER = Markup("")
DRAWN = 24  # micro-batches, where the pipeline needs no more
RANKS_DRAWN = 32  # more cannot be read; their neighbours hold about as much


def plan_page(plan: RecipePlan, machine: MachineSpec, *, more: Sequence[Section] = ()) -> str:
    """`more` are the sections of what else was asked."""
    sections: list[Section] = [
        ("stages", "Stages", stages_section(plan)),
        ("time", "Where a step goes", time_section(plan)),
        ("memory", "Memory", memory_section(plan)),
        ("schedule", "The schedule", schedule_section(plan)),
        *more,
    ]
    header = Markup('<p class="lead">{}</p>{}').format(lead(plan), tiles(plan))
    return page_of(plan.name, machine, heading=f"What {plan.name} takes", header=header, sections=sections)


def page_of(
    name: str, machine: MachineSpec, *, heading: str, sections: Sequence[Section], header: Markup = NO_HEADER
) -> str:
    """Any answers with the figures of the machine behind them."""
    shown = [one for one in (*sections, ("figures", "Figures and their sources", figures_section(machine))) if one[2]]
    links = Markup("").join(Markup('<a href="#{}">{}</a>').format(anchor, title) for anchor, title, _ in shown)
    blocks = [Markup('<section id="{}"><h2>{}</h2>{}</section>').format(*one) for one in shown]
    return document(
        name=name,
        written=f" · {machine.title}",
        heading=heading,
        header=Markup("{}<nav>{}</nav>").format(header, links),
        body=Markup("").join(blocks),
        footer="One file, no network. Planned by arithmetic and simulation; nothing was run.",
    )


def lead(plan: RecipePlan) -> Markup:
    """The plan in one paragraph."""
    whole, longest, fullest = plan.whole, plan.longest, plan.fullest
    said = [
        Markup("On {} it takes <b>{}</b>: <b>{}</b> device-hours").format(
            plan.machine, seconds_text(whole.seconds), hours_text(whole.device_hours)
        )
    ]
    if whole.cost_usd is not None:
        said.append(Markup(", <b>{}</b>").format(usd_text(whole.cost_usd)))
    if plan.given_device_hours:
        given = f" (of which {hours_text(plan.given_device_hours)} h are given, not planned: {plan.given_are})"
        said.append(Markup("{}").format(given))
    room = f"{bytes_text(fullest.peak_memory_bytes)} of {bytes_text(fullest.memory_limit_bytes)}"
    if plan.fits:
        said.append(Markup(". It fits: the fullest device holds <b>{}</b>").format(room))
    else:
        said.append(
            Markup(
                '. <b style="color:var(--wrong)">It does not fit</b>: the fullest device would hold <b>{}</b>; {}'
            ).format(room, fullest.advice)
        )
    said.append(Markup(". What most of the time goes to: {}.").format(longest.bottleneck))
    return Markup("").join(said)


def tiles(plan: RecipePlan) -> Markup:
    whole, longest, fullest = plan.whole, plan.longest, plan.fullest
    n_devices = f"on {longest.n_devices:,} device{'s' * (longest.n_devices > 1)}"
    shown = [
        ("time", seconds_text(whole.seconds), n_devices),
        ("device-hours", hours_text(whole.device_hours), "" if whole.cost_usd is None else usd_text(whole.cost_usd)),
        ("tokens a second", count_text(longest.tokens_per_second), longest.stage),
        ("memory", percent_text(fullest.peak_memory_bytes / fullest.memory_limit_bytes), "of the fullest device"),
    ]
    if longest.training and longest.mfu is not None:
        rate = f"{longest.training.flops_per_second_per_device / 1e12:,.3g} TFLOP/s a device"
        shown.insert(3, ("MFU", percent_text(longest.mfu), rate))
    blocks = [
        Markup(
            '<div class="tile"><div class="who">{}</div><div class="big">{}</div><div class="small">{}</div></div>'
        ).format(*tile)
        for tile in shown
    ]
    return Markup('<div class="tiles">{}</div>').format(Markup("").join(blocks))


def stages_section(plan: RecipePlan) -> Markup:
    titles = ["", "steps", "tokens", "a step", "tokens/s", "MFU", "time", "device-hours", "cost", "fullest device", ""]
    most = max(stage.seconds for stage in plan.stages)
    rows = []
    for k, stage in enumerate(plan.stages):
        bar = Markup(
            '<td class="share"><div class="bar" style="width:{}%"><span style="width:100%;{}"></span></div></td>'
        )
        rows.append(
            [
                Markup("{} <small>{}</small>").format(stage.stage, stage.what),
                f"{stage.n_steps:,.0f}",
                count_text(stage.tokens),
                seconds_text(stage.step_seconds),
                count_text(stage.tokens_per_second),
                NOTHING if stage.mfu is None else percent_text(stage.mfu),
                seconds_text(stage.seconds),
                hours_text(stage.device_hours),
                cost_text(stage.cost_usd),
                fullest_cell(stage),
                bar.format(f"{100 * stage.seconds / most:.2f}", f"background:var(--s{k % 6})"),
            ]
        )
    whole = plan.whole
    if plan.given_device_hours:
        given = Markup("given <small>{}</small>").format(plan.given_are)
        rows.append([given, *[""] * 6, hours_text(plan.given_device_hours), cost_text(plan.given_cost_usd), "", ""])
    times = [seconds_text(whole.seconds), hours_text(whole.device_hours), cost_text(whole.cost_usd)]
    total = ["all", *[""] * 5, *times, "", ""]
    assumed = list(dict.fromkeys(line for stage in plan.stages for line in stage.assumed))
    note = Markup('<p class="note">Assumed: {}.</p>').format("; ".join(assumed)) if assumed else Markup("")
    return note + table_of(titles, rows, total=total)


def fullest_cell(stage: StagePlan) -> Markup:
    mark = "right" if stage.fits else "wrong"
    said = "fits" if stage.fits else "does not fit"
    return Markup('{} <small class="mark {}">{}</small>').format(bytes_text(stage.peak_memory_bytes), mark, said)


def time_section(plan: RecipePlan) -> Markup:
    longest = plan.longest
    chart = part_bars(
        [PartRow(longest.stage, longest.step_seconds_by_part)], title=f"A step of {longest.stage}", text=seconds_text,
        row_height=34,
    )  # fmt: skip
    drawn = Markup('<figure class="full">{}</figure>').format(Markup(chart))
    kinds: dict[tuple[str, ...], list[StagePlan]] = {}  # stages whose steps have the same parts share a picture
    for stage in plan.stages if len(plan.stages) > 1 else ():
        kinds.setdefault(tuple(stage.step_seconds_by_part), []).append(stage)
    for stages in kinds.values():
        shares = [
            PartRow(
                stage.stage,
                {name: value / stage.step_seconds for name, value in stage.step_seconds_by_part.items()},
                seconds_text(stage.step_seconds),
            )
            for stage in stages
        ]
        kind = "that trains" if stages[0].mfu is not None else "that draws answers and learns from them"
        if stages[0].training is None:
            kind = "that only draws answers"
        every = part_bars(shares, title=f"A step {kind}, as shares of it", text=percent_text, ticks=False)
        drawn += Markup('<figure class="full">{}</figure>').format(Markup(every))
    most = "; ".join(said for said in (longest.bottleneck, longest.advice) if said)
    note = Markup('<p class="note">A step of {} takes {}. Most of it: {}.</p>').format(
        longest.stage, seconds_text(longest.step_seconds), most
    )
    return note + drawn


def memory_section(plan: RecipePlan) -> Markup:
    """The fullest stage, rank by rank."""
    stage = plan.fullest
    n_ranks = len(stage.memory_bytes_by_part)
    every = -(-n_ranks // RANKS_DRAWN)
    ranks = range(0, n_ranks, every)
    chart = part_bars(
        [PartRow(f"rank {r}" if n_ranks > 1 else "device", stage.memory_bytes_by_part[r]) for r in ranks],
        title=f"Memory of a device in {stage.stage}, at its fullest",
        text=bytes_text,
        limit=Line(stage.memory_limit_bytes, "there are"),
        row_height=22 if n_ranks > 4 else 34,
    )
    said = "fits" if stage.fits else f"does not fit: {stage.advice}"
    note = f"The fullest device holds {bytes_text(stage.peak_memory_bytes)} of {bytes_text(stage.memory_limit_bytes)}"
    return Markup('<p class="note">{}: it {}.</p><figure class="full">{}</figure>').format(note, said, Markup(chart))


def schedule_section(plan: RecipePlan) -> Markup:
    """The longest stage's pipeline, drawn to time."""
    training = plan.longest.training
    if training is None or not (picture := schedule_picture(plan)):
        return Markup("")
    timeline = training.timeline
    note = (
        f"A step’s {training.tokens_per_step:,} tokens in {training.n_micro_batches:,} micro-batches through "
        f"{training.layout.pp} ranks: {percent_text(timeline.bubble_share)} of all ranks’ time is bubble, "
        f"{percent_text(timeline.hidden_share)} of communication is hidden."
    )
    if (n_drawn := drawn_of(training)) < training.n_micro_batches:
        note += f" Drawn with {n_drawn} of them, so its bubble is a larger share."
    return Markup('<p class="note">{}</p><figure class="full drawn">{}</figure>').format(note, Markup(picture))


def schedule_picture(plan: RecipePlan) -> str:
    """Of the stage that trains the longest; of a long step, so few micro-batches that they can be told apart. "" where
    there is no pipeline."""
    training = plan.longest.training
    if training is None or training.layout.pp == 1:
        return ""
    layout, timeline = training.layout, training.timeline
    if (n_drawn := drawn_of(training)) < training.n_micro_batches:
        timeline = simulate(
            layout.schedule, n_stages=layout.pp, n_micro_batches=n_drawn, times=timeline.times, chunks=layout.chunks
        )
    return draw_schedule(timeline, width=1040)


def drawn_of(training: TrainingPlan) -> int:
    """Two micro-batches a rank fill every pipeline; interleaved takes whole rounds of one a rank."""
    pp = training.layout.pp
    return min(training.n_micro_batches, max(2, -(-DRAWN // pp)) * pp)


def figures_section(machine: MachineSpec) -> Markup:
    """Every figure of the machine that went into the plan, with where it is from."""
    rows = [
        [figure.what, figure.value, Markup('<td class="source">{}</td>').format(figure.source)]
        for figure in machine_figures(machine)
    ]
    note = (
        "Rates are what was reached by somebody, not what data sheets promise; none was chosen to make a result right."
    )
    return Markup('<p class="note">{}</p><details><summary>{} figures of {}</summary>{}</details>').format(
        note, len(rows), machine.title, table_of(["", "", Markup('<span class="sans">read in</span>')], rows)
    )
