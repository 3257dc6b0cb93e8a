"""Logits -> drawn ids and their log-probs, for a whole batch at once. Pure functions; owns no state.

One uniform number a token, made from (seed, position) by an integer hash, and inverse-CDF sampling in vocabulary
order over what the filters keep: a row's draw depends on its own logits, seed and position alone. Filters are
thresholds on the probabilities at the row's temperature, in the order top-k, top-p (of what top-k kept), min-p; ties
at a threshold stay. Log-probs are the model's own: temperature 1, nothing cut.
Letters: B rows, V vocabulary, C candidates (the largest probabilities of a row, in falling order), W chunk of the
vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.engine.control import Steering

# splitmix64 (Steele, Lea, Flood 2014): the stream's step and the two multipliers of its finaliser
GOLDEN, MIX_A, MIX_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
CANDIDATES = 64  # enough to settle top-p for a trained model; rows that need more are sorted whole
CHUNK = 64  # the CDF is searched by chunk, then within one: FP64 sums of every entry would cost ten times as much
COLDEST = 1e-6  # a temperature below this would overflow; it is greedy but for ties


class Sampling(NamedTuple):
    """How each row draws. The flags are known on the host, so that no step asks the device which paths it needs."""

    key_B: Tensor
    temperature_B: Tensor
    top_p_B: Tensor
    top_k_B: Tensor
    min_p_B: Tensor
    all_greedy: bool
    any_greedy: bool
    any_scaled: bool
    any_filter: bool


class Drawn(NamedTuple):
    """`probs_BV` is what was drawn from, 0 where a filter cut; None when all rows were greedy. `all_logps_BV` is the
    model's own distribution."""

    ids_B: Tensor
    logps_B: Tensor
    all_logps_BV: Tensor
    probs_BV: Tensor | None = None


def sampling(
    *,
    key_B: Tensor,
    temperature_B: Tensor,
    top_p_B: Tensor,
    top_k_B: Tensor,
    min_p_B: Tensor,
    device: torch.device | None = None,
) -> Sampling:
    """From host tensors, one entry a row; temperature 0 is greedy, top_p 1, top_k 0 and min_p 0 are off."""
    greedy_B = temperature_B == 0
    filtered_B = (top_p_B < 1) | (top_k_B > 0) | (min_p_B > 0)
    return Sampling(
        key_B=key_B.to(device),
        temperature_B=temperature_B.to(device),
        top_p_B=top_p_B.to(device),
        top_k_B=top_k_B.to(device),
        min_p_B=min_p_B.to(device),
        all_greedy=bool(greedy_B.all()),
        any_greedy=bool(greedy_B.any()),
        any_scaled=bool(((temperature_B != 1) & ~greedy_B).any()),
        any_filter=bool((filtered_B & ~greedy_B).any()),
    )


def repeated(how: Sampling, row_X: Tensor) -> Sampling:
    """The same for a batch of the rows row_X, in which one may stand several times."""
    row_X = row_X.to(how.key_B.device)
    return how._replace(
        key_B=how.key_B[row_X],
        temperature_B=how.temperature_B[row_X],
        top_p_B=how.top_p_B[row_X],
        top_k_B=how.top_k_B[row_X],
        min_p_B=how.min_p_B[row_X],
    )


def sample(
    logits_BV: Tensor,
    positions_B: Tensor,
    how: Sampling,
    *,
    steering: Steering | None = None,
    shaped_BV: Tensor | None = None,
) -> Drawn:
    """One id a row for the given positions of their sequences, drawn from `shaped_BV` where penalties made such."""
    logps_BV = logits_BV.log_softmax(-1)
    logits_BV = logits_BV if shaped_BV is None else shaped_BV
    if steering is not None and steering.allowed_MV is not None:
        masked_M = torch.from_numpy(steering.masked_M).to(logits_BV.device)
        forbidden_MV = torch.from_numpy(~steering.allowed_MV).to(logits_BV.device)
        logits_BV = logits_BV.index_put((masked_M,), logits_BV[masked_M].masked_fill(forbidden_MV, -torch.inf))
    ids_B, probs_BV = draw(logits_BV, positions_B, how)
    if steering is not None and steering.forced_C is not None:
        forced_rows_C = torch.from_numpy(steering.forced_rows_C).to(ids_B.device)
        ids_B = ids_B.index_put((forced_rows_C,), torch.from_numpy(steering.forced_C).to(ids_B.device))
    return Drawn(ids_B, logps_BV.gather(-1, ids_B[:, None])[:, 0], logps_BV, probs_BV)


