"""Latent attention from grouped-query attention: the same function exactly, or a true DeepSeek-V3 shape nearly.

Exact: the shared rope key holds all KV heads' keys side by side, a head's query is zero outside its own group's place,
and the latent is all values. Same cache, same numbers; no published type has it, because the latent must not be
normalised, frequencies repeat and the softmax keeps its scale.

DeepSeek-V3's shape has one rope key of one head's width. At each frequency the KV heads' keys are mixed until one of
the mixtures carries most of what scores are made of: that one stays rotary. (RoRoPE of TransMLA; here over complex
numbers, which commute with RoPE as well and leave more in the first.) What remains loses its rotation, keeps the mean
turn of the distances at which each head looks, and goes with the values into one latent, by a PCA that weighs keys by
the queries that read them and values by the output projection. One place of the latent holds a constant far larger than
all others, so that the latent's norm divides every token by nearly the same number.
Letters: D width, H heads, G key-value heads, Q head width, P rotated pairs of a head (Q / 2), R rope width, C latent,
K numbers that the cache of GQA holds for a token (2 x G x Q), X rotated pairs that stay (R / 2), V value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from abyssal.model.config import ModelConfig
from abyssal.model.gqa import GQA
from abyssal.model.rope import rope_amplitude, rope_frequencies
from abyssal.model.transformer import Transformer
from abyssal.surgery.calibrate import AttentionStatistics

LOUD = 30.0  # the constant in the latent, as a multiple of the root mean square of all its other numbers together
FLOOR = 1e-6  # of the largest eigenvalue: directions below it are noise and must not be divided by


class Compression(NamedTuple):
    """latent = encode x, and x is nearly decode latent."""

    encode_CK: Tensor
    decode_KC: Tensor


class Latent(NamedTuple):
    """Rows that make it, the constant's last; its norm's weight; keys and values from all but the constant."""

    rows_CD: Tensor
    norm_C: Tensor
    keys_GQC: Tensor
    values_GQC: Tensor


class KeyBasis(NamedTuple):
    """The KV heads' keys at one frequency, mixed: into k = new keys, back new = k. Complex; the first `kept` rotate."""

    into_PGG: Tensor
    back_PGG: Tensor
    kept: int


def exact_config(config: ModelConfig) -> ModelConfig:
    """MLA that can hold every number of this GQA model."""
    check_source(config)
    groups, width = config.num_key_value_heads, config.head_dim
    return replace(
        _without_gqa(config),
        kv_lora_rank=groups * width,
        qk_nope_head_dim=0,
        qk_rope_head_dim=groups * width,
        v_head_dim=width,
        latent_norm=False,
        rope_theta=10000.0,
        rope_scaling=None,
        rope_inv_freq=tuple(rope_frequencies(config).repeat(groups).tolist()),
        attention_scale=_scale(config),
    )


def v3_config(config: ModelConfig, *, latent: int) -> ModelConfig:
    """DeepSeek-V3's attention with one head's width of rope and a latent of this width."""
    check_source(config)
    groups, width = config.num_key_value_heads, config.head_dim
    widest = (2 * groups - 1) * width + 1
    if not 2 <= latent <= widest:
        raise ValueError(
            f"latent={latent} does not fit {groups} KV heads of {width}: it holds a constant and at most "
            f"{widest - 1} numbers; use 2 to {widest}, or leave it out for the exact conversion"
        )
    return replace(
        _without_gqa(config),
        kv_lora_rank=latent,
        qk_nope_head_dim=width,
        qk_rope_head_dim=width,
        v_head_dim=width,
    )


def check_source(config: ModelConfig) -> None:
    if config.attention != "gqa":
        raise ValueError(f"attention={config.attention!r} is latent attention already; name a model with GQA or MHA")
    if config.qk_norm:
        raise ValueError("qk_norm=True: keys are normed head by head, which no latent can do; use a model without it")
    if config.num_nextn_predict_layers:
        raise ValueError(
            f"num_nextn_predict_layers={config.num_nextn_predict_layers}: MTP modules are not converted; use a "
            f"checkpoint without them"
        )


