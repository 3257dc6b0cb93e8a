"""Does an answer depend on what else the engine does? The default mode's gap, and that invariant mode has none.

    python bench/invariance.py RUN/r1/checkpoint [--requests 33] [--max-tokens 64] [--threads 2]

Held-out problems of the generators behind system prompts of various lengths, half of them drawn and half greedy. Every
request is answered alone in an empty cache; then together with all others, alone again after all were left in the
cache, alone with its prompt in small chunks, and together in a cache so small that some are preempted. `same` is the
share of requests with the same tokens, `bitwise` that with the same log-probs too, `gap` the largest difference of
log-probs up to the first other token. Speeds are new tokens per second of all requests at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from common import append_result, time_pairs

from abyssal.checkpoint.load import load_checkpoint
from abyssal.data.problems import ProblemSource, problem_at
from abyssal.engine.blocks import blocks_for
from abyssal.engine.engine import Engine
from abyssal.engine.sampler import derive_seed
from abyssal.machine import keep_freed_memory, set_threads
from abyssal.model.transformer import Transformer, count_parameters
from abyssal.tokens.chat import render
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Completion, Message, SamplingParams

Precision = Literal["float32", "bfloat16"]
BLOCK = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    checkpoint: tyro.conf.Positional[Path]
    requests: int = 33
    max_tokens: int = 64
    chunk: int = 7  # prompt tokens a step, where prompts come in chunks
    dtypes: tuple[Precision, ...] = ("float32", "bfloat16")
    pairs: int = 3  # of timed runs
    seed: int = 0
    threads: int = 2
    save: bool = True  # append the results to results/invariance.jsonl


@dataclass(frozen=True, kw_only=True)
class Requests:
    prompts: list[list[int]]
    params: list[SamplingParams]

    def together(self, engine: Engine) -> list[Completion]:
        return engine.generate(self.prompts, self.params)

    def alone(self, engine: Engine) -> list[Completion]:
        return [engine.generate([p], [own])[0] for p, own in zip(self.prompts, self.params, strict=True)]


def requests_for(tokenizer: Tokenizer, options: Options, context: int) -> Requests:
    """Prompts that leave room for an answer; a longer system prompt begins as the shorter ones do."""
    source = ProblemSource(levels=(4, 5))
    prompts = []
    for i in range(options.requests):
        problem = problem_at(source, options.seed, i, "held_out")
        rules = " ".join(f"Rule {k}: say only what is asked." for k in range(i % 12))
        messages = [Message(role="system", content=rules)] * (i % 12 > 0)
        messages.append(Message(role="user", content=problem.prompt))
        ids = render(messages, tokenizer, add_generation_prompt=True).ids
        prompts.append(ids[-max(1, context - options.max_tokens) :])
    params = [
        SamplingParams(temperature=float(i % 2), max_tokens=options.max_tokens, seed=derive_seed(options.seed, i))
        for i in range(options.requests)
    ]
    return Requests(prompts=prompts, params=params)


def compared(one: list[Completion], other: list[Completion]) -> dict[str, float]:
    n_same = n_bitwise = 0
    gap = 0.0
    for a, b in zip(one, other, strict=True):
        n_same += a.ids == b.ids
        n_bitwise += a.ids == b.ids and a.logps == b.logps
        first_other = next((i for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y), len(a.ids))
        gap = max([gap, *(abs(x - y) for x, y in zip(a.logps[:first_other], b.logps[:first_other], strict=False))])
    return {"same": n_same / len(one), "bitwise": n_bitwise / len(one), "gap": gap}


def situations(engine: Callable[..., Engine], requests: Requests, options: Options) -> dict[str, list[Completion]]:
    longest = max(map(len, requests.prompts)) + options.max_tokens
    cached = engine(prefix_cache=True)
    requests.together(cached)
    return {
        "among the others": requests.together(engine()),
        "after a cache hit": requests.alone(cached),
        "prompt in chunks": requests.alone(engine(prefill_chunk=options.chunk)),
        "preempted": requests.together(engine(n_blocks=2 * blocks_for(longest, BLOCK))),
    }


def measure(dtype: Precision, options: Options) -> dict[str, Any]:
    loaded = load_checkpoint(options.checkpoint, dtype=dtype)
    model, tokenizer = loaded.model, loaded.tokenizer
    if tokenizer is None:
        raise FileNotFoundError(f"{options.checkpoint} has no tokenizer.json: give a checkpoint of a run")
    requests = requests_for(tokenizer, options, model.config.max_position_embeddings)
    modes: dict[str, dict[str, dict[str, float]]] = {}
    for mode in ("default", "invariant"):
        engine = engine_of(model, tokenizer, options, invariant=mode == "invariant")
        alone = requests.alone(engine())
        modes[mode] = {name: compared(alone, found) for name, found in situations(engine, requests, options).items()}
    slow, fast = (engine_of(model, tokenizer, options, invariant=invariant)() for invariant in (True, False))
    n_tokens = {id(e): sum(len(c.ids) for c in requests.together(e)) for e in (slow, fast)}
    paired = time_pairs(
        lambda: requests.together(slow), lambda: requests.together(fast), n_pairs=options.pairs, n_tokens=1
    )
    total, active = count_parameters(model)
    scale = n_tokens[id(slow)] / n_tokens[id(fast)]  # an answer that differs may be longer
    return {
        "checkpoint": "/".join(options.checkpoint.resolve().parts[-3:]),
        "parameters": total,
        "active": active,
        "attention": model.config.attention,
        "feed_forward": model.config.feed_forward,
        "dtype": dtype,
        "requests": options.requests,
        "max_tokens": options.max_tokens,
        "prompt_tokens": [min(map(len, requests.prompts)), max(map(len, requests.prompts))],
        "modes": modes,
        "invariant_tokens_per_s": [runs * n_tokens[id(slow)] for runs in paired.ours],
        "default_tokens_per_s": [runs * n_tokens[id(fast)] for runs in paired.theirs],
        "ratio": paired.ratio * scale,
    }


def engine_of(model: Transformer, tokenizer: Tokenizer, options: Options, *, invariant: bool) -> Callable[..., Engine]:
    def make(**settings: Any) -> Engine:
        return Engine(
            model,
            eos_ids=[tokenizer.eos_id],
            vocab_size=tokenizer.vocab_size,
            max_batch=options.requests,
            block_size=BLOCK,
            record_experts=False,
            invariant=invariant,
            **settings,
        )

    return make


def main(options: Options) -> None:
    set_threads(options.threads)
    keep_freed_memory()
    results = [measure(dtype, options) for dtype in options.dtypes]
    print(f"{options.requests} requests of {options.max_tokens} tokens at most, each against itself alone")
    print(f"{'':10} {'mode':10} {'situation':18} {'same':>6} {'bitwise':>8} {'gap':>9}")
    for r in results:
        for mode, found in r["modes"].items():
            for name, row in found.items():
                print(f"{r['dtype']:10} {mode:10} {name:18} {row['same']:6.0%} {row['bitwise']:8.0%} {row['gap']:9.1e}")
        fast, slow = max(r["default_tokens_per_s"]), max(r["invariant_tokens_per_s"])
        print(f"{r['dtype']:10} invariant / default: {r['ratio']:.2f} ({slow:.0f} and {fast:.0f} tokens/s)")
        if options.save:
            append_result("invariance", r)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
