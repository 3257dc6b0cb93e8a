"""What drafts bring on trained checkpoints: acceptance by position and speed beside the same engine without them.

    python bench/speculation.py out/laptop/align/checkpoint --prompts out/laptop/align/samples.jsonl
    python bench/speculation.py smollm2 --temperatures 0 --new-tokens 64

Drafts are MTP's where the checkpoint has modules, else prompt look-up's. Every answer is compared with the one drawn
without drafts: ids and log-probs. Figures are new tokens per second, prompts included; the ratio is the median of pairs
(with, without, with, without ..) in one process. An engine is kept for all pairs, as a server keeps its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from common import append_result, time_pairs

from abyssal.engine.engine import Engine
from abyssal.lm import LM, load
from abyssal.machine import keep_freed_memory, set_threads
from abyssal.tokens.chat import render
from abyssal.types import Completion, Message, SamplingParams

TEXTS = (
    "Repeat this list in reverse order: apple, pear, plum, cherry, fig, grape.",
    "Write a Python function that returns the n-th Fibonacci number, and explain each line.",
    "Fix the spelling and give the whole text back: The qick brown fox jumpd over the lazy dog and ran to the forrest.",
    "What is the capital of France, and what is it known for?",
    "Summarise in one sentence: Speculative decoding guesses several tokens and checks them in one pass of the model.",
    "Give me a recipe for pancakes with exact amounts.",
    "Translate into French: I would like a cup of tea, please.",
    "List the planets of the solar system with one fact about each.",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    checkpoints: tyro.conf.Positional[tuple[str, ...]]
    prompts: Path | None = None  # JSON lines with a "problem" or "prompt" each; without it a few texts
    streams: tuple[int, ...] = (1, 16)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    speculate: tuple[str, ...] = ("auto", "1", "2", "4")
    new_tokens: int = 128
    pairs: int = 5
    dtype: Literal["bfloat16", "float32"] = "float32"
    threads: int = 2
    native: bool = True
    save: bool = True  # append the results to results/speculation.jsonl


def prompts(lm: LM, options: Options, n: int) -> list[list[int]]:
    texts = list(TEXTS)
    if options.prompts is not None:
        lines = [json.loads(line) for line in options.prompts.read_text(encoding="utf-8").splitlines()]
        texts = [line.get("problem") or line["prompt"] for line in lines]
    asked = [[Message(role="user", content=texts[i % len(texts)])] for i in range(n)]
    return [render(conversation, lm.tokenizer, add_generation_prompt=True).ids for conversation in asked]


def engine(lm: LM, options: Options, n: int, speculate: str) -> Engine:
    return Engine(
        lm.model,
        eos_ids=sorted(lm.tokenizer.end_ids),
        vocab_size=lm.tokenizer.vocab_size,
        max_batch=n,
        record_experts=False,
        native=None if options.native else False,
        speculate=int(speculate) if speculate.isdigit() else "auto" if speculate == "auto" else "off",
    )


def gap(one: list[Completion], other: list[Completion]) -> tuple[int, float]:
    """Answers with other ids, and the largest difference of log-probs in the rest."""
    pairs = list(zip(one, other, strict=True))
    same = [(a, b) for a, b in pairs if a.ids == b.ids]
    differences = [abs(x - y) for a, b in same for x, y in zip(a.logps, b.logps, strict=True)]
    return len(pairs) - len(same), max(differences, default=0.0)


def measure(name: str, lm: LM, options: Options, *, n: int, temperature: float, speculate: str) -> dict[str, object]:
    ids = prompts(lm, options, n)
    params = SamplingParams(temperature=temperature, max_tokens=options.new_tokens)
    each = [replace(params, seed=i) for i in range(n)]
    without, drafting = engine(lm, options, n, "off"), engine(lm, options, n, speculate)
    plain, drafted = without.generate(ids, each), drafting.generate(ids, each)
    others, difference = gap(plain, drafted)
    paired = time_pairs(
        lambda: drafting.generate(ids, each),
        lambda: without.generate(ids, each),
        n_pairs=options.pairs,
        n_tokens=sum(len(c.ids) for c in plain),
    )
    stats = drafting.draft_stats
    assert stats is not None
    return {
        "checkpoint": name,
        "drafter": stats.drafter,
        "numerics": drafting._runner.numerics,
        "dtype": options.dtype,
        "streams": n,
        "temperature": temperature,
        "speculate": speculate,
        "new_tokens": options.new_tokens,
        "tokens": sum(len(c.ids) for c in plain),
        "pairs": options.pairs,
        "answers_with_other_ids": others,
        "logps_differ_by": difference,
        "acceptance": [round(share, 3) for share in stats.acceptance],
        "tokens_per_step": round(stats.tokens_per_step, 3),
        "k_at_the_end": stats.k,
        "own_speed_up": stats.speed_up,
        "with_tokens_per_s": paired.ours,
        "without_tokens_per_s": paired.theirs,
        "ratio": paired.ratio,
        "ratio_min": paired.spread[0],
        "ratio_max": paired.spread[1],
    }


def main(options: Options) -> None:
    set_threads(options.threads)
    keep_freed_memory()
    for name in options.checkpoints:
        lm = load(name, dtype=options.dtype)
        parameters = sum(p.numel() for p in lm.model.parameters())
        print(f"{name}: {parameters / 1e6:.1f}M parameters, {options.dtype}, {torch.get_num_threads()} threads")
        print("streams temp     k    with without  ratio   range        ids/step  acceptance")
        for n in options.streams:
            for temperature in options.temperatures:
                for speculate in options.speculate:
                    r = measure(name, lm, options, n=n, temperature=temperature, speculate=speculate)
                    print(
                        f"{n:7} {temperature:4} {speculate:>5} {max(r['with_tokens_per_s']):7.0f} "
                        f"{max(r['without_tokens_per_s']):7.0f} {r['ratio']:6.2f}   "
                        f"{r['ratio_min']:.2f}..{r['ratio_max']:.2f}   {r['tokens_per_step']:8.2f}  {r['acceptance']}"
                        f"{'  OTHER IDS' if r['answers_with_other_ids'] else ''}",
                        flush=True,
                    )
                    if options.save:
                        append_result("speculation", r)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
