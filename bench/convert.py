"""What conversions of SmolLM2-135M cost, and what healing gives back: python bench/convert.py [--base DIR] [CASE ...]

Cases (all of them without a name): exact, mla, moe, both. Prints the tables of `abyssal convert` and appends their rows
to bench/results/convert.jsonl; `exact` also compares logits and 64 greedy tokens with the original's. The base is
SmolLM2-135M-Instruct as bench/foreign_base.py makes it, or any Llama-shaped directory. Calibrated and healed on this
Python installation's source and documentation strings, measured on its language reference, one thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from common import append_result
from foreign_base import smollm2
from rich.console import Console

from abyssal.checkpoint.load import load_checkpoint
from abyssal.commands.convert_shape import ConvertOptions, Row, conversions, print_table
from abyssal.engine import Engine
from abyssal.evals.perplexity import cut_windows, held_out_text
from abyssal.machine import keep_freed_memory
from abyssal.surgery.mla_from_gqa import exact_config, mla_from_gqa
from abyssal.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Options:
    cases: tyro.conf.Positional[tuple[str, ...]] = ("exact", "mla", "moe", "both")
    base: Path | None = None
    work: Path = Path("out/foreign_base")
    heal: bool = True
    save: bool = True  # append the rows to results/convert.jsonl


def cases(base: Path) -> dict[str, list[ConvertOptions]]:
    """Healing of 256 tokens a step: one core without BF16 units trains some 50 tokens a second of such a model."""
    common = ConvertOptions(directory=base, to="mla", windows=8, row_len=512, heal_rows=1, dtype="float32")
    heal_some = {"row_len": 256, "windows": 16}
    split = {"experts": 6, "shared": 2}
    return {
        "exact": [common],
        "mla": [
            replace(common, latent="320,256,192,96"),
            replace(common, latent="128,64", heal_steps="20,60", **heal_some),
        ],
        "moe": [
            replace(common, to="moe", **split, active=6),
            replace(common, to="moe", experts=12, shared=4, active=6),
            replace(common, to="moe", **split, active=3, heal_steps="20,60", **heal_some),
        ],
        "both": [replace(common, to="mla,moe", latent="128", **split, active=3)],
    }


def kept(rows: Iterator[Row], into: list[Row]) -> Iterator[Row]:
    for row in rows:
        into.append(row)
        yield row


@torch.inference_mode()
def difference(base: Path) -> dict[str, Any]:
    """Largest difference of logits in FP32 over four windows, and whether 64 greedy tokens are the same."""
    model, tokenizer, config = load_checkpoint(base)
    assert tokenizer is not None
    converted = mla_from_gqa(model, exact_config(config))
    windows_WT = cut_windows(held_out_text(), tokenizer, length=512, most=4)
    a, b = (torch.cat([m.logits(m.hidden(ids_T[None])) for ids_T in windows_WT]) for m in (model, converted))
    prompts = windows_WT[:, :32].tolist()
    greedy = SamplingParams(temperature=0.0, max_tokens=64)
    texts = [[c.ids for c in Engine(m, eos_ids=[]).generate(prompts, greedy)] for m in (model, converted)]
    return {
        "largest_logit": float(a.abs().max()),
        "largest_difference": float((a - b).abs().max()),
        "tokens": windows_WT.numel(),
        "greedy_equal": texts[0] == texts[1],
    }


def main(options: Options) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    base = options.base or smollm2(options.work)
    known = cases(base)
    if unknown := set(options.cases) - known.keys():
        raise SystemExit(f"no case {sorted(unknown)[0]!r}; there are {', '.join(known)}")
    for name in options.cases:
        for asked in known[name]:
            asked = asked if options.heal else replace(asked, heal_steps="")
            rows: list[Row] = []
            began = time.process_time()
            print_table(kept(conversions(asked, Console(quiet=True)), rows))
            result: dict[str, Any] = {
                "case": name,
                "base": base.name,
                "row_len": asked.row_len,
                "windows": asked.windows,
                "calibration_tokens": asked.calibration_tokens,
                "heal_rows": asked.heal_rows,
                "heal_lr": asked.heal_lr,
                "cpu_s": round(time.process_time() - began),
                "rows": [row._asdict() for row in rows],
            }
            if name == "exact":
                result |= difference(base)
                print({key: result[key] for key in ("largest_logit", "largest_difference", "tokens", "greedy_equal")})
            if options.save:
                append_result("convert", result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
