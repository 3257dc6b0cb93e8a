"""What a request to a tiny model must give, by the textbook: one plain sequence, no cache, everything computed anew for
each id, penalties and draws written out in double precision.

Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from small_models import small_model

from abyssal.engine import Engine
from abyssal.engine.sampler import COLDEST, uniform_ref
from abyssal.model.transformer import Transformer
from abyssal.types import Completion, SamplingParams

CONTEXT, N_VOCAB, EOS = 32, 23, 5
TINY: dict[str, Any] = {
    "vocab_size": N_VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": CONTEXT, "initializer_range": 0.3,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mla_moe": {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
                "n_routed_experts": 4, "moe_intermediate_size": 8, "first_k_dense_replace": 0,
                "num_nextn_predict_layers": 1},
    "gqa_dense": {"num_key_value_heads": 1},
}  # fmt: skip
BASE = [3, 11, 7, 7, 19, 2, 14, 9, 1, 20, 16, 4]
PROMPTS = [*(BASE[:n] for n in (4, 8, 9, 12)), [*BASE[:6], 0, 8], [*BASE[:4], 21], [8], [12] * 7]
WAYS = [
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(temperature=0.7, top_p=0.8),
    SamplingParams(temperature=1.4, top_k=4, min_p=0.02),
    SamplingParams(repetition_penalty=1.4, presence_penalty=0.5, logit_bias={EOS: -2.0, 7: 1.5}),
    SamplingParams(temperature=0.0, frequency_penalty=0.9),
]
FIRST, FORBIDDEN, N_HEALTHY = 6, 3, 2
MOST = 6  # tokens of an answer
ROUNDING = 2e-5  # of a probability: FP32 sums in another order differ by a tenth of it


class Steered:
    """Says the id FIRST first, and at each later place leaves one id in three out. A sick one raises when it is told of
    its third."""

    def __init__(self, *, is_sick: bool) -> None:
        self.n_drawn, self.is_sick = 0, is_sick

    def forced(self) -> list[int]:
        return [FIRST] if not self.n_drawn else []

    def mask(self, allowed_V: np.ndarray) -> bool:
        allowed_V[:] = allowed(self.n_drawn)
        return True

    def drawn(self, token: int) -> None:
        self.n_drawn += 1
        if self.is_sick and self.n_drawn > N_HEALTHY:
            raise RuntimeError("a sick control")


def control_of(steer: str) -> Steered | None:
    return None if steer == "free" else Steered(is_sick=steer == "sick")


def allowed(n_drawn: int) -> np.ndarray:
    return np.arange(N_VOCAB) % FORBIDDEN != n_drawn % FORBIDDEN


@dataclass
class Asked:
    """One request as the test knows it. `versions[i]` are the weights that drew id i, as far as they have been seen."""

    prompt: list[int]
    way: SamplingParams
    namespace: str
    steer: str
    versions: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)


class Choice(NamedTuple):
    """The id a plain sequence draws, those it might draw were its sums rounded otherwise, and all log-probs."""

    token: int
    allowed: frozenset[int]
    logps_V: np.ndarray


@cache
def weights(kind: str, version: int) -> Transformer:
    return small_model(kind, seed=version, **TINY | KINDS[kind])


@cache
def plain_logits(kind: str, version: int, ids: tuple[int, ...]) -> np.ndarray:
    """(V,) after these ids: the whole sequence, and no cache."""
    model = weights(kind, version)
    with torch.no_grad():
        return model.logits(model.hidden(torch.tensor([ids]))[:, -1])[0].double().numpy()


@cache
def plain_experts(kind: str, version: int, ids: tuple[int, ...]) -> torch.Tensor:
    """(T, 1, K), in the order of ids."""
    routings: list[Any] = []
    model = weights(kind, version)
    with torch.no_grad():
        model.hidden(torch.tensor([ids]), routings=routings)
    return torch.stack([routing.experts_NK for routing in routings], dim=1).sort(-1).values


def plain_choice(kind: str, version: int, ids: list[int], asked: Asked) -> Choice:
    """What comes after these ids of a request."""
    logits_V = plain_logits(kind, version, tuple(ids))
    n_drawn = len(ids) - len(asked.prompt)
    reshaped_V = reshaped(logits_V, asked.way, ids, n_drawn=n_drawn)
    if asked.steer != "free":
        if not n_drawn:
            return Choice(FIRST, frozenset([FIRST]), log_softmax(logits_V))
        reshaped_V[~allowed(n_drawn)] = -np.inf
    exact, near = choice(reshaped_V, asked.way, position=len(ids))
    return Choice(exact, near, log_softmax(logits_V))


def log_softmax(logits_V: np.ndarray) -> np.ndarray:
    return logits_V - np.logaddexp.reduce(logits_V)


def reshaped(logits_V: np.ndarray, way: SamplingParams, ids: list[int], *, n_drawn: int) -> np.ndarray:
    """Penalties id by id, as they are defined; then the bias."""
    logits_V = logits_V.copy()
    for token in set(ids):
        better = logits_V[token] > 0
        logits_V[token] *= 1 / way.repetition_penalty if better else way.repetition_penalty
    for token, count in Counter(ids[len(ids) - n_drawn :]).items():
        logits_V[token] -= way.presence_penalty + way.frequency_penalty * count
    for token, bias in way.logit_bias.items():
        logits_V[token] += bias
    return logits_V


def choice(logits_V: np.ndarray, way: SamplingParams, *, position: int) -> tuple[int, frozenset[int]]:
    """The id drawn, and those that might be."""
    if way.temperature == 0:
        return int(logits_V.argmax()), frozenset((logits_V >= logits_V.max() - ROUNDING).nonzero()[0].tolist())
    heat = max(way.temperature, COLDEST)
    probs_V = np.exp((logits_V - logits_V.max()) / heat)
    probs_V /= probs_V.sum()
    number = uniform_ref(way.seed, position)
    exact, near = -1, set()
    for slack in (0.0, ROUNDING, -ROUNDING):
        kept_V = np.where(probs_V >= threshold(probs_V, way) * (1 + slack), probs_V, 0.0)
        ends_V = kept_V.cumsum()
        target, starts_V = number * ends_V[-1], ends_V - kept_V
        if not slack:
            exact = int((ends_V <= target).sum())
        near_V = (kept_V > 0) & (starts_V <= target + ROUNDING) & (target <= ends_V + ROUNDING)
        near |= set(near_V.nonzero()[0].tolist())
    return exact, frozenset(near)


def threshold(probs_V: np.ndarray, way: SamplingParams) -> float:
    """The least probability that stays: top-k, then top-p of what that left, then min-p."""
    falling_V = np.sort(probs_V)[::-1]
    floor = falling_V[way.top_k - 1] if way.top_k else 0.0
    left = falling_V[falling_V >= floor]
    if way.top_p < 1:
        floor = max(floor, left[np.searchsorted(left.cumsum(), way.top_p * left.sum())])
    return max(floor, way.min_p * falling_V[0])


@cache
def alone(kind: str, version: int, prompt: tuple[int, ...], way: SamplingParams, steer: str) -> Completion:
    """The same request in an engine of its own."""
    engine = Engine(weights(kind, version), eos_ids=[EOS], max_batch=1)
    engine.add(prompt, way, control=control_of(steer))
    while not (finished := engine.step()):
        pass
    return finished[0].completion
