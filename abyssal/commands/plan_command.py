"""`abyssal plan`: what a recipe takes on a machine before anything is spent; what serving takes; what a machine can do.

Owns the options and which questions are answered. Does not own answers (plan/, stages/plan_recipe.py), their words on
the terminal (plan_tables.py, plan_search.py, plan_serving.py) or the page (plan_page.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.text import Text

from abyssal.commands.options import parsed
from abyssal.commands.plan_json import as_json
from abyssal.commands.plan_page import Section, page_of, plan_page, schedule_picture
from abyssal.commands.plan_possible import possible_section, print_possible
from abyssal.commands.plan_search import print_search, search_answer, search_section
from abyssal.commands.plan_serving import print_serving, served_from, serving_answer, serving_section
from abyssal.commands.plan_shards import print_shards, shards_section
from abyssal.commands.plan_tables import print_plan, print_published
from abyssal.machine import resolve_device, set_threads
from abyssal.model.presets import PRESETS
from abyssal.plan.described_machine import described_machine
from abyssal.plan.draw_possible import draw_possible
from abyssal.plan.every_published import every_published
from abyssal.plan.machine_figures import machine_figures
from abyssal.plan.machine_file import MachineSpec
from abyssal.plan.measure_machine import measure_machine
from abyssal.plan.possible import possible
from abyssal.plan.rank_shards import all_shards
from abyssal.plan.serving import ServingConfig, ServingLayout
from abyssal.stages.machine_here import machine_here, measured_file
from abyssal.stages.plan_recipe import plan_recipe, served_config, with_given
from abyssal.stages.planned_work import base_config
from abyssal.stages.recipe import Recipe, read_recipe

PROG = "abyssal plan"
PIPED = 120  # characters of a line
OWN_SECTIONS = ("--serving.",)  # dotted options that are not the recipe's


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a recipe takes on a machine: time by part, memory of each rank by part, cost, bottleneck, whether it fits.

    Every field of the recipe can be set in dotted form: --parallel.pp 8 --plan.devices 512 --pretrain.rows 1024. A
    machine is a name in machines/, a file, or a card and its RAM: --machine 24GB+128GB. Without a recipe: --possible,
    --card and --ram say what a machine can do at all, --published how near the plan comes to published runs, --measure
    writes this machine's own file.
    """

    # a recipe: runs/v3.toml; for --serve a published shape does too: v3, see abyssal presets
    subject: Annotated[str | None, tyro.conf.Positional] = None
    machine: str | None = None  # else the recipe's, or this machine
    search: bool = False  # find the cheapest layout that fits, and why others fall out
    serve: bool = False  # serving of the result: speed for each and in all by batch, first token, cost
    shards: bool = False  # every rank's shard, built without memory, beside the planned bytes
    possible: bool = False  # what a machine can train, distil and serve
    card: str = ""  # the same of one card: its memory or name, 24GB or rtx4090 ...
    ram: str = ""  # ... and the RAM beside it: 128GB
    published: bool = False  # published figures, the plan's, and the deviation
    measure: bool = False  # time this machine for a minute or two, and plan with what came out from then on
    threads: int = 0  # CPU threads for --measure; 0: every core
    serving: ServingConfig = field(default_factory=ServingConfig)
    unit: Annotated[ServingLayout, tyro.conf.arg(name="serving")] = field(default_factory=ServingLayout)
    json: bool = False  # everything that was asked, for programs
    html: Path | None = None  # everything that was asked, as one self-contained page with pictures
    picture: Path | None = None  # the schedule, or what is possible, as an SVG

    def __post_init__(self) -> None:
        if self.ram and not self.card:
            raise ValueError(f"--ram {self.ram} is beside a card; name it with --card 24GB")
        if self.card and self.machine:
            raise ValueError(f"--card {self.card} and --machine {self.machine} both name a machine; keep one of them")


@dataclass
class Answers:
    """What was asked, as it comes: for programs, for the page, and the one picture."""

    for_programs: dict[str, Any] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)
    picture: str = ""


def plan_command(arguments: list[str]) -> None:
    own, overrides = apart(arguments)
    options: PlanOptions = parsed(PlanOptions, args=own, prog=PROG)
    console, answers = terminal(quiet=options.json), Answers()
    if options.measure:
        measure(options.threads, console)
    elif options.published:
        lines = every_published()
        answers.for_programs["published"] = lines
        print_published(lines, console)
    elif options.possible or options.card:
        about_possible(options, answers, console)
    elif options.subject is None:
        raise ValueError(f"name a recipe: {PROG} runs/v3.toml; {PROG} --help lists what else can be asked")
    elif options.subject.endswith(".toml"):
        about_recipe(options.subject, options, overrides, answers, console)
    elif options.serve and options.subject in PRESETS:
        about_shape(options.subject, options, answers, console)
    else:
        raise ValueError(
            f"{options.subject!r} is no recipe: name one, such as runs/v3.toml, or ask --serve of one of "
            f"{', '.join(PRESETS)}"
        )
    if options.json:
        print(json.dumps(as_json(answers.for_programs), indent=1, allow_nan=False))
    if options.picture is not None:
        if not answers.picture:
            raise ValueError(f"--picture {options.picture}: there is no pipeline to draw; --html draws memory and time")
        write(options.picture, answers.picture)


