"""Bytes that a served model's weights take on one device, by what they are used for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

from abyssal.model.config import ModelConfig
from abyssal.plan.parameters import weights
from abyssal.plan.weight_forms import WeightForm


@dataclass(frozen=True, kw_only=True)
class ServedWeights:
    """Of one device; the parts add up."""

    experts_bytes: float  # routed ones
    other_bytes: float  # attention, dense feed-forward, shared experts, routers, norms
    vocabulary_bytes: float  # embedding and head
    drafts_bytes: float  # MTP modules, which share embedding and head

    @property
    def total_bytes(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


def served_weights(
    config: ModelConfig, *, form: WeightForm, tp: int = 1, ep: int = 1, experts: int = 0, with_drafts: bool = False
) -> ServedWeights:
    """`experts`: physical ones of a layer, copies included, shared out among ep; 0: as the config has."""
    share = {True: (experts or config.n_routed_experts or 1) / (config.n_routed_experts or 1) / ep, False: 1 / tp}
    counted = dict.fromkeys(("experts", "other", "vocabulary", "drafts"), 0.0)
    for (kind, is_routed), n in _counted(config).items():
        counted[kind] += n * share[is_routed]
    each = form.bytes_per_weight
    wide = max(each, 2.0) if form.computes_in == "fp8" else each  # FP8 leaves embedding and head in BF16
    return ServedWeights(
        experts_bytes=each * counted["experts"],
        other_bytes=each * counted["other"],
        vocabulary_bytes=wide * counted["vocabulary"],
        drafts_bytes=each * counted["drafts"] if with_drafts else 0.0,
    )


@cache
def _counted(config: ModelConfig) -> dict[tuple[str, bool], int]:
    """Weights by use, and whether expert ranks share them out. A search asks for the same model thousands of times."""
    counted: dict[tuple[str, bool], int] = {}
    for weight in weights(config):
        kind = "experts" if weight.is_routed else "other"
        if weight.part in ("embedding", "head"):
            kind = "vocabulary"
        elif weight.part == "mtp":
            kind = "drafts"
        counted[kind, weight.is_routed] = counted.get((kind, weight.is_routed), 0) + weight.n
    return counted
