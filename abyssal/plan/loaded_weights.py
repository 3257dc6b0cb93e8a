"""Bytes that a checkpoint's weights take once they are loaded, by its config alone: before a file of it is opened.

Owns the counting for a refusal, so nothing is rounded up: scales of few bits are counted, what the loader and the
engine take beside the weights is not. `abyssal import --check` counts a checkpoint's own tensors exactly.
"""

from __future__ import annotations

from abyssal.model.config import ModelConfig
from abyssal.plan.parameters import weights

# bytes of one weight in a matrix that is kept in few bits: codes, and scales for groups of 128 (kernels/quantize.py)
FEW_BITS = {"fp8": 1 + 4 / 128**2, "int8": 1 + 2 / 128, "int4": 0.5 + 2 / 128}
FP32 = ("norms", "router")  # parts that are FP32 however the rest is kept (docs/numerics.md)
TABLES = ("embedding", "head")  # that few bits leave alone


def loaded_bytes(config: ModelConfig, kept: str, *, compute_bytes: int) -> dict[str, float]:
    """By part. `kept`: "master" are FP32, "compute" the type of products, of `compute_bytes` each, or few bits."""
    whole = 4 if kept == "master" else compute_bytes
    taken: dict[str, float] = {}
    for weight in weights(config):
        each = 4 if weight.part in FP32 else whole if weight.part in TABLES else FEW_BITS.get(kept, whole)
        taken[weight.part] = taken.get(weight.part, 0.0) + each * weight.n
    return taken
