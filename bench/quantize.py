"""What weights in few bits cost and save: python bench/quantize.py DIR [--windows 16] [--threads 1]

For DIR, a Hugging Face directory, a GGUF file or out/<run>/<checkpoint>: perplexity on Python's language reference,
bytes of weights in memory and tokens a second of generation at batch 1, in FP32, BF16, FP8, int8, int4 and int4 scaled
by activations. Few bits are computed with as `abyssal chat --weights` does. Speed is taken of the arms in turn, several
rounds, the median of each; seconds are the process's own, so that a busy machine takes nothing from them but caches.
One line an arm is appended to bench/results/quantize.jsonl; the table is printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import append_result
from tables import quantize_table

from abyssal.checkpoint.activation_aware import ScaledSource, find_scales
from abyssal.checkpoint.export_hf import export_hf
from abyssal.checkpoint.load import Weights, load_checkpoint
from abyssal.checkpoint.source import open_checkpoint
from abyssal.commands.checkpoint_path import resolve_checkpoint
from abyssal.engine.engine import Engine
from abyssal.evals.perplexity import calibration_text, cut_windows, held_out_text, perplexity
from abyssal.machine import keep_freed_memory
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import SamplingParams


class Arm(NamedTuple):
    name: str
    path: Path
    weights: Weights
    dtype: str


def scaled_int4(base: Path, target: Path) -> Path:
    """What `abyssal export --to int4 --activation-aware` writes."""
    loaded = load_checkpoint(base, weights="compute")
    assert loaded.tokenizer is not None
    ids_BT = cut_windows(calibration_text(), loaded.tokenizer, length=512, most=8)
    began = time.process_time()
    scales = find_scales(loaded.model, ids_BT, "int4")
    print(f"scaling channels took {time.process_time() - began:.0f} s", flush=True)
    export_hf(ScaledSource(open_checkpoint(base), scales, "int4"), target, to="int4")
    return target


def tokens_per_s(arm: Arm, tokenizer: Tokenizer, *, n_tokens: int, rounds: int) -> list[float]:
    """Of one answer after a short prompt, the prompt left out: the difference of a long and a short answer."""
    model = load_checkpoint(arm.path, dtype=arm.dtype, weights=arm.weights).model
    engine = Engine(model, eos_ids=[], max_batch=1, record_experts=False)
    prompt = tokenizer.encode("The for statement is used to iterate over")

    def seconds(n: int) -> float:
        began = time.process_time()
        engine.generate([prompt], SamplingParams(max_tokens=n, temperature=0.0))
        return time.process_time() - began

    seconds(4)
    return [n_tokens / (seconds(n_tokens + 4) - seconds(4)) for _ in range(rounds)]


def measured(arm: Arm, windows_WT: torch.Tensor) -> dict[str, Any]:
    model = load_checkpoint(arm.path, dtype=arm.dtype, weights=arm.weights).model
    found = perplexity(model, windows_WT)
    return {
        "arm": arm.name,
        "computes_in": str(model.dtype).removeprefix("torch."),
        "perplexity": round(found.perplexity, 4),
        "weight_bytes": sum(tensor.nbytes for tensor in model.state_dict().values()),
        "n_tokens": found.n_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=24, help="of the answer whose speed is taken")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="by name, such as int4 'int4, scaled'; all of them")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    base = resolve_checkpoint(options.checkpoint)
    source = open_checkpoint(base)
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise ValueError(f"{options.checkpoint} has no tokenizer.json: copy the model's tokenizer files into it")
    length = min(options.window, source.config.max_position_embeddings)
    windows_WT = cut_windows(held_out_text(), tokenizer, length=length, most=options.windows)
    with tempfile.TemporaryDirectory() as work:
        scaled = scaled_int4(base, Path(work) / "int4")
        arms = [
            Arm("FP32", base, "compute", "float32"),
            Arm("BF16", base, "compute", "bfloat16"),
            Arm("FP8", base, "fp8", "auto"),
            Arm("int8", base, "int8", "auto"),
            Arm("int4", base, "int4", "auto"),
            Arm("int4, scaled", scaled, "int4", "auto"),
        ]
        if options.arms:
            if unknown := set(options.arms) - {arm.name for arm in arms}:
                parser.error(f"no arm {sorted(unknown)[0]!r}; there are {[arm.name for arm in arms]}")
            arms = [arm for arm in arms if arm.name in options.arms]
        speeds: dict[str, list[float]] = {arm.name: [] for arm in arms}
        for _ in range(options.rounds):
            for arm in arms:
                speeds[arm.name] += tokens_per_s(arm, tokenizer, n_tokens=options.tokens, rounds=1)
        for arm in arms:
            speed = speeds[arm.name]
            rates = {"tokens_per_s": round(statistics.median(speed), 2), "of_rounds": [round(s, 2) for s in speed]}
            append_result("quantize", {"checkpoint": options.checkpoint.name, **measured(arm, windows_WT), **rates})
    print("\n".join(quantize_table()))


if __name__ == "__main__":
    main()
