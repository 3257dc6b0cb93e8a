"""`abyssal eval DIR --budget 0,16,64`: what a checkpoint's thinking is worth, and what several answers are.

Leaves budget.json and budget.html in the folder `--out`, and beside the weights how long right answers thought, which
is what `abyssal chat --effort` goes by.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from abyssal.checkpoint.load import FORMATS, Loaded, load_checkpoint
from abyssal.checkpoint.own_sampling import own_sampling
from abyssal.checkpoint.own_thinking import ThinkingLengths, measured_lengths, write_lengths
from abyssal.commands.checkpoint_path import resolve_checkpoint
from abyssal.commands.fits import check_loadable
from abyssal.commands.options import parsed
from abyssal.data.problems import ProblemSource, problem_at
from abyssal.data.user_examples import read_user_problems
from abyssal.evals.budget import Answers, answers_within, eval_engine, point
from abyssal.evals.grade import Grade, grade
from abyssal.evals.page_budget import budget_page, name_of
from abyssal.evals.tasks import right_lengths
from abyssal.machine import Precision
from abyssal.progress import bytes_bar
from abyssal.reward.verifiers import Verifiers
from abyssal.tokens.chat import landing_ids, landing_of
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Problem, SamplingParams

ROOM = 256  # tokens for an answer beside the largest budget


@dataclass(frozen=True)
class BudgetOptions:
    # a checkpoint, a run and its name (out/laptop/r1), a GGUF file, or a model that is fetched once (smollm2)
    directory: Annotated[Path, tyro.conf.Positional]
    budget: str  # tokens of thinking, by commas: 0,16,32,64; without a limit it is measured in any case
    best_of: str = "1"  # answers of which the majority counts, by commas: 1,4,16
    data: Path | None = None  # problems as JSONL, {"prompt", "answer"} on each line; else held-out ones of our own
    problems: int = 100  # at most
    answers: int | None = None  # to each problem; the most that --best-of wants, or 4 if that is more
    temperature: float | None = None  # the model's own, or else 0.6
    top_p: float | None = None  # the model's own, or else 0.95
    max_tokens: int | None = None  # thinking and answer together; the largest budget and 256
    landing: str | None = None  # last words of thinking that is cut, within the budget; what a chat would say
    seed: int = 0
    dtype: Precision | None = None  # of products; FP32, or auto with weights in few bits
    weights: Literal["compute", "fp8", "int8", "int4"] = "compute"  # compute: in the type of products
    out: Path | None = None  # out/eval/NAME
    refuse: bool = True  # do not load what cannot fit into memory

    def __post_init__(self) -> None:
        if self.problems < 1:
            raise ValueError(f"problems={self.problems} leaves nothing to measure")


def measure_budget(arguments: list[str]) -> None:
    options: BudgetOptions = parsed(BudgetOptions, args=arguments, prog="abyssal eval")
    budgets = sorted(numbers(options.budget, "--budget", least=0))
    counts = sorted(numbers(options.best_of, "--best-of", least=1))
    k = max(4, *counts) if options.answers is None else options.answers
    if k < counts[-1]:
        raise ValueError(f"--best-of {counts[-1]} needs as many answers a problem, --answers {k} has fewer")
    console = Console()
    path = resolve_checkpoint(options.directory)
    check_loadable(path, weights=options.weights, dtype=options.dtype, device="cpu", refuse=options.refuse)
    problems, data = asked(options)
    with bytes_bar(f"loading {path}", console) as on_bytes:
        dtype = options.dtype or ("auto" if options.weights in FORMATS else "float32")
        loaded = load_checkpoint(path, dtype=dtype, weights=options.weights, on_bytes=on_bytes)
    tokenizer = thinking_tokenizer(loaded, path)
    landing = landing_of(tokenizer) if options.landing is None else options.landing
    own = own_sampling(path)
    params = SamplingParams(
        temperature=own.temperature if options.temperature is None else options.temperature,
        top_p=own.top_p if options.top_p is None else options.top_p,
        max_tokens=max_tokens(options, budgets),
    )
    columns = (TextColumn("problems"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(problems))
        drawn = answers_within(
            eval_engine(loaded.model, tokenizer),
            tokenizer,
            problems,
            budgets=budgets,
            k=k,
            params=params,
            landing=landing_ids(tokenizer, landing),
            seed=options.seed,
            on_problems=lambda n_done: bar.update(task, completed=n_done),
        )
    with Verifiers() as verifiers:
        graded = [(answers, grade(answers.rollouts, verifiers, tokenizer)) for answers in drawn]
    lengths = measured_lengths(right_lengths(drawn[0].rollouts, graded[0][1]), landing=landing)
    results = {
        "checkpoint": str(options.directory),
        "data": data,
        "n_problems": len(problems),
        "answers": k,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_tokens": params.max_tokens,
        "landing": landing,
        "seed": options.seed,
        "lengths": lengths and lengths._asdict(),
        "points": curve(graded, counts, k=k),
    }
    say(results, console)
    keep(results, lengths, path, options, console)


def curve(graded: list[tuple[Answers, list[Grade]]], counts: list[int], *, k: int) -> list[dict[str, Any]]:
    """Budgets in order, no limit last, for each number of votes."""
    ordered = [*graded[1:], graded[0]]
    return [point(answers, grades, k=k, best_of=n) for n in counts for answers, grades in ordered]


def numbers(text: str, option: str, *, least: int) -> set[int]:
    found = {part.strip() for part in text.split(",")}
    if bad := [part for part in sorted(found) if not part.isascii() or not part.isdecimal() or int(part) < least]:
        raise ValueError(f"{option} {text}: {bad[0]!r} is no number from {least} up; give such as 0,16,64")
    return {int(part) for part in found}


def asked(options: BudgetOptions) -> tuple[list[Problem], str]:
    """The problems, and what they are called."""
    if options.data is not None:
        return read_user_problems(options.data, distinct=True)[: options.problems], str(options.data)
    source = ProblemSource()
    problems = [problem_at(source, options.seed, i, "held_out") for i in range(options.problems)]
    return problems, f"our own ({', '.join(source.families)})"


def thinking_tokenizer(loaded: Loaded, path: Path) -> Tokenizer:
    if loaded.tokenizer is None:
        raise FileNotFoundError(f"{path} has no tokenizer.json: copy the model's tokenizer files into it")
    if not loaded.tokenizer.has_thinking:
        raise ValueError(f"{path}: its vocabulary has no <think> and </think>, so there is no thinking to measure")
    return loaded.tokenizer


def max_tokens(options: BudgetOptions, budgets: list[int]) -> int:
    if options.max_tokens is None:
        return budgets[-1] + ROOM
    if options.max_tokens < budgets[-1] + 3:  # the two marks and one token of answer
        raise ValueError(
            f"--max-tokens {options.max_tokens} leaves no room for an answer behind {budgets[-1]} tokens of thinking; "
            f"give at least {budgets[-1] + 3}"
        )
    return options.max_tokens


def say(results: dict[str, Any], console: Console) -> None:
    table = Table("answers", "budget", "accuracy", "95 %", "tokens a question", "thought", "cut", box=None)
    for one in results["points"]:
        budget = "no limit" if one["budget"] is None else str(one["budget"])
        table.add_row(
            name_of(one["best_of"]),
            budget,
            f"{one['accuracy']:.1%}",
            f"{one['ci_low']:.1%} - {one['ci_high']:.1%}",
            f"{one['tokens']:,.1f}",
            f"{one['thinking_tokens']:.1f}",
            f"{one['cut_share']:.0%}",
        )
    console.print(table)


def keep(
    results: dict[str, Any], lengths: ThinkingLengths | None, path: Path, options: BudgetOptions, console: Console
) -> None:
    out = options.out or Path("out") / "eval" / options.directory.name
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    (out / "budget.json").write_text(text + "\n", encoding="utf-8")
    (out / "budget.html").write_text(budget_page(results), encoding="utf-8")
    console.print(f"{out / 'budget.html'} and budget.json are written", highlight=False, soft_wrap=True)
    if lengths is None:
        said = "too few right answers thought: what --effort means for this model stays as it was"
    else:
        try:
            said = f"{write_lengths(path, lengths)} says what --effort means for this model"
        except OSError as error:  # a folder that is not ours to write to
            said = f"how long its right answers thought is not kept beside the weights: {error.strerror or error}"
    console.print(said, highlight=False, soft_wrap=True)
