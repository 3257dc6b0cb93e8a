"""How far the engine's log-probs are from the trainer's, in both precisions, with and without router replay.

    python bench/mismatch.py RUN/pretrain/checkpoint [--problems 32] [--answers 4] [--threads 2]

The engine answers held-out problems of the generators; the trainer computes the log-prob of each drawn token again, in
one pass without a cache, once choosing experts for itself and once on the engine's. A flip is a position and layer at
which another set of experts was chosen; `after a flip` is the share of tokens that stand behind one, whose hidden
states differ by more than rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from common import append_result

from abyssal.checkpoint.load import load_checkpoint
from abyssal.data.problems import ProblemSource, problem_at
from abyssal.engine.engine import Engine
from abyssal.machine import keep_freed_memory, set_threads
from abyssal.model.transformer import count_parameters
from abyssal.rollout import agreement, sample_answers
from abyssal.types import SamplingParams

LEVELS: dict[str, tuple[int, int]] = {"swaps": (6, 7), "nested": (3, 4)}  # those of the recipes
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Options:
    checkpoint: tyro.conf.Positional[Path]
    problems: int = 32
    answers: int = 4
    max_tokens: int = 128
    temperature: float = 1.0
    dtypes: tuple[Precision, ...] = ("float32", "bfloat16")
    seed: int = 0
    threads: int = 2
    save: bool = True  # append the results to results/mismatch.jsonl


def measure(dtype: Precision, options: Options) -> dict[str, Any]:
    loaded = load_checkpoint(options.checkpoint, dtype=dtype)
    model, tokenizer = loaded.model, loaded.tokenizer
    if tokenizer is None:
        raise FileNotFoundError(f"{options.checkpoint} has no tokenizer.json: give a checkpoint of a run")
    engine = Engine(model, eos_ids=[tokenizer.eos_id], max_batch=64, vocab_size=tokenizer.vocab_size)
    source = ProblemSource(levels=(4, 5), levels_of=LEVELS)
    rollouts = sample_answers(
        engine,
        tokenizer,
        [problem_at(source, options.seed, i, "held_out") for i in range(options.problems)],
        answers_per_problem=options.answers,
        params=SamplingParams(temperature=options.temperature, max_tokens=options.max_tokens),
        seed=options.seed,
    )
    completions = [r.completion for r in rollouts]
    before_flips = agreement(model, completions, vocab_size=tokenizer.vocab_size)
    replayed = agreement(model, completions, replay=True, vocab_size=tokenizer.vocab_size)
    total, active = count_parameters(model)
    return {
        "checkpoint": "/".join(options.checkpoint.resolve().parts[-3:]),
        "parameters": total,
        "active": active,
        "dtype": dtype,
        "problems": options.problems,
        "answers": options.answers,
        "temperature": options.temperature,
        "tokens": replayed.n_tokens,
        "choices": replayed.n_choices,
        "flip_share": replayed.flip_share,
        "after_a_flip": 1 - before_flips.n_compared / before_flips.n_tokens,
        "free_max": replayed.free_max,
        "free_mean": replayed.free_mean,
        "before_flips_max": before_flips.max,
        "before_flips_mean": before_flips.mean,
        "replayed_max": replayed.max,
        "replayed_mean": replayed.mean,
    }


def main(options: Options) -> None:
    set_threads(options.threads)
    keep_freed_memory()
    results = [measure(dtype, options) for dtype in options.dtypes]
    first = results[0]
    print(
        f"{first['checkpoint']}: {first['parameters'] / 1e6:.2f}M parameters; {options.problems} problems x "
        f"{options.answers} answers; gaps |engine - trainer| of log-probs of drawn tokens"
    )
    print(f"{'dtype':>9} {'replay':>6} {'tokens':>7} {'largest':>9} {'mean':>9}   flips     after a flip")
    for r in results:
        for replay, name in (("off", "free"), ("on", "replayed")):
            print(
                f"{r['dtype']:>9} {replay:>6} {r['tokens']:7d} {r[f'{name}_max']:9.2e} {r[f'{name}_mean']:9.2e}   "
                f"{100 * r['flip_share']:6.3f} %  {100 * r['after_a_flip']:5.1f} %"
            )
        if options.save:
            append_result("mismatch", r)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
