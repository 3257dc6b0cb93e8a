"""DeepSeekMoE: shared experts that see every token and fine-grained routed ones that are chosen. (V3 section 2.1.2)

Routing is FP32 throughout. The balance bias takes part in choosing and in nothing else; it carries no gradient, lives
in FP32 (steps of 0.001 would vanish in BF16) and is re-centred after each update.
Letters: B batch, T tokens, N tokens of the whole batch (B x T), D width, F expert width, E experts, K chosen, G groups.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abyssal.kernels.grouped import grouped_matmul
from abyssal.model.config import ModelConfig
from abyssal.model.linear import Linear, sigmoid, silu

FEW = (2, 32)  # rows of an expert, on average, between which one BF16 product for all beats one for each


class Routing(NamedTuple):
    """What one MoE layer decided. Losses, balance metrics and the engine's expert record read it."""

    layer: int
    experts_NK: Tensor
    weights_NK: Tensor
    scores_NE: Tensor


class DenseFFN(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    invariant = False

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, width)
        self.up_proj = Linear(dim, width)
        self.down_proj = Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x), invariant=self.invariant) * self.up_proj(x))


class Gate(nn.Module):
    """Chooses K experts for each token, among the best groups only."""

    e_score_correction_bias: Tensor
    invariant = False

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x_ND: Tensor, replay_NK: Tensor | None = None) -> Routing:
        """`replay_NK`: experts chosen elsewhere, taken as they are; a row of -1 chooses here. The weights are always
        this gate's own, so it learns about the experts that were really used. (router replay, DeepSeek-V3.2)"""
        config = self.config
        logits_NE = F.linear(x_ND.float(), self.weight.float())
        by_sigmoid = config.scoring_func == "sigmoid"
        scores_NE = sigmoid(logits_NE, invariant=self.invariant) if by_sigmoid else logits_NE.softmax(-1)
        experts_NK = self.choose(scores_NE.detach())
        if replay_NK is not None:
            experts_NK = torch.where(replay_NK >= 0, replay_NK, experts_NK)
        weights_NK = scores_NE.gather(-1, experts_NK)  # unbiased: the bias never scales an output
        if config.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return Routing(self.layer, experts_NK, weights_NK * config.routed_scaling_factor, scores_NE)

    def choose(self, scores_NE: Tensor) -> Tensor:
        """The K experts of each token, (N, K). Dropped groups are -inf, not 0: a biased score can be negative."""
        config = self.config
        choice_NE = scores_NE
        if config.topk_method == "noaux_tc":
            choice_NE = scores_NE + self.e_score_correction_bias
        if config.topk_method != "greedy" and config.n_group > 1:
            choice_NGE = choice_NE.unflatten(-1, (config.n_group, -1))
            best = 2 if config.topk_method == "noaux_tc" else 1  # V3 sums a group's two best, V2 takes its best
            group_NG = choice_NGE.topk(min(best, choice_NGE.shape[-1]), dim=-1).values.sum(-1)
            kept_NG = torch.zeros_like(group_NG, dtype=torch.bool)
            kept_NG.scatter_(-1, group_NG.topk(config.topk_group, dim=-1).indices, True)
            choice_NE = choice_NGE.masked_fill(~kept_NG[..., None], float("-inf")).flatten(-2)
        return choice_NE.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices

    @torch.no_grad()
    def update_bias(self, load_E: Tensor, speed: float) -> None:
        """b += speed * sign(mean load - load), then re-centre. (V3 section 2.1.2; auxiliary-loss-free balancing)"""
        load_E = load_E.float()
        self.e_score_correction_bias += speed * (load_E.mean() - load_E).sign()
        self.e_score_correction_bias -= self.e_score_correction_bias.mean()


