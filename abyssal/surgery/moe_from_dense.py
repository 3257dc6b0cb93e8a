"""Experts from a dense feed-forward: its neurons are dealt out, none is changed. (LLaMA-MoE, CMoE)

A SwiGLU feed-forward is a sum over neurons, so any way of dealing them out computes the same while all experts are
active. Neurons that carry most, over all tokens of a text, become the shared experts; the others are grouped by the
tokens on which they carry something, in experts of equal size. The router is the linear function of the input that
foresees best, by least squares on that text, which expert will carry how much. Its logits are kept small: the chosen
experts then weigh nearly the same, as parts of one sum must, and only their order is the router's.
Letters: N tokens, D width, F neurons, E routed experts, S shared ones, W neurons of an expert (F / (E + S)), K active,
I neurons that are routed (E x W).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.model.config import ModelConfig
from abyssal.model.moe import DenseFFN
from abyssal.model.transformer import Transformer

ROUNDS = 10  # of clustering; groups hardly change after five
LOGIT = 0.01  # root mean square of the logits: weights of chosen experts differ by less than a percent
RIDGE = 1e-2  # of the router's fit, as a share of the mean square of its inputs


class Dealt(NamedTuple):
    """Which neurons go where."""

    shared_X: Tensor  # S x W of them
    routed_EW: Tensor


class Router(NamedTuple):
    weight_ED: Tensor
    bias_E: Tensor  # chooses only


def moe_config(config: ModelConfig, *, experts: int, shared: int, active: int) -> ModelConfig:
    """DeepSeek-V3's routing without groups over experts that together are this model's feed-forward."""
    if config.feed_forward != "dense":
        raise ValueError(f"feed_forward={config.feed_forward!r} has experts already; name a dense model")
    if config.num_nextn_predict_layers:
        raise ValueError(
            f"num_nextn_predict_layers={config.num_nextn_predict_layers}: MTP modules are not converted; use a "
            f"checkpoint without them"
        )
    if experts < 2 or shared < 1 or not 1 <= active <= experts:
        raise ValueError(
            f"{active} active of {experts} experts and {shared} shared: give --experts 2 or more, --active at least 1 "
            f"of them and --shared 1 or more"
        )
    neurons, pieces = config.intermediate_size, experts + shared
    if neurons % pieces:
        near = [n for n in range(2, neurons + 1) if neurons % n == 0]
        near = sorted(sorted(near, key=lambda n: abs(n - pieces))[:4])
        raise ValueError(
            f"{experts} experts and {shared} shared are {pieces} pieces, and {neurons} neurons do not divide by that; "
            f"use {', '.join(map(str, near))} pieces in all"
        )
    return replace(
        config,
        feed_forward="moe",
        n_routed_experts=experts,
        n_shared_experts=shared,
        num_experts_per_tok=active,
        moe_intermediate_size=neurons // pieces,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        norm_topk_prob=True,
        routed_scaling_factor=float(active),  # each of K weights is about 1 / K: a chosen expert counts once
    )


@torch.no_grad()
def moe_from_dense(model: Transformer, config: ModelConfig, layers: Sequence[dict[str, Tensor]]) -> Transformer:
    """A new model of `config` with these feed-forwards, one of `moe_weights` a layer; all other weights are copied."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".mlp." not in name}
    for layer, weights in enumerate(layers):
        state |= {f"layers.{layer}.mlp.{name}": tensor.clone() for name, tensor in weights.items()}
    with torch.device("meta"):
        converted = Transformer(config, dtype=model.dtype)
    converted.load_state_dict(state, assign=True)
    converted.rope_frequencies = model.rope_frequencies.clone()
    return converted.requires_grad_(True)


