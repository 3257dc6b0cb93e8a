"""What every attention layer is told about its batch, and the masked softmax they share. Owns no weights.

Letters: B batch, T query tokens, S key tokens, H heads, G key-value heads, X query heads of each, R rotary width,
Q query/key head width, V value head width; M queries of one product (T x X); J tiles of L keys, Z products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.model.cache import CacheView

KEY_TILE = 64  # keys summed at a time where the order of sums is fixed
SHORT = 512 * 512  # query-key pairs up to which plain matmuls beat torch's fused CPU kernel, its backward above all


class AttentionContext(NamedTuple):
    """Made once a forward pass, read by all layers. `mask_BTS` is True where a query may look; None is plain causal."""

    cos: Tensor
    sin: Tensor
    mask_BTS: Tensor | None
    cache: CacheView | None


def segment_mask(segments_BT: Tensor) -> Tensor:
    """Causal, and only within one's own packed example. (B, T, T) bool; padding (segment 0) sees padding, never NaN."""
    same = segments_BT[:, :, None] == segments_BT[:, None, :]
    return same.tril()


def cached_mask(positions_BT: Tensor, n_keys: int) -> Tensor:
    """Key position s is visible to a query at position p when s <= p. (B, T, S) bool"""
    return torch.arange(n_keys, device=positions_BT.device) <= positions_BT[..., None]


def core_dtype(x: Tensor, *, invariant: bool = False) -> torch.dtype:
    """The type of attention's own products: BF16 stays, but for invariant mode; FP32 becomes FP64 on a CPU.

    Expanded and absorbed MLA, cached and packed rows sum in different orders. In FP64 those orders differ by less than
    FP32 can hold, so engine and trainer see the same FP32 numbers and, further on, choose the same experts.
    """
    if x.dtype == torch.float32 and not x.is_cuda:
        return torch.float64
    return torch.float32 if invariant else x.dtype


def attend(
    q_BTHQ: Tensor, k_BSGQ: Tensor, v_BSGV: Tensor, mask_BTS: Tensor | None, *, scale: float, core: torch.dtype
) -> Tensor:
    """Softmax attention, (B, T, H, V) in the type `core`, in whichever form is faster for the shape and the machine."""
    short = q_BTHQ.shape[1] * k_BSGQ.shape[1] <= SHORT
    if short and not q_BTHQ.is_cuda:
        if core == torch.float64 and torch.is_grad_enabled():
            return BackwardInFloat32.apply(q_BTHQ, k_BSGQ, v_BSGV, mask_BTS, scale)
        return attend_written_out(q_BTHQ, k_BSGQ, v_BSGV, mask_BTS, scale=scale, core=core)
    # values are padded to the key width: torch's fused kernels want equal widths
    value_width = v_BSGV.shape[-1]
    missing = q_BTHQ.shape[-1] - value_width
    v_BSGV = F.pad(v_BSGV, (0, missing)) if missing > 0 else v_BSGV
    mask = None if mask_BTS is None else mask_BTS[:, None]
    out_BHTV = F.scaled_dot_product_attention(
        q_BTHQ.transpose(1, 2).to(core),
        k_BSGQ.transpose(1, 2).to(core),
        v_BSGV.transpose(1, 2).to(core),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q_BTHQ.shape[2] != k_BSGQ.shape[2],
    )
    return out_BHTV.transpose(1, 2)[..., :value_width]


class WrittenOut(NamedTuple):
    """Attention's result and what it came from, laid out for products; queries carry the scale."""

    out_BTHV: Tensor
    q_BGMQ: Tensor
    k_BGSQ: Tensor
    v_BGSV: Tensor
    weights_BGMS: Tensor


def attend_written_out(
    q_BTHQ: Tensor, k_BSGQ: Tensor, v_BSGV: Tensor, mask_BTS: Tensor | None, *, scale: float, core: torch.dtype
) -> Tensor:
    """The same by plain products. Queries that share a key-value head meet its keys in one product, so that keys and
    values are moved once: cast and laid out head by head in one go, repeated for no head."""
    return _written_out(q_BTHQ, k_BSGQ, v_BSGV, mask_BTS, scale=scale, core=core).out_BTHV


