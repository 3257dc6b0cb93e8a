"""The command line: `run` for the whole way, one subcommand a stage, and chat, eval and report.

An error that a user can cause ends in one line on stderr and exit status 1; Ctrl-C ends with the command that goes on.
"""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from abyssal.checkpoint.own_sampling import own_sampling
from abyssal.checkpoint.packaged import cache_directory
from abyssal.commands.checkpoint_path import resolve_checkpoint
from abyssal.commands.convert_shape import convert
from abyssal.commands.export_checkpoint import export_checkpoint
from abyssal.commands.fits import check_loadable
from abyssal.commands.import_checkpoint import import_checkpoint
from abyssal.commands.measure_budget import measure_budget
from abyssal.commands.measure_perplexity import measure_perplexity
from abyssal.commands.options import parsed
from abyssal.commands.plan_command import plan_command
from abyssal.commands.preset_table import presets
from abyssal.engine.disk_cache import MAX_BYTES, DiskCache
from abyssal.evals.page import write_report
from abyssal.stages.recipe import Recipe, read_recipe
from abyssal.stages.results import print_results
from abyssal.stages.run import STAGES
from abyssal.stages.way import open_run, walk
from abyssal.talk import talk
from abyssal.types import RequestError, SamplingParams, Structure

USAGE = f"""\
abyssal: from raw text to a reasoning model

  abyssal run RECIPE.toml [--section.key value ...]   walk every stage; stop and start again at will
  abyssal plan RECIPE.toml [--machine NAME] [--search] time, memory and cost before anything is spent
  abyssal STAGE RECIPE.toml [--section.key value ...] one stage: {" ".join(STAGES)}
  abyssal chat DIR [--prompt TEXT ...]                talk to a checkpoint: out/laptop/r1, a GGUF file, smollm2
  abyssal eval DIR --budget 0,16,64 [--best-of 1,4]   accuracy against tokens of thinking, as a table and a page
  abyssal perplexity DIR [--weights int4]             how well it foresees a text
  abyssal export DIR --to FORMAT --out DIR            BF16, FP8, int8, int4 or gguf, for other tools
  abyssal report RUN_DIR                              write RUN_DIR/report.html again
  abyssal import PATH [--check] [--out DIR]           what a checkpoint is, whether it loads; a BF16 directory of it
  abyssal convert DIR --to mla|moe|mla,moe ...        latent attention from GQA, experts from a dense model; the cost
  abyssal presets [NAME]                              published shapes and their sizes; one as a config.json

Add --help to any of them. runs/ holds recipes; every field of a recipe can be overridden on the command line.
"""


@dataclass(frozen=True)
class ChatOptions:
    # a checkpoint, a run and its name (out/laptop/r1), a GGUF file, or a model that is fetched once (smollm2)
    directory: Annotated[Path, tyro.conf.Positional]
    prompt: str | None = None  # answer this and end
    temperature: float | None = None  # the model's own, or else 0.6
    top_p: float | None = None  # the model's own, or else 0.95
    max_tokens: int | None = None  # 256, and as many more as the thinking may take
    top_k: int = 0  # the likeliest so many; 0 for all
    min_p: float = 0.0  # those at least so many times as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1 against ids that were read or written (CTRL)
    presence_penalty: float = 0.0  # above 0 against ids that were written, -2 to 2
    frequency_penalty: float = 0.0  # the same for each time
    stop: tuple[str, ...] = ()  # the answer ends before the first of these texts
    seed: int = 0
    thinking: Literal["auto", "on", "off"] = "auto"  # auto: the model decides
    effort: Literal["low", "medium", "high"] | None = None  # a budget by what this model's right answers need
    budget: int | None = None  # tokens of thinking, at most
    min_thinking: int = 0  # tokens of thinking, at least
    best_of: int = 1  # answers drawn for each that is given: what most of them say
    speculate: Literal["auto", "off"] | int | None = None  # tokens drafted a step; else auto, and off for MTP modules
    stats: bool = False  # say in the end what drafts and caches brought
    dtype: Literal["auto", "float32", "bfloat16"] | None = None  # of products; FP32, or auto with weights in few bits
    weights: Literal["compute", "fp8", "int8", "int4"] = "compute"  # compute: in the type of products
    json: bool = False  # the answer is a JSON object
    schema: Path | None = None  # the answer is JSON by the schema in this file
    regex: str | None = None  # the answer matches this as a whole
    raw: bool = False  # continue the prompt as it stands, its control tokens included, without the chat template
    cache: Path | None = None  # keep what was computed in this folder and use it next time; auto: the user's own cache
    cache_bytes: int = MAX_BYTES  # the room that may take
    refuse: bool = True  # do not load what cannot fit into memory