def about_recipe(path: str, options: PlanOptions, overrides: list[str], answers: Answers, console: Console) -> None:
    recipe: Recipe = parsed(Recipe, default=read_recipe(path), args=overrides, prog=f"{PROG} {path}")
    machine, note = machine_of(options.machine or recipe.plan.machine)
    plan = plan_recipe(recipe, machine=machine, machine_note=note)
    machine = with_given(recipe, machine)
    answers.for_programs["plan"] = plan
    answers.picture = schedule_picture(plan)
    print_plan(plan, console)
    trained = next((stage.training for stage in plan.stages if stage.stage == "pretrain"), None)
    for option, asked in (("--search", options.search), ("--shards", options.shards)):
        if asked and trained is None:
            raise ValueError(
                f"{option} is of `pretrain`, which plan.stages={list(recipe.plan.stages)} leaves out; add it"
            )
    if options.search:
        search = search_answer(recipe, machine, trained, Console(stderr=True))
        answers.for_programs["search"] = search
        answers.sections.append(("layouts", "Layouts", search_section(search)))
        print_search(search, console)
    if options.shards:
        if trained is None:
            raise ValueError("--shards are of `pretrain`, which plan.stages leaves out; add it")
        shards = all_shards(base_config(recipe), trained, optimizer=recipe.pretrain.optimizer)
        answers.for_programs["shards"] = shards
        answers.sections.append(("shards", "Shards", shards_section(shards)))
        print_shards(shards, console)
    if options.serve:
        config = served_config(recipe)
        serving = served_from(options.serving, config)
        served = serving_answer(config, name=recipe.run.name, machine=machine, serving=serving, layout=options.unit)
        answers.for_programs["serving"] = served
        answers.sections.append(("serving", "Serving", serving_section(served)))
        print_serving(served, console)
    if options.html is not None:
        write(options.html, plan_page(plan, machine, more=answers.sections))


def about_shape(name: str, options: PlanOptions, answers: Answers, console: Console) -> None:
    """Serving of a published shape, without a recipe."""
    machine, _ = machine_of(options.machine or "")
    config = PRESETS[name]()
    serving = served_from(options.serving, config)
    answer = serving_answer(config, name=name, machine=machine, serving=serving, layout=options.unit)
    answers.for_programs["serving"] = answer
    print_serving(answer, console)
    if options.html is not None:
        section = ("serving", "Serving", serving_section(answer))
        write(options.html, page_of(name, machine, heading=f"What serving {name} takes", sections=[section]))


def about_possible(options: PlanOptions, answers: Answers, console: Console) -> None:
    """ "I have one 24 GB card and 128 GB of RAM: what can I train, distil, serve?" """
    machine, _ = machine_of("+".join(part for part in (options.card, options.ram) if part) or options.machine or "")
    found = possible(machine)
    answers.for_programs["possible"] = {"machine": found.machine, "words": found.words, "rows": found.rows}
    answers.picture = draw_possible(found)
    print_possible(found, console)
    if options.html is not None:
        section = ("possible", "What it can do", possible_section(found))
        write(options.html, page_of(machine.name, machine, heading=f"What {found.machine} can do", sections=[section]))


def measure(n_threads: int, console: Console) -> None:
    """Times this machine, and writes its file where plans and runs look for it."""
    device = resolve_device("auto")
    n_threads = set_threads(n_threads or None)
    file = measured_file(device, n_threads)
    with console.status("timing products, attention and passes over memory, a minute or two"):
        spec = measure_machine(threads=n_threads, out=file, device=str(device))
    for figure in machine_figures(spec):
        console.print(Text.assemble((f"  {figure.what:<45}", ""), (figure.value, "bold")))
    console.print(f"{file} is written: plans and runs on this machine go by it", highlight=False, soft_wrap=True)


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    Console(stderr=True).print(f"{path} is written", highlight=False, soft_wrap=True)


def terminal(*, quiet: bool) -> Console:
    """What is piped into a file has no width of its own, and gets that of all columns. `quiet`: stdout is JSON's."""
    console = Console(quiet=quiet)
    return console if console.is_terminal else Console(width=PIPED, quiet=quiet)


def apart(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options of the command, and those of the recipe: they have a dot, and what follows belongs to them."""
    own: list[str] = []
    overrides: list[str] = []
    into = own
    for argument in arguments:
        if argument.startswith("--"):
            dotted = "." in argument.split("=", 1)[0] and not argument.startswith(OWN_SECTIONS)
            into = overrides if dotted else own
        into.append(argument)
    return own, overrides


def machine_of(name: str) -> tuple[MachineSpec, str]:
    """The machine, and whose figures these are. "" is this one."""
    if not name:
        here = machine_here(resolve_device("auto"), torch.get_num_threads())
        return here.spec, here.note
    spec = described_machine(name)
    where = name if name.endswith(".toml") else f"machines/{spec.name}.toml"
    return spec, f"figures and their sources: {where}" if "+" not in name else f"figures of {spec.title}"