def _written_out(
    q_BTHQ: Tensor, k_BSGQ: Tensor, v_BSGV: Tensor, mask_BTS: Tensor | None, *, scale: float, core: torch.dtype
) -> WrittenOut:
    (_, n_tokens, n_heads, _), n_groups = q_BTHQ.shape, k_BSGQ.shape[2]
    k_BGSQ, v_BGSV = _head_by_head(k_BSGQ, core), _head_by_head(v_BSGV, core)
    q_BGMQ = (_head_by_head(q_BTHQ, core) * scale).unflatten(1, (n_groups, -1)).flatten(2, 3)
    scores_BHTS = (q_BGMQ @ k_BGSQ.transpose(2, 3)).view(len(q_BTHQ), n_heads, n_tokens, -1)
    if mask_BTS is None:
        mask_BTS = torch.ones(scores_BHTS.shape[2:], dtype=torch.bool, device=q_BTHQ.device).tril()[None]
    scores_BHTS += torch.where(mask_BTS, 0.0, float("-inf")).to(core)[:, None]
    weights_BGMS = scores_BHTS.softmax(-1).view(*q_BGMQ.shape[:3], -1)  # torch sums a BF16 softmax in FP32, rounds once
    out_BTHV = (weights_BGMS @ v_BGSV).view(len(q_BTHQ), n_heads, n_tokens, -1).transpose(1, 2)
    return WrittenOut(out_BTHV, q_BGMQ, k_BGSQ, v_BGSV, weights_BGMS)