class Experts(nn.Module):
    """All routed experts as two stacked weights, run as grouped matmuls over tokens sorted by expert."""

    invariant = False  # always grouped, rows in eights: a token's bits do not depend on its expert's other tokens

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n, dim, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(n, 2 * width, dim))
        self.down_proj = nn.Parameter(torch.empty(n, dim, width))

    def forward(self, x_ND: Tensor, routing: Routing) -> Tensor:
        n_tokens, k = routing.experts_NK.shape
        n_experts, mean_count = len(self.down_proj), n_tokens * k // len(self.down_proj)
        even = x_ND.dtype == torch.bfloat16 and not x_ND.is_cuda and FEW[0] <= mean_count < FEW[1]
        least = 8 if x_ND.dtype == torch.float32 else 1
        power = 1 << (mean_count // 16).bit_length() >> 1  # a sixteenth of the mean: little is computed for nothing
        multiple = 1 if x_ND.is_cuda else None if even else min(max(power, least), 64)
        if self.invariant:
            even, multiple = False, 8
        places_X, ends_E = padded_places(routing.experts_NK.flatten(), n_experts, multiple)
        source_P = ends_E.new_zeros(int(ends_E[-1]))  # P rows: assignments, and padding that copies token 0
        source_P[places_X] = torch.arange(n_tokens * k, dtype=torch.int32, device=x_ND.device) // k
        x_PD = x_ND.index_select(0, source_P)  # index_select: x[idx] has a slow backward on CPU
        gate, up = grouped_matmul(x_PD, self.gate_up_proj.to(x_ND.dtype), ends_E, even=even).chunk(2, dim=-1)
        gated_PF = (silu(gate, invariant=self.invariant) * up).contiguous()
        y_PD = grouped_matmul(gated_PF, self.down_proj.to(x_ND.dtype), ends_E, even=even)
        y_NKD = y_PD.index_select(0, places_X).view(n_tokens, k, -1)  # nobody reads the padding, so it has no gradient
        weighted_NKD = y_NKD * routing.weights_NK[..., None]  # weights are FP32: so is the sum
        if self.invariant:  # one after the other: with many threads `sum` adds some columns in another order
            return functools.reduce(torch.add, weighted_NKD.unbind(1)).to(x_ND.dtype)
        return weighted_NKD.sum(1).to(x_ND.dtype)


def padded_places(experts_X: Tensor, n_experts: int, multiple: int | None) -> tuple[Tensor, Tensor]:
    """Row of each assignment when they stand sorted by expert, and each expert's end, (X,) and (E,) int32.

    Each expert's rows are filled up to a multiple, or, with None, to as many as the fullest has. On a CPU that pays:
    oneDNN compiles a kernel for every row count it meets anew, which takes longer than the product itself, so counts
    must repeat from step to step; and FP32 products give a row the same bits only from 8 rows up.
    """
    counts_E = torch.bincount(experts_X, minlength=n_experts)
    if multiple is None:
        padded_E = ((counts_E.max() + 7) // 8 * 8).expand(n_experts)
    else:
        padded_E = (counts_E + multiple - 1) // multiple * multiple
    ends_E = padded_E.cumsum(0)
    order_X = experts_X.argsort(stable=True)
    shift_E = (ends_E - padded_E) - (counts_E.cumsum(0) - counts_E)  # padding in front of each expert's rows
    ranks_X = torch.arange(len(order_X), device=order_X.device)
    places_X = torch.empty_like(order_X).index_copy_(0, order_X, ranks_X + shift_E[experts_X[order_X]])
    return places_X.to(torch.int32), ends_E.to(torch.int32)


class MoE(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.gate = Gate(config, layer)
        self.experts = Experts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = DenseFFN(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x_BTD: Tensor, routings: list[Routing] | None, replay_NK: Tensor | None = None) -> Tensor:
        """`routings`, when given, receives what this layer used; `replay_NK` are the experts to use, see Gate."""
        x_ND = x_BTD.flatten(0, 1)
        routing = self.gate(x_ND, replay_NK)
        if routings is not None:
            routings.append(routing)
        out_BTD = self.experts(x_ND, routing).view_as(x_BTD)
        return out_BTD if self.shared_experts is None else out_BTD + self.shared_experts(x_BTD)