def _without_gqa(config: ModelConfig) -> ModelConfig:
    return replace(
        config,
        attention="mla",
        num_key_value_heads=0,
        head_dim=0,
        q_lora_rank=None,
        kv_lora_rank=1,
        qk_rope_head_dim=2,
        v_head_dim=1,
        rope_interleave=True,
    )


def _scale(config: ModelConfig) -> float:
    """What a score is multiplied by in all, the amplitude of queries' and keys' rotation included."""
    return config.softmax_scale * rope_amplitude(config) ** 2


@torch.no_grad()
def mla_from_gqa(
    model: Transformer, config: ModelConfig, statistics: Sequence[AttentionStatistics] | None = None
) -> Transformer:
    """A new model of `config`, which exact_config or v3_config made; the latter needs statistics of each layer.
    All weights outside attention are copied."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".self_attn." not in name}
    for layer, attention in enumerate(attentions(model)):
        if statistics is None:
            weights = exact_attention(attention, config)
        else:
            weights = v3_attention(attention, config, statistics[layer])
        weights["o_proj.weight"] = attention.o_proj.weight.clone()
        state |= {f"layers.{layer}.self_attn.{name}": tensor for name, tensor in weights.items()}
    with torch.device("meta"):
        converted = Transformer(config, dtype=model.dtype)
    converted.load_state_dict(state, assign=True)
    converted.rope_frequencies = rope_frequencies(config).to(model.rope_frequencies.device)
    return converted.requires_grad_(True)


def attentions(model: Transformer) -> list[GQA]:
    """Of all layers."""
    return [module for module in model.layers.modules() if isinstance(module, GQA)]


@torch.no_grad()
def exact_attention(attention: GQA, config: ModelConfig, basis: KeyBasis | None = None) -> dict[str, Tensor]:
    """All keys in the rope key, all values in the latent. In any basis the scores are the same."""
    source, device = attention.config, attention.q_proj.weight.device
    groups, width = source.num_key_value_heads, source.head_dim
    if basis is None:
        same_PGG = torch.eye(groups, dtype=torch.complex128, device=device).expand(width // 2, -1, -1)
        basis = KeyBasis(same_PGG, same_PGG, kept=groups)
    values = torch.eye(groups * width, dtype=torch.float64, device=device)
    return _assemble(
        attention,
        config,
        basis,
        latent_CD=_with_bias(attention.v_proj),
        k_nope_HNC=values.new_zeros(source.num_attention_heads, 0, groups * width),
        value_GVC=values.unflatten(0, (groups, width)),
    )


@torch.no_grad()
def v3_attention(attention: GQA, config: ModelConfig, statistics: AttentionStatistics) -> dict[str, Tensor]:
    source = attention.config
    groups, width, heads = source.num_key_value_heads, source.head_dim, source.num_attention_heads
    of_head_G = torch.arange(heads, device=attention.q_proj.weight.device) // (heads // groups)
    query_GQQ, output_GQQ = importance(attention, statistics)
    basis = key_basis(statistics, query_GQQ)
    rest_KK = rest_of(basis, groups=groups, width=width)
    weight_KK = torch.block_diag(*query_GQQ, *output_GQQ)
    code = compress(rest_KK @ statistics.cache_KK @ rest_KK.T, weight_KK, config.kv_lora_rank - 1)
    latent = loud_latent(attention, code.encode_CK @ rest_KK, code.decode_KC, statistics)
    keys_GPC = torch.view_as_complex(latent.keys_GQC.unflatten(1, (-1, 2)).movedim(2, -1).contiguous())
    k_nope_HPC = keys_GPC[of_head_G] * statistics.turn_HP[..., None]
    weights = _assemble(
        attention,
        config,
        basis,
        latent_CD=latent.rows_CD,
        k_nope_HNC=_with_column(pairs_to_rows(k_nope_HPC) * (_scale(source) / config.softmax_scale)),
        value_GVC=_with_column(latent.values_GQC),
    )
    return weights | {"kv_a_layernorm.weight": latent.norm_C.float()}


def loud_latent(attention: GQA, encode_CK: Tensor, decode_KC: Tensor, statistics: AttentionStatistics) -> Latent:
    """A code's rows with the constant below them, which makes the norm a division by nearly the same number always."""
    groups, width = attention.config.num_key_value_heads, attention.config.head_dim
    keys_GPD = _pairs(attention.k_proj, width)
    cache_KD = torch.cat((pairs_to_rows(keys_GPD).flatten(0, 1), _with_bias(attention.v_proj)))
    # rows of the size of those they are made of: an optimizer's step is then as small for the latent as for the rest
    size = _rms(cache_KD) / _rms(encode_CK @ cache_KD)
    rows_CD, decode_KC = size * encode_CK @ cache_KD, decode_KC / size
    loud = LOUD * size * (encode_CK @ statistics.cache_KK @ encode_CK.T).trace().sqrt()
    loud_D = torch.zeros_like(cache_KD[0])  # a bias's column stays 0
    loud_D[: len(statistics.constant_D)] = loud * statistics.constant_D
    n_places = len(rows_CD) + 1
    norm_C = (loud / n_places**0.5).expand(n_places).clone()  # what the norm divides by
    norm_C[-1] = n_places**-0.5  # the constant leaves as 1
    keys_GQC, values_GQC = decode_KC.unflatten(0, (2, groups, width))
    return Latent(torch.cat((rows_CD, loud_D[None])), norm_C, keys_GQC, values_GQC)


