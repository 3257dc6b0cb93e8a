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
from markupsafe import Markup
from rich.console import Console

from abyssal.commands.options import parsed
from abyssal.commands.plan_json import as_json
from abyssal.commands.plan_page import page_of, plan_page
from abyssal.commands.plan_search import print_search, search_answer, search_section
from abyssal.commands.plan_serving import print_serving, served_from, serving_answer, serving_section
from abyssal.commands.plan_tables import print_plan
from abyssal.machine import resolve_device
from abyssal.model.config import ModelConfig
from abyssal.model.presets import PRESETS
from abyssal.plan.machine_file import MachineSpec, read_machine
from abyssal.plan.serving import ServingConfig, ServingLayout
from abyssal.stages.machine_here import machine_here
from abyssal.stages.plan_recipe import plan_recipe, served_config, with_given
from abyssal.stages.recipe import Recipe, read_recipe

PROG = "abyssal plan"
PIPED = 120  # characters of a line
OWN_SECTIONS = ("--serving.",)  # dotted options that are not the recipe's


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a recipe takes on a machine: time by part, memory of each rank by part, cost, bottleneck, whether it fits.

    Every field of the recipe can be set in dotted form: --parallel.pp 8 --plan.devices 512 --pretrain.rows 1024.
    """

    # a recipe: runs/v3.toml; for --serve a published shape does too: v3, see abyssal presets
    subject: Annotated[str | None, tyro.conf.Positional] = None
    machine: str | None = None  # a name in machines/ or a file; else the recipe's, or this machine
    search: bool = False  # find the cheapest layout that fits, and why others fall out
    serve: bool = False  # serving of the result: speed for each and in all by batch, first token, cost
    serving: ServingConfig = field(default_factory=ServingConfig)
    unit: Annotated[ServingLayout, tyro.conf.arg(name="serving")] = field(default_factory=ServingLayout)
    json: bool = False  # everything that was asked, for programs
    html: Path | None = None  # everything that was asked, as one self-contained page with pictures


def plan_command(arguments: list[str]) -> None:
    own, overrides = apart(arguments)
    options: PlanOptions = parsed(PlanOptions, args=own, prog=PROG)
    console = terminal()
    if options.subject is None:
        raise ValueError(f"name a recipe: {PROG} runs/v3.toml; {PROG} --help lists what else can be asked")
    if options.subject.endswith(".toml"):
        plan_of_recipe(options.subject, options, overrides, console)
    elif options.serve and options.subject in PRESETS:
        machine, _ = machine_of(options.machine or "")
        answer_serving(options, PRESETS[options.subject](), machine, console)
    else:
        raise ValueError(
            f"{options.subject!r} is no recipe: name one, such as runs/v3.toml, or ask --serve of one of "
            f"{', '.join(PRESETS)}"
        )


def plan_of_recipe(path: str, options: PlanOptions, overrides: list[str], console: Console) -> None:
    recipe: Recipe = parsed(Recipe, default=read_recipe(path), args=overrides, prog=f"{PROG} {path}")
    machine, note = machine_of(options.machine or recipe.plan.machine)
    plan = plan_recipe(recipe, machine=machine, machine_note=note)
    answers: dict[str, Any] = {"plan": plan}
    sections: list[tuple[str, str, Markup]] = []
    if not options.json:
        print_plan(plan, console)
    if options.search:
        asked = next((stage.training for stage in plan.stages if stage.stage == "pretrain"), None)
        answers["search"] = search = search_answer(recipe, machine, asked, Console(stderr=True))
        sections.append(("layouts", "Layouts", search_section(search)))
        if not options.json:
            print_search(search, console)
    if options.serve:
        config = served_config(recipe)
        serving = served_from(options.serving, config)
        answers["serving"] = served = serving_answer(
            config, name=recipe.run.name, machine=with_given(recipe, machine), serving=serving, layout=options.unit
        )
        sections.append(("serving", "Serving", serving_section(served)))
        if not options.json:
            print_serving(served, console)
    if options.json:
        print(json.dumps(as_json(answers), indent=1, allow_nan=False))
    write_page(options, plan_page(plan, machine, more=sections) if options.html else "")


def answer_serving(options: PlanOptions, config: ModelConfig, machine: MachineSpec, console: Console) -> None:
    """Of a published shape, without a recipe."""
    answer = serving_answer(
        config, name=str(options.subject), machine=machine, serving=served_from(options.serving, config),
        layout=options.unit,
    )  # fmt: skip
    if options.json:
        print(json.dumps(as_json({"serving": answer}), indent=1, allow_nan=False))
    else:
        print_serving(answer, console)
    if options.html:
        heading = f"What serving {options.subject} takes"
        section = [("serving", "Serving", serving_section(answer))]
        write_page(options, page_of(str(options.subject), machine, heading=heading, sections=section))


def write_page(options: PlanOptions, page: str) -> None:
    if options.html is not None:
        options.html.write_text(page, encoding="utf-8")
        Console(stderr=True).print(f"{options.html} is written", highlight=False, soft_wrap=True)


def terminal() -> Console:
    """What is piped into a file has no width of its own, and gets that of all columns."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPED)


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
    if name:
        where = name if name.endswith(".toml") else f"machines/{name}.toml"
        return read_machine(name), f"figures and their sources: {where}"
    here = machine_here(resolve_device("auto"), torch.get_num_threads())
    return here.spec, here.note