@torch.no_grad()
def moe_weights(ffn: DenseFFN, x_ND: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """One layer's experts, shared experts and router, from its inputs on a text."""
    hidden_NF = F.silu(ffn.gate_proj(x_ND)) * ffn.up_proj(x_ND)
    moves_NF = (hidden_NF * ffn.down_proj.weight.norm(dim=0)).abs().float()
    dealt = deal(moves_NF, experts=config.n_routed_experts, shared=config.n_shared_experts)
    gate_FD, up_FD, down_DF = ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight
    if config.num_experts_per_tok == config.n_routed_experts:  # nothing to choose: all weigh exactly the same
        weight_ED = torch.zeros_like(gate_FD[: config.n_routed_experts])
        router = Router(weight_ED, torch.zeros_like(weight_ED[:, 0]))
    else:
        router = fit_router(x_ND.float(), moves_NF[:, dealt.routed_EW].square().sum(-1))
    return {
        "gate.weight": router.weight_ED.float(),
        "gate.e_score_correction_bias": router.bias_E.float(),
        "experts.gate_up_proj": torch.cat((gate_FD[dealt.routed_EW], up_FD[dealt.routed_EW]), dim=1),
        "experts.down_proj": down_DF.T[dealt.routed_EW].transpose(1, 2).contiguous(),
        "shared_experts.gate_proj.weight": gate_FD[dealt.shared_X],
        "shared_experts.up_proj.weight": up_FD[dealt.shared_X],
        "shared_experts.down_proj.weight": down_DF[:, dealt.shared_X].contiguous(),
    }


def deal(moves_NF: Tensor, *, experts: int, shared: int) -> Dealt:
    """Neurons to experts by how much each moves the output on each token. Neurons keep their order in a group."""
    n_shared = moves_NF.shape[1] // (experts + shared) * shared
    moves_NF = F.normalize(moves_NF, dim=1)  # tokens count alike, however large their numbers are
    order_F = moves_NF.square().sum(0).argsort(descending=True, stable=True)
    shared_X, rest_I = order_F[:n_shared].sort().values, order_F[n_shared:].sort().values
    group_I = balanced_groups(F.normalize(moves_NF[:, rest_I].T, dim=1), experts)
    return Dealt(shared_X, torch.stack([rest_I[group_I == e] for e in range(experts)]))


def balanced_groups(points_IN: Tensor, n_groups: int) -> Tensor:
    """k-means with groups of one size, (I,): each round, every point goes to the nearest centre that has room.

    Begins with points far from each other, the same ones each time.
    """
    centres = [int(points_IN.sum(1).argmax())]
    nearest_I = points_IN @ points_IN[centres[0]]
    for _ in range(n_groups - 1):
        centres.append(int(nearest_I.argmin()))
        nearest_I = torch.maximum(nearest_I, points_IN @ points_IN[centres[-1]])
    centres_GN = points_IN[centres]
    group_I = torch.full((len(points_IN),), -1, device=points_IN.device)
    for _ in range(ROUNDS):
        before_I, group_I = group_I, _with_room(points_IN @ F.normalize(centres_GN, dim=1).T)
        if torch.equal(before_I, group_I):
            break
        members_GI = F.one_hot(group_I, n_groups).T.to(points_IN.dtype)
        centres_GN = members_GI @ points_IN
    return group_I


def _with_room(likeness_IG: Tensor) -> Tensor:
    """Each point's group, all of one size. The points that like a group best come first; who is left asks the next."""
    n_points, n_groups = likeness_IG.shape
    room = [n_points // n_groups] * n_groups
    group_I = torch.full((n_points,), -1, device=likeness_IG.device)
    likeness_IG = likeness_IG.clone()
    while bool((group_I < 0).any()):
        best_I = likeness_IG.max(1)
        for group in range(n_groups):
            asking_X = ((best_I.indices == group) & (group_I < 0)).nonzero()[:, 0]
            order_X = best_I.values[asking_X].argsort(descending=True, stable=True)
            taken_X = asking_X[order_X[: room[group]]]
            group_I[taken_X] = group
            room[group] -= len(taken_X)
            if not room[group]:
                likeness_IG[:, group] = float("-inf")
    return group_I


def fit_router(x_ND: Tensor, energy_NE: Tensor) -> Router:
    """Ridge regression of each expert's share of what the routed ones move together, on the input and a constant."""
    share_NE = (energy_NE / energy_NE.sum(1, keepdim=True).clamp(min=1e-30)).double()
    mean_D, mean_E = x_ND.double().mean(0), share_NE.mean(0)
    x_ND = x_ND.double() - mean_D
    square_DD = x_ND.T @ x_ND / len(x_ND)
    square_DD.diagonal().add_(RIDGE * square_DD.diagonal().mean())
    weight_ED = torch.linalg.solve(square_DD, x_ND.T @ (share_NE - mean_E) / len(x_ND)).T
    offset_E = mean_E - weight_ED @ mean_D
    logits_NE = (x_ND + mean_D) @ weight_ED.T
    scale = LOGIT / float(logits_NE.square().mean().sqrt())
    # sigmoid(l) is 1/2 + l/4 near 0, and the bias is added to that
    return Router(weight_ED * scale, (offset_E - offset_E.mean()) * scale / 4)
