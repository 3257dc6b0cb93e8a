"""What a model's layers see and say on a text: the numbers that decide what a conversion keeps. Changes no weights.

Keys and queries are read as complex numbers, one for each rotated pair: RoPE multiplies it by exp(i f p) at position p,
so whatever is complex-linear over heads commutes with it.
Letters: B rows, T tokens, S key tokens, D width, H heads, G key-value heads, Q head width, P rotated pairs (Q / 2),
K numbers that the cache of GQA holds for a token (2 x G x Q: all keys, all values).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from abyssal.model.block import Block
from abyssal.model.gqa import GQA
from abyssal.model.rope import rotate
from abyssal.model.transformer import Transformer

RIDGE = 1e-4  # of a fit on calibration text, as a share of the mean square: few tokens must not be learned by heart


class LayerInputs(NamedTuple):
    """What the two halves of a block get, normalised."""

    layer: int
    attention_BTD: Tensor
    feed_forward_BTD: Tensor


class AttentionStatistics(NamedTuple):
    """Of one layer, over a text; FP64. A token counts as much as it is looked at: the first, at which many heads look
    for want of anything better, as much as many others.

    `constant_D` is the direction of the layer's input that says 1, as nearly as can be, whatever the token.
    """

    cache_KK: Tensor  # second moments of keys (head by head, pairs side by side) and values
    cache_K: Tensor  # their means
    query_HQQ: Tensor  # second moments of each head's queries, pairs side by side
    turn_HP: Tensor  # complex: the mean of exp(-i f d) over the distances d at which the head looks
    constant_D: Tensor


@torch.no_grad()
def layer_inputs(model: Transformer, ids_BT: Tensor) -> Iterator[LayerInputs]:
    """Layer after layer, computed as the model does."""
    context = model.context(ids_BT)
    x_BTD = model.embed(ids_BT)
    for layer, block in enumerate(model.layers):
        assert isinstance(block, Block)
        attention_BTD = block.input_layernorm(x_BTD)
        x_BTD = x_BTD + block.self_attn(attention_BTD, context)
        feed_forward_BTD = block.post_attention_layernorm(x_BTD)
        yield LayerInputs(layer, attention_BTD, feed_forward_BTD)
        x_BTD = x_BTD + block.mlp(feed_forward_BTD)


def pairs_side_by_side(x: Tensor) -> Tensor:
    """(..., Q) in Llama's layout, halves, to (..., Q) with each pair's two numbers next to each other."""
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


@torch.no_grad()
def attention_statistics(model: Transformer, attention: GQA, x_BTD: Tensor) -> AttentionStatistics:
    heads = (-1, model.config.head_dim)
    q_BTHQ, k_BTGQ, v_BTGQ = (
        proj(x_BTD).float().unflatten(-1, heads) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    looks = _looks(model, q_BTHQ, k_BTGQ)
    q_NHQ, k_NGQ = (pairs_side_by_side(x).flatten(0, 1) for x in (q_BTHQ, k_BTGQ))
    cache_NK = torch.cat((k_NGQ.flatten(1), v_BTGQ.flatten(0, 1).flatten(1)), dim=1)
    share_N1 = (looks.weight_BT / looks.weight_BT.sum()).flatten()[:, None]
    return AttentionStatistics(
        cache_KK=(cache_NK.T @ (cache_NK * share_N1)).double(),
        cache_K=(cache_NK * share_N1).double().sum(0),
        query_HQQ=torch.einsum("nhq,nhr->hqr", q_NHQ, q_NHQ).double() / len(q_NHQ),
        turn_HP=looks.turn_HP,
        constant_D=_constant_direction(x_BTD.flatten(0, 1).float(), share_N1),
    )


class Looks(NamedTuple):
    """`turn_HP`: how far the keys that a head looks at stand behind its query, as a mean turn of each pair; complex.
    `weight_BT`: how much each token is looked at."""

    turn_HP: Tensor
    weight_BT: Tensor


def _looks(model: Transformer, q_BTHQ: Tensor, k_BTGQ: Tensor) -> Looks:
    """With attention weights p: turns count as p (1 - p), which is how fast p moves with its score; tokens as the sum
    of p^2, by which independent errors of their values add up in the layer's output."""
    n_tokens = q_BTHQ.shape[1]
    context = model.context(torch.zeros(q_BTHQ.shape[:2], dtype=torch.int64, device=q_BTHQ.device))
    q_BTHQ, k_BTGQ = (rotate(x, context.cos, context.sin, interleaved=False) for x in (q_BTHQ, k_BTGQ))
    k_BTHQ = k_BTGQ.repeat_interleave(q_BTHQ.shape[2] // k_BTGQ.shape[2], dim=2)
    place_T = torch.arange(n_tokens, device=q_BTHQ.device)
    distance_TS = (place_T[:, None] - place_T).clamp(min=0)
    hidden_TS = place_T > place_T[:, None]
    looked_at = []
    weight_HT = torch.zeros(q_BTHQ.shape[2], n_tokens, dtype=torch.float64, device=q_BTHQ.device)  # by distance
    for q_THQ, k_SHQ in zip(q_BTHQ, k_BTHQ, strict=True):
        scores_HTS = torch.einsum("thq,shq->hts", q_THQ, k_SHQ) * model.config.softmax_scale
        p_HTS = scores_HTS.masked_fill(hidden_TS, float("-inf")).softmax(-1)
        looked_at.append(p_HTS.square().sum((0, 1)))
        matters_HX = (p_HTS * (1 - p_HTS)).double().flatten(1)
        weight_HT.index_add_(1, distance_TS.flatten(), matters_HX)
    angles_TP = place_T[:, None] * model.rope_frequencies.double()
    turns_TP = torch.polar(torch.ones_like(angles_TP), -angles_TP)
    turn_HP = (weight_HT.to(turns_TP.dtype) @ turns_TP) / weight_HT.sum(1, keepdim=True).clamp(min=1e-12)
    return Looks(turn_HP, torch.stack(looked_at))


def _constant_direction(x_ND: Tensor, share_N1: Tensor) -> Tensor:
    """Ridge regression of 1 on the input, (D,), scaled to be 1 on average."""
    mean_D = (x_ND * share_N1).double().sum(0)
    square_DD = (x_ND.T @ (x_ND * share_N1)).double()
    ridge = RIDGE * square_DD.diagonal().mean()
    square_DD.diagonal().add_(ridge)
    constant_D = torch.linalg.solve(square_DD, mean_D)
    return constant_D / (constant_D @ mean_D)
