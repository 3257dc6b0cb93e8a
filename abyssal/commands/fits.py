"""Before a checkpoint is loaded: would it fit into the memory of the device that it is loaded to?"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from abyssal.checkpoint.load import FORMATS, Weights, load_config
from abyssal.machine import Precision, compute_dtype, resolve_device
from abyssal.plan.in_words import bytes_text
from abyssal.plan.loaded_weights import loaded_bytes
from abyssal.plan.refuse import refuse_beyond
from abyssal.stages.machine_here import device_limit


def check_loadable(
    path: Path, *, weights: Weights, dtype: Precision | torch.dtype | None, device: str = "auto", refuse: bool = True
) -> None:
    """A ValueError in one line where the weights alone cannot fit; a word on stderr where they are not free now."""
    if not refuse:
        return
    target = resolve_device(device)
    if isinstance(dtype, torch.dtype):
        computes_in = dtype
    else:
        computes_in = compute_dtype(dtype or ("auto" if weights in FORMATS else "float32"), target)
    config, limit = load_config(path), device_limit(target)
    parts = loaded_bytes(config, weights, compute_bytes=computes_in.itemsize)
    in_few_bits = sum(loaded_bytes(config, "int4", compute_bytes=2).values())
    change = "take a smaller model or more memory: `abyssal plan` says what a machine can serve"
    if weights not in ("int4", "master") and in_few_bits <= limit.limit_bytes:
        change = f"keep them in fewer bits, {bytes_text(in_few_bits)} with --weights int4"
    warning = refuse_beyond(
        limit, sum(parts.values()), what=str(path), parts=parts, change=change, override="--no-refuse"
    )
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