@torch.no_grad()
def importance(attention: GQA, statistics: AttentionStatistics) -> tuple[Tensor, Tensor]:
    """How much the layer's output moves, squared, with an error in keys and with one in values, two (G, Q, Q).

    An error e of a value v moves the output by p W_o e where p is the attention weight; an error of a score by
    p (v - o) W_o, with o the mean of what the head reads. So both count alike once scores are weighed by the spread of
    values: the two need no factor that balances them by hand.
    """
    groups, width = attention.config.num_key_value_heads, attention.config.head_dim
    o_DHQ = attention.o_proj.weight.double().unflatten(1, (-1, width))
    output_HQQ = torch.einsum("dhq,dhr->hqr", o_DHQ, o_DHQ)
    values = slice(groups * width, None)
    mean_K = statistics.cache_K[values]
    spread_KK = statistics.cache_KK[values, values] - mean_K[:, None] * mean_K
    spread_GQQ = torch.stack([spread_KK[i : i + width, i : i + width] for i in range(0, groups * width, width)])
    of_head = (groups, -1)
    output_GXQQ = output_HQQ.unflatten(0, of_head)
    moved_GX = torch.einsum("gxqr,gqr->gx", output_GXQQ, spread_GQQ).clamp(min=0)
    query_GQQ = torch.einsum("gx,gxqr->gqr", moved_GX, statistics.query_HQQ.unflatten(0, of_head))
    return query_GQQ * _scale(attention.config) ** 2, output_GXQQ.sum(1)


