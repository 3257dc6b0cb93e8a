"""AdamW with the moments in a dtype of choice. (Loshchilov & Hutter; DeepSeek-V3 section 3.2.3 keeps BF16 moments)

All tensors of one group are updated together by torch's foreach operations: one Python step however many tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class AdamW(torch.optim.Optimizer):
    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        moments: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.moments = moments

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(p, dtype=self.moments),
                    "exp_avg_sq": torch.zeros_like(p, dtype=self.moments),
                }
        states = [self.state[p] for p in params]
        grads = [p.grad.float() for p in params if p.grad is not None]
        torch._foreach_add_([s["step"] for s in states], 1)
        step = int(states[0]["step"])
        assert all(int(s["step"]) == step for s in states), "tensors of one group have taken different numbers of steps"
        beta1, beta2 = group["betas"]
        if self.moments == torch.float32:  # the same formula in one pass over memory
            torch._fused_adamw_(
                params, grads, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [],
                [s["step"] for s in states], lr=group["lr"], beta1=beta1, beta2=beta2,
                weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
            )  # fmt: skip
            return
        means = [s["exp_avg"].float() for s in states]
        squares = [s["exp_avg_sq"].float() for s in states]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        torch._foreach_copy_([s["exp_avg"] for s in states], means)
        torch._foreach_copy_([s["exp_avg_sq"] for s in states], squares)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(params, means, denominators, -group["lr"] / (1 - beta1**step))
