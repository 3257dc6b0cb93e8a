"""Training speed beside transformers' DeepseekV3ForCausalLM: forward, backward and AdamW on 16 rows of 256 tokens.

    python bench/train_step.py [--sizes 3M 11M 63M] [--pairs 5] [--dtype bfloat16] [--threads 2]

Both predict the next token with mean cross entropy, from the same weights on the same batch; MTP is off, since
transformers has none. Theirs runs in its fastest setting (expert kernels, attention and optimizer form are tried
first), with weights and moments in `dtype`, as it is used; ours is our way: FP32 masters and moments, compute in
`dtype`.
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

from abyssal.loss.cross_entropy import cross_entropy, next_token_targets
from abyssal.machine import keep_freed_memory, set_threads
from abyssal.model.transformer import Transformer
from abyssal.optim.adamw import AdamW

ROWS, ROW_LEN = 16, 256
LR, BETAS, WEIGHT_DECAY = 1e-4, (0.9, 0.95), 0.1


@dataclass(frozen=True, kw_only=True)
class Options:
    sizes: tuple[Size, ...] = get_args(Size)
    pairs: int = 5
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    threads: int = 2
    save: bool = True  # append the results to results/train_step.jsonl


def our_step(model: Transformer, ids_BT: Tensor) -> Callable[[], float]:
    optimizer = AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    targets_N = next_token_targets(ids_BT, torch.ones_like(ids_BT), None).flatten()

    def step() -> float:
        loss = cross_entropy(model.logits(model.hidden(ids_BT)).flatten(0, 1), targets_N)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def their_step(model: DeepseekV3ForCausalLM, ids_BT: Tensor, *, fused: bool) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=fused)
    model.train()

    def step() -> float:
        loss = model(ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(size: Size, options: Options) -> dict[str, object]:
    config, dtype = model_config(size), DTYPES[options.dtype]
    total, active = parameters(config)
    ids_BT = torch.randint(config.vocab_size, (ROWS, ROW_LEN), generator=torch.Generator().manual_seed(1))
    print(f"{size}: {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active")
    candidates = {}
    for experts in ("grouped_mm", "eager"):  # batched_mm copies weights for every token: 17 times slower at 3M
        for attention in ("sdpa", "eager"):
            theirs = make_theirs(make_ours(config, dtype=dtype), dtype=dtype, experts=experts, attention=attention)
            candidates[f"{experts}+{attention}"] = their_step(theirs, ids_BT, fused=True)
    best = fastest(candidates)
    experts, attention = best.split("+")
    candidates.clear()
    for fused in (True, False):
        theirs = make_theirs(make_ours(config, dtype=dtype), dtype=dtype, experts=experts, attention=attention)
        candidates["fused" if fused else "foreach"] = their_step(theirs, ids_BT, fused=fused)
    optimizer = fastest(candidates)
    candidates.clear()

    ours = make_ours(config, dtype=dtype)
    theirs = make_theirs(ours, dtype=dtype, experts=experts, attention=attention)
    difference = logits_differ_by(ours, theirs, ids_BT[:2])
    paired = time_pairs(
        our_step(ours, ids_BT),
        their_step(theirs, ids_BT, fused=optimizer == "fused"),
        n_pairs=options.pairs,
        n_tokens=ROWS * ROW_LEN,
    )
    return {
        "size": size,
        "parameters": total,
        "active": active,
        "dtype": options.dtype,
        "rows": ROWS,
        "row_len": ROW_LEN,
        "pairs": options.pairs,
        "theirs_setting": f"{best}+{optimizer}",
        "logits_differ_by": difference,
        "ours_tokens_per_s": paired.ours,
        "theirs_tokens_per_s": paired.theirs,
        "ratio": paired.ratio,
        "ratio_min": paired.spread[0],
        "ratio_max": paired.spread[1],
    }


def main(options: Options) -> None:
    set_threads(options.threads)
    keep_freed_memory()  # as our commands do; it helps both sides, which share this process
    results = [measure(size, options) for size in options.sizes]
    print(f"\ntraining, {ROWS} x {ROW_LEN}, {options.dtype}, {options.threads} threads: tokens/s")
    print(f"{'size':>6} {'ours':>8} {'theirs':>8} {'ratio':>6}   range        theirs' setting")
    for r in results:
        print(
            f"{r['size']:>6} {max(r['ours_tokens_per_s']):8.0f} {max(r['theirs_tokens_per_s']):8.0f} {r['ratio']:6.2f}"
            f"   {r['ratio_min']:.2f}..{r['ratio_max']:.2f}   {r['theirs_setting']}"
        )
        if options.save:
            append_result("train_step", r)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