class BackwardInFloat32(torch.autograd.Function):
    """`attend_written_out` forward in FP64, backward in FP32.

    What goes forward must round to the engine's numbers, hence FP64. Gradients have nobody to agree with: FP32 halves
    the time of their products and what is kept for them.
    """

    @staticmethod
    def forward(ctx: Any, q_BTHQ: Tensor, k_BSGQ: Tensor, v_BSGV: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        out_BTHV, *inputs = _written_out(q_BTHQ, k_BSGQ, v_BSGV, mask, scale=scale, core=torch.float64)
        ctx.save_for_backward(*(x.float() for x in inputs))
        ctx.scale, ctx.dtypes = scale, (q_BTHQ.dtype, k_BSGQ.dtype, v_BSGV.dtype)
        return out_BTHV

    @staticmethod
    def backward(ctx: Any, grad_BTHV: Tensor) -> tuple[Tensor | None, ...]:
        q_BGMQ, k_BGSQ, v_BGSV, weights_BGMS = ctx.saved_tensors
        batch, n_tokens, n_heads, _ = grad_BTHV.shape
        grad_BGMV = _head_by_head(grad_BTHV, torch.float32).view(*q_BGMQ.shape[:3], -1)
        grad_weights_BGMS = grad_BGMV @ v_BGSV.transpose(2, 3)
        grad_scores_BGMS = torch._softmax_backward_data(grad_weights_BGMS, weights_BGMS, -1, torch.float32)
        grad_q_BHTQ = (grad_scores_BGMS @ k_BGSQ * ctx.scale).view(batch, n_heads, n_tokens, -1)
        grad_k_BGSQ = grad_scores_BGMS.transpose(2, 3) @ q_BGMQ
        grad_v_BGSV = weights_BGMS.transpose(2, 3) @ grad_BGMV
        grads = (grad_q_BHTQ, grad_k_BGSQ, grad_v_BGSV)
        return *(x.transpose(1, 2).to(dtype) for x, dtype in zip(grads, ctx.dtypes, strict=True)), None, None


def _head_by_head(x_BSGQ: Tensor, core: torch.dtype) -> Tensor:
    """(B, S, G, Q) -> (B, G, S, Q), laid out so, in one pass over memory."""
    return x_BSGQ.transpose(1, 2).to(core, memory_format=torch.contiguous_format).contiguous()


def attend_ref(q_BTHQ: Tensor, k_BSGQ: Tensor, v_BSGV: Tensor, mask_BTS: Tensor | None, *, scale: float) -> Tensor:
    """The plain twin: every head by itself, in the type of its inputs."""
    groups = q_BTHQ.shape[2] // k_BSGQ.shape[2]
    k_BSHQ, v_BSHV = k_BSGQ.repeat_interleave(groups, dim=2), v_BSGV.repeat_interleave(groups, dim=2)
    scores_BHTS = torch.einsum("bthq,bshq->bhts", q_BTHQ * scale, k_BSHQ)
    if mask_BTS is None:
        mask_BTS = torch.ones(scores_BHTS.shape[2:], dtype=torch.bool, device=q_BTHQ.device).tril()[None]
    weights_BHTS = scores_BHTS.masked_fill(~mask_BTS[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshv->bthv", weights_BHTS, v_BSHV)


def attend_in_tiles(q_BTHQ: Tensor, k_BSGQ: Tensor, v_BSGV: Tensor, mask_BTS: Tensor, *, scale: float) -> Tensor:
    """The same, (B, T, H, V), with sums in an order that the number of keys and rows does not change.

    Products are of the queries that share a key-value head (a multiple of 8 rows: fewer take other paths through a
    CPU's kernels) with KEY_TILE keys. Tiles are added one after the other; those that the mask hides add exact zeros.
    """
    (batch, n_tokens, n_heads, _), (_, n_keys, n_groups, width) = q_BTHQ.shape, v_BSGV.shape
    assert n_keys % KEY_TILE == 0, f"{n_keys} keys are not tiles of {KEY_TILE}"
    tiles = (n_keys // KEY_TILE, KEY_TILE)
    k_ZLQ, v_ZLV = (x.unflatten(1, tiles).transpose(2, 3).flatten(0, 2) for x in (k_BSGQ, v_BSGV))
    q_BGTXQ = (q_BTHQ * scale).unflatten(2, (n_groups, -1)).transpose(1, 2)
    rows = q_BGTXQ.shape[2:4]
    missing = -rows.numel() % 8
    q_BGMQ = F.pad(q_BGTXQ.flatten(2, 3), (0, 0, 0, missing))
    q_ZMQ = q_BGMQ[:, None].expand(-1, tiles[0], -1, -1, -1).flatten(0, 2)
    scores_ZML = torch.bmm(q_ZMQ, k_ZLQ.transpose(1, 2))[:, : rows.numel()]
    scores_BJGTXL = scores_ZML.reshape(batch, tiles[0], n_groups, *rows, KEY_TILE)
    mask_BJTL = mask_BTS.unflatten(2, tiles).transpose(1, 2)
    scores_BJGTXL = scores_BJGTXL.masked_fill(~mask_BJTL[:, :, None, :, None], float("-inf"))
    weights_BJGTXL = (scores_BJGTXL - scores_BJGTXL.amax((1, 5), keepdim=True)).exp()
    sums_BJGTX = weights_BJGTXL.sum(-1)
    weights_ZML = F.pad(weights_BJGTXL.flatten(0, 2).flatten(1, 2), (0, 0, 0, missing))
    parts_ZMV = torch.bmm(weights_ZML, v_ZLV)[:, : rows.numel()]
    parts_BJGTXV = parts_ZMV.reshape(batch, tiles[0], n_groups, *rows, width)
    sum_BGTX, out_BGTXV = sums_BJGTX[:, 0], parts_BJGTXV[:, 0]
    for tile in range(1, tiles[0]):
        sum_BGTX, out_BGTXV = sum_BGTX + sums_BJGTX[:, tile], out_BGTXV + parts_BJGTXV[:, tile]
    return (out_BGTXV / sum_BGTX[..., None]).transpose(1, 2).reshape(batch, n_tokens, n_heads, width)