def draw(logits_BV: Tensor, positions_B: Tensor, how: Sampling) -> tuple[Tensor, Tensor | None]:
    """One id a row, and what it was drawn from; None when all rows are greedy."""
    if how.all_greedy:
        return largest(logits_BV), None
    probs_BV = probabilities(logits_BV, how)
    ids_B = inverse_cdf(probs_BV, uniform(how.key_B, positions_B))
    if how.any_greedy:
        ids_B = torch.where(how.temperature_B == 0, largest(logits_BV), ids_B)
    return ids_B, probs_BV


def largest(logits_BV: Tensor) -> Tensor:
    """Each row's first largest entry, or its first NaN. On a CPU by NumPy: torch takes ten times as long."""
    if logits_BV.device.type != "cpu":
        return logits_BV.argmax(-1)
    return torch.from_numpy(logits_BV.numpy().argmax(-1))


def sampled_logps(probs_BV: Tensor, ids_B: Tensor) -> Tensor:
    """Log-prob of each id under what it was drawn from."""
    return (probs_BV.gather(-1, ids_B[:, None])[:, 0] / probs_BV.sum(-1)).log()


def kept_ids(probs_BV: Tensor) -> list[Tensor]:
    """Each row's ids that had a probability, int32 on the host."""
    row_X, kept_X = (probs_BV > 0).nonzero(as_tuple=True)
    counts_B = torch.bincount(row_X, minlength=len(probs_BV))
    return list(kept_X.to(torch.int32).cpu().split(counts_B.tolist()))


def probabilities(logits_BV: Tensor, how: Sampling) -> Tensor:
    """What is drawn from: softmax at each row's temperature, zero where a filter cuts; rows need not sum to 1."""
    if how.any_scaled:
        # the largest becomes 0 before the division: a small temperature then underflows instead of overflowing
        warm_B1 = how.temperature_B.clamp(min=COLDEST).masked_fill(how.temperature_B == 0, 1.0)[:, None]
        logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / warm_B1
    probs_BV = logits_BV.softmax(-1)
    if how.any_filter:
        threshold_B = thresholds(probs_BV, top_p_B=how.top_p_B, top_k_B=how.top_k_B, min_p_B=how.min_p_B)
        probs_BV = probs_BV.masked_fill(probs_BV < threshold_B[:, None], 0.0)
    return probs_BV


def thresholds(probs_BV: Tensor, *, top_p_B: Tensor, top_k_B: Tensor, min_p_B: Tensor) -> Tensor:
    """The smallest probability each row keeps, (B,). Most rows are settled by their largest few entries."""
    n_vocab = probs_BV.shape[1]
    candidates_BC = probs_BV.topk(min(CANDIDATES, n_vocab)).values
    threshold_B, settled_B = _thresholds(probs_BV, candidates_BC, top_p_B, top_k_B, min_p_B)
    open_B = (~settled_B).nonzero()[:, 0]
    if len(open_B):
        rows_BV = probs_BV[open_B]
        candidates_BC = rows_BV.sort(-1, descending=True).values
        rest, _ = _thresholds(rows_BV, candidates_BC, top_p_B[open_B], top_k_B[open_B], min_p_B[open_B])
        threshold_B[open_B] = rest
    return threshold_B


def thresholds_ref(probs_BV: Tensor, *, top_p_B: Tensor, top_k_B: Tensor, min_p_B: Tensor) -> Tensor:
    """The same with every row sorted whole."""
    candidates_BV = probs_BV.sort(-1, descending=True).values
    return _thresholds(probs_BV, candidates_BV, top_p_B, top_k_B, min_p_B)[0]