def key_basis(statistics: AttentionStatistics, query_GQQ: Tensor) -> KeyBasis:
    """At each frequency, the mixture of KV heads' keys that carries most of what scores are made of comes first."""
    groups, width = query_GQQ.shape[:2]
    key_GPAGPA = statistics.cache_KK[: groups * width, : groups * width].view(groups, -1, 2, groups, width // 2, 2)
    key_AAPGG = torch.einsum("gpahpb->abpgh", key_GPAGPA)
    real, imaginary = key_AAPGG[0, 0] + key_AAPGG[1, 1], key_AAPGG[1, 0] - key_AAPGG[0, 1]
    key_PGG = torch.complex(real, imaginary)
    read_PG = query_GQQ.diagonal(dim1=1, dim2=2).unflatten(1, (-1, 2)).sum(-1).T.sqrt()
    read_PG = (read_PG / read_PG.mean(1, keepdim=True).clamp(min=1e-30)).clamp(min=FLOOR)
    mixed_PGG = torch.linalg.eigh(key_PGG * read_PG[:, :, None] * read_PG[:, None, :]).eigenvectors.flip(-1)
    return KeyBasis(mixed_PGG.mH * read_PG[:, None, :], mixed_PGG / read_PG[:, :, None], kept=1)


def rest_of(basis: KeyBasis, *, groups: int, width: int) -> Tensor:
    """What is left of keys without the part that rotates, and all of the values: a projection, (K, K)."""
    rest_PGG = basis.back_PGG[:, :, basis.kept :] @ basis.into_PGG[:, basis.kept :]
    parts = (rest_PGG.real, -rest_PGG.imag, rest_PGG.imag, rest_PGG.real)
    blocks_GAGAP = torch.stack(parts).unflatten(0, (2, 2)).permute(3, 0, 4, 1, 2)
    rest_GPAGPA = torch.diag_embed(blocks_GAGAP, dim1=1, dim2=4)
    n_keys = groups * width
    values = torch.eye(n_keys, dtype=rest_GPAGPA.dtype, device=rest_GPAGPA.device)
    return torch.block_diag(rest_GPAGPA.reshape(n_keys, n_keys), values)


def compress(moments_KK: Tensor, weight_KK: Tensor, width: int) -> Compression:
    """The encoder and decoder of this width whose error, weighed by `weight`, is least over the text. (weighted PCA)"""
    values_K, vectors_KK = torch.linalg.eigh(weight_KK)
    root_K = values_K.clamp(min=FLOOR * float(values_K.max())).sqrt()
    root_KK, inverse_KK = (vectors_KK * scale_K @ vectors_KK.T for scale_K in (root_K, 1 / root_K))
    main_KC = torch.linalg.eigh(root_KK @ moments_KK @ root_KK).eigenvectors.flip(-1)[:, :width]
    return Compression(main_KC.T @ root_KK, inverse_KK @ main_KC)


def pairs_to_rows(pairs: Tensor) -> Tensor:
    """Complex (..., P, D) -> real (..., 2 P, D), the official order: a pair's two rows stand next to each other."""
    return torch.view_as_real(pairs).movedim(-1, -2).flatten(-3, -2)


def _pairs(linear: torch.nn.Linear, width: int) -> Tensor:
    """Weight and, as one more column, bias of a projection: complex, (heads, P, D or D + 1)."""
    return torch.complex(*_with_bias(linear).unflatten(0, (-1, width)).chunk(2, dim=1))


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _with_bias(linear: torch.nn.Linear) -> Tensor:
    weight = linear.weight if linear.bias is None else torch.cat((linear.weight, linear.bias[:, None]), dim=1)
    return weight.double()


def _with_column(x: Tensor) -> Tensor:
    """One more latent place, the constant, that nothing reads yet."""
    return torch.nn.functional.pad(x, (0, 1))


def _assemble(
    attention: GQA,
    config: ModelConfig,
    basis: KeyBasis,
    *,
    latent_CD: Tensor,
    k_nope_HNC: Tensor,
    value_GVC: Tensor,
) -> dict[str, Tensor]:
    """MLA's weights without o_proj and norm. Each cast to FP32 stands here."""
    source = attention.config
    width, heads = source.head_dim, source.num_attention_heads
    of_head_H = torch.arange(heads, device=value_GVC.device) // (heads // source.num_key_value_heads)
    q_HPD, k_GPD = _pairs(attention.q_proj, width), _pairs(attention.k_proj, width)
    into_PGG, back_PGG = (x.to(q_HPD.dtype) for x in (basis.into_PGG, basis.back_PGG))
    k_rope_XD = torch.einsum("pjg,gpd->jpd", into_PGG[:, : basis.kept], k_GPD).flatten(0, 1)
    factor = _scale(source) / (config.softmax_scale * rope_amplitude(config) ** 2)
    q_rope_HXD = torch.einsum("phj,hpd->hjpd", back_PGG[:, of_head_H, : basis.kept].conj(), q_HPD).flatten(1, 2)
    q_HND = pairs_to_rows(q_HPD)[:, : config.qk_nope_head_dim]
    q_HQD = torch.cat((q_HND, pairs_to_rows(q_rope_HXD)), dim=1)
    kv_a_WD = torch.cat((latent_CD, pairs_to_rows(k_rope_XD) * factor))
    kv_b_HKC = torch.cat((k_nope_HNC, value_GVC[of_head_H]), dim=1)
    weights = {"kv_b_proj.weight": kv_b_HKC.flatten(0, 1)}
    for name, rows in (("q_proj", q_HQD.flatten(0, 1)), ("kv_a_proj_with_mqa", kv_a_WD)):
        if source.qkv_bias:
            rows, weights[f"{name}.bias"] = rows[:, :-1], rows[:, -1]
        weights[f"{name}.weight"] = rows
    return {name: tensor.float().contiguous() for name, tensor in weights.items()}
