"""Attention's fast form against its plain twin: values and gradients, however many heads share a key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abyssal.model import attention
from abyssal.model.attention import attend, attend_ref, attend_written_out


def inputs(n_queries: int, n_keys: int, heads: int, groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, n_queries, heads, 8), (2, n_keys, groups, 8), (2, n_keys, groups, 6))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def ends_at(n_queries: int, n_keys: int) -> Tensor:
    """Two rows whose queries see another number of keys."""
    first = torch.tensor([n_keys - n_queries, 1])
    return torch.arange(n_keys) <= (first[:, None] + torch.arange(n_queries))[..., None]


@pytest.mark.parametrize("n_queries, n_keys, heads, groups", [(1, 20, 4, 2), (1, 9, 3, 1), (7, 12, 6, 2), (5, 8, 4, 4)])
def test_the_fast_form_is_the_plain_one(n_queries: int, n_keys: int, heads: int, groups: int):
    q, k, v = inputs(n_queries, n_keys, heads, groups)
    mask_BTS = ends_at(n_queries, n_keys)
    found = attend(q, k, v, mask_BTS, scale=0.3, core=torch.float64)  # its backward is in FP32
    with torch.no_grad():
        assert torch.equal(found, attend(q, k, v, mask_BTS, scale=0.3, core=torch.float64))
    by_autograd = attend_written_out(q, k, v, mask_BTS, scale=0.3, core=torch.float64)
    wanted = attend_ref(q.double(), k.double(), v.double(), mask_BTS, scale=0.3)
    assert found.shape == (2, n_queries, heads, 6) and found.dtype == torch.float64
    assert torch.allclose(found, wanted, rtol=0, atol=1e-14)
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    outs = (found, by_autograd, wanted)
    ours, autograds, plain = (torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in outs)
    for a, b, c in zip(ours, autograds, plain, strict=True):
        assert a.dtype == torch.float32 and torch.allclose(a, c, rtol=1e-5, atol=1e-6)
        assert torch.allclose(b, c, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("core", [torch.float32, torch.float64, torch.bfloat16])
def test_without_a_mask_a_query_sees_what_came_before(core: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    q, k, v = inputs(9, 9, 4, 2)
    causal = torch.ones(2, 9, 9, dtype=torch.bool).tril()
    wanted = attend_ref(q.double(), k.double(), v.double(), causal, scale=0.3)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.03}[core]
    for short in (attention.SHORT, 0):  # plain products, then torch's fused kernel
        monkeypatch.setattr(attention, "SHORT", short)
        for mask_BTS in (None, causal):
            found = attend(q, k, v, mask_BTS, scale=0.3, core=core)
            assert found.dtype == core and torch.allclose(found.double(), wanted, rtol=0, atol=tolerance)