def _thresholds(
    probs_BV: Tensor, candidates_BC: Tensor, top_p_B: Tensor, top_k_B: Tensor, min_p_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Each row's threshold, and whether its candidates reached far enough to be sure of it."""
    n_vocab, n_candidates = probs_BV.shape[1], candidates_BC.shape[1]
    by_k_B = top_k_B > 0
    kth_B = (torch.where(by_k_B, top_k_B, 1).clamp(max=n_candidates) - 1)[:, None]
    floor_B = torch.where(by_k_B, candidates_BC.gather(1, kth_B)[:, 0], 0.0)
    kept_BC = candidates_BC.masked_fill(candidates_BC < floor_B[:, None], 0.0)
    mass_BC = kept_BC.cumsum(-1, dtype=torch.float64)
    total_B = torch.where(by_k_B, mass_BC[:, -1], probs_BV.sum(-1, dtype=torch.float64))
    wanted_B = top_p_B * total_B
    rank_B = (mass_BC < wanted_B[:, None]).sum(-1)  # the first rank whose mass reaches top_p
    by_p_B = top_p_B < 1
    nucleus_B = candidates_BC.gather(1, rank_B.clamp(max=n_candidates - 1)[:, None])[:, 0]
    threshold_B = torch.where(by_p_B, nucleus_B, floor_B).maximum(floor_B).maximum(min_p_B * candidates_BC[:, 0])
    if n_candidates == n_vocab:
        return threshold_B, torch.ones_like(by_p_B)
    # ties with the k-th may continue beyond the candidates, and then the total is not known
    k_unsure_B = by_k_B & ((top_k_B > n_candidates) | (candidates_BC[:, -1] >= floor_B))
    return threshold_B, ~(k_unsure_B | (by_p_B & (rank_B >= n_candidates)))


def inverse_cdf(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The id at which the running sum over the vocabulary passes uniform x total. Never one of probability zero."""
    missing = -probs_BV.shape[1] % CHUNK
    chunks_BNW = F.pad(probs_BV, (0, missing)).unflatten(1, (-1, CHUNK))
    before_BN = chunks_BNW.sum(-1).cumsum(-1, dtype=torch.float64)
    target_B1 = _below(uniform_B[:, None] * before_BN[:, -1:], before_BN[:, -1:])
    # the clamps are for rows that are not finite: the caller sees that in their log-probs
    chunk_B1 = torch.searchsorted(before_BN, target_B1, right=True).clamp_(max=before_BN.shape[1] - 1)
    start_B1 = F.pad(before_BN, (1, 0)).gather(1, chunk_B1)
    within_BW = chunks_BNW.gather(1, chunk_B1[..., None].expand(-1, -1, CHUNK))[:, 0].cumsum(-1, dtype=torch.float64)
    # FP32 chunk sums and FP64 running sums differ in the last bits: stay inside the chunk
    target_B1 = _below(target_B1 - start_B1, within_BW[:, -1:])
    ids_B1 = chunk_B1 * CHUNK + torch.searchsorted(within_BW, target_B1, right=True)
    return ids_B1[:, 0].clamp_(max=probs_BV.shape[1] - 1)


def _below(value: Tensor, bound: Tensor) -> Tensor:
    return value.minimum(torch.nextafter(bound, torch.zeros_like(bound)))


def uniform(key_B: Tensor, positions_B: Tensor) -> Tensor:
    """FP64 in [0, 1) with 53 random bits: number `position` of the splitmix64 stream that starts at the row's key."""
    bits_B = _mix64(key_B + (positions_B + 1) * _signed(GOLDEN))
    return _shifted(bits_B, 11).to(torch.float64) * 2.0**-53


def uniform_ref(seed: int, position: int) -> float:
    """The same for one row, in Python's integers."""
    return (_mix64_ref(_mix64_ref(seed) + (position + 1) * GOLDEN) >> 11) * 2.0**-53


def noise_key(seed: int) -> int:
    """Where a seed's stream starts, a signed 64-bit integer. Hashed: seeds 1 and 2 have nothing in common."""
    return _signed(_mix64_ref(seed))


def derive_seed(seed: int, *path: int) -> int:
    """A seed for one of many draws that share `seed`, such as (problem, answer): the same path gives the same seed."""
    for step in path:
        seed = _mix64_ref(_mix64_ref(seed) + (step + 1) * MIX_A)
    return seed


def _mix64(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _signed(MIX_A)  # int64 products wrap, which is what the hash wants
    z = (z ^ _shifted(z, 27)) * _signed(MIX_B)
    return z ^ _shifted(z, 31)


def _mix64_ref(z: int) -> int:
    z &= 2**64 - 1
    z = (z ^ (z >> 30)) * MIX_A % 2**64
    z = (z ^ (z >> 27)) * MIX_B % 2**64
    return z ^ (z >> 31)


def _shifted(z: Tensor, n: int) -> Tensor:
    """z >> n with zeros moving in; torch's own shift copies the sign."""
    return (z >> n) & (2 ** (64 - n) - 1)


def _signed(z: int) -> int:
    return z - 2**64 if z >= 2**63 else z
