"""The expert layer against a loop over tokens in float64, and the grouped matmul against its plain twin.

Letters: N tokens, D width, F expert width, E experts, K chosen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from abyssal.kernels.grouped import grouped_matmul, grouped_matmul_ref
from abyssal.model.config import ModelConfig
from abyssal.model.moe import MoE, Routing

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, kv_lora_rank=8,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3,
    moe_intermediate_size=12, n_group=4, topk_group=2, routed_scaling_factor=2.5,
)


def random_moe(**changes: Any) -> MoE:
    moe = MoE(ModelConfig(**(vars(CONFIG) | changes)), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(0.0, p.shape[-1] ** -0.5, generator=generator)
        moe.gate.e_score_correction_bias.normal_(0.0, 0.3, generator=generator)
    return moe


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def swiglu(x_D: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    return down_DF @ (silu(gate_FD @ x_D) * (up_FD @ x_D))


def loop_in_float64(moe: MoE, weights: dict[str, Tensor], x_ND: Tensor) -> Tensor:
    """Shared experts of every token plus 2.5 sum_k g_k expert_k(x), straight from V3's equations 12 to 16."""
    rows = []
    for x_D in x_ND:
        scores = [1 / (1 + torch.exp(-(weights["gate.weight"][e] @ x_D))) for e in range(8)]
        biased = [scores[e].item() + moe.gate.e_score_correction_bias[e].item() for e in range(8)]
        groups = sorted(([e, e + 1] for e in range(0, 8, 2)), key=lambda pair: -(biased[pair[0]] + biased[pair[1]]))
        chosen = sorted(groups[0] + groups[1], key=lambda e: -biased[e])[:3]
        total = sum(scores[e] for e in chosen)
        y_D = swiglu(x_D, *(weights[f"shared_experts.{part}_proj.weight"] for part in ("gate", "up", "down")))
        for e in chosen:
            gate_FD, up_FD = weights["experts.gate_up_proj"][e][:12], weights["experts.gate_up_proj"][e][12:]
            y_D = y_D + 2.5 * scores[e] / total * swiglu(x_D, gate_FD, up_FD, weights["experts.down_proj"][e])
        rows.append(y_D)
    return torch.stack(rows)


def test_the_layer_and_its_gradients_equal_a_float64_loop():
    moe = random_moe()
    x_BTD = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(3))
    probe = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(4))
    ours_x = x_BTD.clone().requires_grad_()
    routings: list[Routing] = []
    out = moe(ours_x, routings)
    (out * probe).sum().backward()

    exact = {name: p.detach().double().requires_grad_() for name, p in moe.named_parameters()}
    exact_x = x_BTD.double().requires_grad_()
    want = loop_in_float64(moe, exact, exact_x.flatten(0, 1)).view_as(x_BTD)
    (want * probe).sum().backward()

    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours_x.grad.double(), exact_x.grad, atol=1e-5, rtol=1e-5)
    for name, p in moe.named_parameters():
        torch.testing.assert_close(p.grad.double(), exact[name].grad, atol=1e-5, rtol=1e-5)
    (routing,) = routings
    assert routing.layer == 0 and routing.experts_NK.shape == (18, 3) and routing.scores_NE.shape == (18, 8)


def test_one_token_at_a_time_gives_the_same_rows():
    moe = random_moe()
    x_BTD = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(3))
    together = moe(x_BTD, None)
    for t in range(7):
        torch.testing.assert_close(moe(x_BTD[:, t : t + 1], None), together[:, t : t + 1], atol=1e-5, rtol=1e-5)


def test_without_shared_experts_only_the_routed_sum_is_left():
    moe, x_BTD = random_moe(), torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(3))
    assert moe.shared_experts is not None
    routed = moe(x_BTD, None) - moe.shared_experts(x_BTD)
    bare = random_moe(n_shared_experts=0)
    bare.load_state_dict({name: t for name, t in moe.state_dict().items() if "shared" not in name})
    torch.testing.assert_close(bare(x_BTD, None), routed, atol=1e-5, rtol=1e-5)


GROUPS = {
    "some empty": [0, 5, 5, 5, 12, 20],
    "one takes all": [0, 0, 20, 20, 20, 20],
    "last empty": [3, 7, 20, 20, 20, 20],
    "no row at all": [0, 0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("ends", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [24, 10], ids=["aligned", "unaligned"])
def test_grouped_matmul_equals_its_twin(ends: list[int], dtype: torch.dtype, width: int):
    """Forward and both gradients; a width of 10 BF16 numbers is no multiple of 16 bytes and must still work."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(ends[-1], 16, generator=generator).to(dtype)
    weight_EFD = torch.randn(6, width, 16, generator=generator).to(dtype)
    probe = torch.randn(ends[-1], width, generator=generator).to(dtype)
    ends_E = torch.tensor(ends, dtype=torch.int32)
    results = []
    for form in (grouped_matmul, grouped_matmul_ref):
        x, weight = x_ND.clone().requires_grad_(), weight_EFD.clone().requires_grad_()
        y = form(x, weight, ends_E)
        (y * probe).sum().backward()
        assert y.dtype == dtype and y.shape == (ends[-1], width)
        results.append((y.detach(), x.grad, weight.grad))
    rtol = 1e-5 if dtype == torch.float32 else 2**-7  # BF16: the last bit of a sum may round either way
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=rtol, rtol=rtol)


def test_an_expert_without_tokens_gets_a_zero_gradient():
    x_ND = torch.ones(4, 16)
    weight_EFD = torch.ones(3, 8, 16, requires_grad=True)
    y = grouped_matmul(x_ND, weight_EFD, torch.tensor([2, 2, 4], dtype=torch.int32))
    (y * torch.ones(4, 8)).sum().backward()
    assert weight_EFD.grad is not None
    assert weight_EFD.grad[:, 0, 0].tolist() == [2.0, 0.0, 2.0]
