"""How served weights lie in memory: bytes of one, scales included, and what their products are computed in."""

from __future__ import annotations

from dataclasses import dataclass

from abyssal.plan.machine_file import Precision


@dataclass(frozen=True, kw_only=True)
class WeightForm:
    name: str
    bytes_per_weight: float  # of the whole file over its parameters: scales, and tensors kept wider, are in it
    computes_in: Precision
    source: str


WEIGHT_FORMS: dict[str, WeightForm] = {
    form.name: form
    for form in (
        WeightForm(name="float32", bytes_per_weight=4.0, computes_in="float32", source="by definition"),
        WeightForm(name="bfloat16", bytes_per_weight=2.0, computes_in="bfloat16", source="by definition"),
        WeightForm(
            name="fp8",
            bytes_per_weight=1.0 + 4 / 128**2,
            computes_in="fp8",
            source="DeepSeek-V3 section 3.3.2: one FP32 scale for 128 x 128 weights; embedding and head apart, in BF16",
        ),
        WeightForm(
            name="q8_0",
            bytes_per_weight=34 / 32,
            computes_in="bfloat16",
            source="llama.cpp's block_q8_0: 32 weights of 8 bits and one FP16 scale",
        ),
        WeightForm(
            name="q4_k_m",
            bytes_per_weight=4.82 / 8,
            computes_in="bfloat16",
            source="unsloth/DeepSeek-V3-GGUF's model card: Q4_K_M in 377 GB, which are GiB",
        ),
        WeightForm(
            name="q2_k",
            bytes_per_weight=2.92 / 8,
            computes_in="bfloat16",
            source="unsloth/DeepSeek-V3-GGUF's model card: Q2_K_L in 228 GB, which are GiB",
        ),
    )
}


def weight_form(name: str) -> WeightForm:
    if name not in WEIGHT_FORMS:
        raise ValueError(f"weights={name!r} is no form that weights are served in; use {', '.join(WEIGHT_FORMS)}")
    return WEIGHT_FORMS[name]
