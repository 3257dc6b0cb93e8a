"""Muon: momentum made orthogonal, for matrices only. (Jordan et al. 2024; update RMS of 0.2: Moonlight, section 2.2)

Each matrix's step is the momentum with all its singular values pushed to about one, by Newton-Schulz iterations.
Matrices of one shape are stacked, experts included, so that a step is a handful of batched matmuls.
Letters: X matrices of one shape, M rows, N columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Quintic coefficients that lift small singular values fast; they end in about [0.7, 1.2], which is orthogonal enough.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(g_XMN: Tensor, *, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The nearest semi-orthogonal matrix of each, roughly, in `dtype`. (X, M, N) -> (X, M, N)"""
    a, b, c = NEWTON_SCHULZ
    tall = g_XMN.shape[-2] > g_XMN.shape[-1]
    x = (g_XMN.mT if tall else g_XMN).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # singular values at most 1, or the iteration diverges
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For parameters of two dimensions, or three when the first one counts experts. The rest belongs to AdamW.

    `dtype` is that of the iteration's products. BF16 is enough; a CPU without units for it takes 30 times as long for
    them as for FP32.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        update_rms: float = 0.2,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._dtype = dtype
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "update_rms": update_rms}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    if p.ndim not in (2, 3):
                        raise ValueError(
                            f"Muon takes matrices, not a tensor of shape {tuple(p.shape)}; give it to AdamW"
                        )
                    by_shape[tuple(p.shape[-2:])].append(p)
            for params in by_shape.values():
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        grads = [p.grad for p in params if p.grad is not None]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(grads, buffers, group["momentum"])
        rows, columns = params[0].shape[-2:]
        stacked_XMN = torch.cat([g.reshape(-1, rows, columns) for g in nesterov])
        update_XMN = orthogonalize(stacked_XMN, dtype=self._dtype).float()
        # an orthogonal M x N matrix has RMS 1/sqrt(max(M, N)); this makes every matrix move by update_rms
        scale = group["update_rms"] * max(rows, columns) ** 0.5
        pieces = update_XMN.split([p.numel() // (rows * columns) for p in params])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(
            params, [u.view_as(p) for u, p in zip(pieces, params, strict=True)], alpha=-group["lr"] * scale
        )
