"""GGUF's tensors <-> official names. Owns llama.cpp's names, the order of rows in it, and what it stacks or splits.

One list serves both ways: an entry says which official tensors a GGUF tensor is made of, and how. Layouts differ in
three places:
  llama rotates neighbouring pairs, so within a head the rows of q and k go from halves to pairs;
  the experts of a layer are one tensor (E, ...);
  kv_b of MLA is split into k_b, transposed for the absorbed form, and v_b. Older files have kv_b whole.
Letters: H heads, N unrotated rows of a key, V rows of a value, R rotated rows, L latent, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from abyssal.model.config import ModelConfig

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
PARTS = ("gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """`official` has one name, or one for each expert of a stack. `n_dimensions` is the GGUF tensor's: files that
    llama.cpp itself wrote leave out leading ones."""

    gguf: str
    official: tuple[str, ...]
    n_dimensions: int = 2
    layout: Literal["same", "pairs", "rotated tail", "experts", "k_b", "v_b"] = "same"
    n_heads: int = 0


def entries(config: ModelConfig, arch: str, *, whole_kv_b: bool = False) -> Iterator[Entry]:
    """Every tensor of this shape, in the order of llama.cpp's converter. MTP layers have no place among them."""
    yield _same(EMBEDDING, "model.embed_tokens.weight")
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        yield _same(f"{theirs}attn_norm.weight", f"{ours}input_layernorm.weight", n_dimensions=1)
        if config.attention == "mla":
            yield from _mla(config, f"{ours}self_attn.", f"{theirs}attn_", whole_kv_b=whole_kv_b)
        else:
            yield from _gqa(config, f"{ours}self_attn.", f"{theirs}attn_", in_pairs=arch == "llama")
        yield _same(f"{theirs}attn_output.weight", f"{ours}self_attn.o_proj.weight")
        yield _same(f"{theirs}ffn_norm.weight", f"{ours}post_attention_layernorm.weight", n_dimensions=1)
        if config.is_moe(layer):
            yield from _moe(config, f"{ours}mlp.", theirs)
        else:
            yield from (_same(f"{theirs}ffn_{part}.weight", f"{ours}mlp.{part}_proj.weight") for part in PARTS)
    yield _same("output_norm.weight", "model.norm.weight", n_dimensions=1)
    if not config.tie_word_embeddings:
        yield _same(HEAD, "lm_head.weight")


def to_gguf(entry: Entry, weight: Tensor, config: ModelConfig) -> Tensor:
    """The official tensor, or the part of it that this GGUF tensor holds, with rows as there."""
    if entry.layout == "pairs":
        return pairs_from_halves(weight, entry.n_heads)
    if entry.layout == "rotated tail" and not config.rope_interleave:  # deepseek2 always rotates neighbouring pairs
        rows_HRC = weight.unflatten(0, (entry.n_heads, -1))
        tail_RC = rows_HRC[:, -config.qk_rope_head_dim :].flatten(0, 1)
        tail_HRC = pairs_from_halves(tail_RC, entry.n_heads).unflatten(0, (entry.n_heads, -1))
        return torch.cat((rows_HRC[:, : -config.qk_rope_head_dim], tail_HRC), dim=1).flatten(0, 1)
    if entry.layout in ("k_b", "v_b"):
        rows_HRL = weight.unflatten(0, (entry.n_heads, -1))
        k_HNL, v_HVL = rows_HRL.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        return k_HNL.transpose(1, 2) if entry.layout == "k_b" else v_HVL
    return weight


def pairs_from_halves(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of each head from r0 r1 .. s0 s1 .. to r0 s0 r1 s1 ..: what rotates together stands together."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def halves_from_pairs(weight: Tensor, n_heads: int) -> Tensor:
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def join_kv_b(k_b_HLN: Tensor, v_b_HVL: Tensor) -> Tensor:
    """(H (N + V), L), as the official kv_b_proj has them: each head's key rows, then its value rows."""
    return torch.cat((k_b_HLN.transpose(1, 2), v_b_HVL), dim=1).flatten(0, 1)


def _same(gguf: str, official: str, *, n_dimensions: int = 2) -> Entry:
    return Entry(gguf=gguf, official=(official,), n_dimensions=n_dimensions)


def _gqa(config: ModelConfig, ours: str, theirs: str, *, in_pairs: bool) -> Iterator[Entry]:
    n_rotated_heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": 0}
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        for part, n_heads in n_rotated_heads.items():
            yield Entry(
                gguf=f"{theirs}{part}.{kind}",
                official=(f"{ours}{part}_proj.{kind}",),
                n_dimensions=2 if kind == "weight" else 1,
                layout="pairs" if in_pairs and n_heads else "same",
                n_heads=n_heads,
            )
    if config.qk_norm:
        for part in ("q", "k"):
            yield _same(f"{theirs}{part}_norm.weight", f"{ours}{part}_norm.weight", n_dimensions=1)


def _mla(config: ModelConfig, ours: str, theirs: str, *, whole_kv_b: bool) -> Iterator[Entry]:
    n_heads = config.num_attention_heads
    if config.q_lora_rank is None:
        yield Entry(
            gguf=f"{theirs}q.weight", official=(f"{ours}q_proj.weight",), layout="rotated tail", n_heads=n_heads
        )
    else:
        yield _same(f"{theirs}q_a.weight", f"{ours}q_a_proj.weight")
        yield _same(f"{theirs}q_a_norm.weight", f"{ours}q_a_layernorm.weight", n_dimensions=1)
        yield Entry(
            gguf=f"{theirs}q_b.weight", official=(f"{ours}q_b_proj.weight",), layout="rotated tail", n_heads=n_heads
        )
    yield Entry(
        gguf=f"{theirs}kv_a_mqa.weight",
        official=(f"{ours}kv_a_proj_with_mqa.weight",),
        layout="rotated tail",
        n_heads=1,
    )
    yield _same(f"{theirs}kv_a_norm.weight", f"{ours}kv_a_layernorm.weight", n_dimensions=1)
    kv_b = f"{ours}kv_b_proj.weight"
    if whole_kv_b:
        yield _same(f"{theirs}kv_b.weight", kv_b)
        return
    yield Entry(gguf=f"{theirs}k_b.weight", official=(kv_b,), n_dimensions=3, layout="k_b", n_heads=n_heads)
    yield Entry(gguf=f"{theirs}v_b.weight", official=(kv_b,), n_dimensions=3, layout="v_b", n_heads=n_heads)


def _moe(config: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
    yield _same(f"{theirs}ffn_gate_inp.weight", f"{ours}gate.weight")
    if config.topk_method == "noaux_tc":
        yield _same(f"{theirs}exp_probs_b.bias", f"{ours}gate.e_score_correction_bias", n_dimensions=1)
    for part in PARTS:
        names = tuple(f"{ours}experts.{expert}.{part}_proj.weight" for expert in range(config.n_routed_experts))
        yield Entry(gguf=f"{theirs}ffn_{part}_exps.weight", official=names, n_dimensions=3, layout="experts")
    for part in PARTS:
        yield _same(f"{theirs}ffn_{part}_shexp.weight", f"{ours}shared_experts.{part}_proj.weight")
