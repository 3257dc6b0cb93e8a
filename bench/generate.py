"""Generation speed beside transformers' DeepseekV3ForCausalLM: greedy answers of fixed length, one prompt and sixteen.

    python bench/generate.py [--sizes 3M 11M 63M] [--batches 1 16] [--pairs 5] [--dtype bfloat16] [--threads 2]

The same weights, prompts, dtype and threads. Ours is the engine that rollouts, evaluation and chat use, with its paged
latent cache. Theirs is `generate` with the fastest of its expert kernels, attention forms and caches, tried first.
Figures are new tokens per second, prompt included in the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import tyro
from common import (
    DTYPES,
    Size,
    append_result,
    fastest,
    logits_differ_by,
    make_ours,
    make_theirs,
    model_config,
    parameters,
    time_pairs,
)
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from abyssal.engine.engine import Engine
from abyssal.machine import keep_freed_memory, set_threads
from abyssal.model.transformer import Transformer
from abyssal.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Options:
    sizes: tuple[Size, ...] = get_args(Size)
    batches: tuple[int, ...] = (1, 16)
    prompt_len: int = 32
    new_tokens: int = 128
    pairs: int = 5
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    threads: int = 2
    save: bool = True  # append the results to results/generate.jsonl


def our_answers(model: Transformer, ids_BT: Tensor, options: Options) -> Callable[[], list[list[int]]]:
    """No end token, so that every answer has the full length. Built once: a server keeps its engine."""
    engine = Engine(model, eos_ids=(), max_batch=len(ids_BT), record_experts=False)
    prompts = ids_BT.tolist()
    params = SamplingParams(temperature=0.0, max_tokens=options.new_tokens)
    return lambda: [completion.ids for completion in engine.generate(prompts, params)]


def their_answers(
    model: DeepseekV3ForCausalLM, ids_BT: Tensor, options: Options, *, cache: str
) -> Callable[[], list[list[int]]]:
    model.eval()
    length = options.prompt_len + options.new_tokens

    def answers() -> list[list[int]]:
        out = model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            do_sample=False,
            max_length=length,
            min_length=length,
            cache_implementation=cache,
            pad_token_id=0,
            # their static cache would compile the model: minutes of warm-up that no comparison at this size repays
            disable_compile=True,
        )
        return out[:, options.prompt_len :].tolist()

    return answers


def measure(size: Size, batch: int, options: Options) -> dict[str, object]:
    config, dtype = model_config(size), DTYPES[options.dtype]
    total, active = parameters(config)
    shape = (batch, options.prompt_len)
    ids_BT = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    print(f"{size}, batch {batch}: {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active")

    ours = make_ours(config, dtype=dtype)
    candidates = {}
    for experts in ("grouped_mm", "batched_mm", "eager"):
        for attention in ("sdpa", "eager"):
            model = make_theirs(ours, dtype=dtype, experts=experts, attention=attention)
            candidates[f"{experts}+{attention}"] = their_answers(model, ids_BT, options, cache="dynamic")
    best = fastest(candidates, repeats=1)
    experts, attention = best.split("+")
    candidates.clear()
    theirs = make_theirs(ours, dtype=dtype, experts=experts, attention=attention)
    for cache in ("dynamic", "static"):
        candidates[cache] = their_answers(theirs, ids_BT, options, cache=cache)
    cache = fastest(candidates, repeats=1)

    our_work, their_work = our_answers(ours, ids_BT, options), candidates[cache]
    same = [
        a == b for one, other in zip(our_work(), their_work(), strict=True) for a, b in zip(one, other, strict=True)
    ]
    paired = time_pairs(our_work, their_work, n_pairs=options.pairs, n_tokens=batch * options.new_tokens)
    return {
        "size": size,
        "batch": batch,
        "parameters": total,
        "active": active,
        "dtype": options.dtype,
        "prompt_len": options.prompt_len,
        "new_tokens": options.new_tokens,
        "pairs": options.pairs,
        "theirs_setting": f"{best}+{cache}",
        "logits_differ_by": logits_differ_by(ours, theirs, ids_BT),
        "same_tokens": sum(same)
        / len(same),  # greedy on random weights: one rounding apart, and all that follows differs
        "ours_tokens_per_s": paired.ours,
        "theirs_tokens_per_s": paired.theirs,
        "ratio": paired.ratio,
        "ratio_min": paired.spread[0],
        "ratio_max": paired.spread[1],
    }


def main(options: Options) -> None:
    set_threads(options.threads)
    keep_freed_memory()  # as our commands do; it helps both sides, which share this process
    results = [measure(size, batch, options) for size in options.sizes for batch in options.batches]
    print(
        f"\ngeneration, {options.prompt_len} + {options.new_tokens} tokens, {options.dtype}, "
        f"{options.threads} threads: tokens/s"
    )
    print(f"{'size':>6} {'batch':>5} {'ours':>8} {'theirs':>8} {'ratio':>6}   range        theirs' setting")
    for r in results:
        print(
            f"{r['size']:>6} {r['batch']:>5} {max(r['ours_tokens_per_s']):8.0f} {max(r['theirs_tokens_per_s']):8.0f} "
            f"{r['ratio']:6.2f}   {r['ratio_min']:.2f}..{r['ratio_max']:.2f}   {r['theirs_setting']}"
        )
        if options.save:
            append_result("generate", r)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