def main() -> None:
    arguments = sys.argv[1:]
    sys.path.append("")  # a reward of the user's own may lie in the folder they stand in
    try:
        sys.exit(dispatch(arguments))
    except KeyboardInterrupt:
        print(f"\nstopped; go on with: abyssal {shlex.join(arguments)}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, RequestError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


def dispatch(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command in COMMANDS:
        COMMANDS[command](rest)
    elif command == "eval" and not any(argument.endswith(".toml") for argument in rest[:1]):
        measure_budget(rest)  # of a recipe it is a stage
    elif command == "report" and rest and Path(rest[0]).is_dir():
        print(write_report(Path(rest[0])))
    elif command == "run":
        walk_recipe(rest, STAGES, prog="abyssal run")
    elif command in STAGES:
        walk_recipe(rest, (command,), prog=f"abyssal {command}")
    else:
        raise ValueError(
            f"unknown command {command!r}; use run, {', '.join(COMMANDS)}, report or a stage: {', '.join(STAGES)}"
        )
    return 0


def walk_recipe(arguments: list[str], stages: tuple[str, ...], *, prog: str) -> None:
    """RECIPE.toml, then overrides in dotted form."""
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"name a recipe: {prog} runs/laptop.toml")
    prog = f"{prog} {arguments[0]}"
    recipe: Recipe = parsed(Recipe, default=read_recipe(arguments[0]), args=arguments[1:], prog=prog)
    console = Console()
    run = open_run(recipe, console)
    walk(run, stages)
    if stages == STAGES:
        print_results(run.directory, console)


def chat(arguments: list[str]) -> None:
    options: ChatOptions = parsed(ChatOptions, args=arguments, prog="abyssal chat")
    path = resolve_checkpoint(options.directory)
    check_loadable(path, weights=options.weights, dtype=options.dtype, refuse=options.refuse)
    own = own_sampling(path)
    params = SamplingParams(
        temperature=own.temperature if options.temperature is None else options.temperature,
        top_p=own.top_p if options.top_p is None else options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        stop=options.stop,
        seed=options.seed,
        structure=structure_of(options),
    )
    with warnings.catch_warnings():
        # a reader wants to know what is done without, not where in our source it is said
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        talk(
            path,
            params=params,
            max_tokens=options.max_tokens,
            thinking=options.thinking,
            prompt=options.prompt,
            console=Console(),
            dtype=options.dtype,
            weights=options.weights,
            raw=options.raw,
            disk_cache=disk_cache(options.cache, max_bytes=options.cache_bytes),
            effort=options.effort,
            budget=options.budget,
            min_thinking=options.min_thinking,
            best_of=options.best_of,
            speculate=options.speculate,
            stats=options.stats,
        )


def structure_of(options: ChatOptions) -> Structure | None:
    asked = [Structure("json")] if options.json else []
    if options.schema is not None:
        asked.append(Structure("schema", options.schema.read_text(encoding="utf-8")))
    if options.regex is not None:
        asked.append(Structure("regex", options.regex))
    if len(asked) > 1:
        raise ValueError("--json, --schema and --regex say what an answer is; give one of them")
    if asked and options.raw:
        return replace(asked[0], may_think=False)
    return asked[0] if asked else None


def disk_cache(folder: Path | None, *, max_bytes: int) -> DiskCache | None:
    if folder is None:
        return None
    return DiskCache(folder=cache_directory() if str(folder) == "auto" else folder, max_bytes=max_bytes)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "chat": chat,
    "convert": convert,
    "export": export_checkpoint,
    "import": import_checkpoint,
    "perplexity": measure_perplexity,
    "plan": plan_command,
    "presets": presets,
}


if __name__ == "__main__":
    main()
