"""What one layer, the embedding and the head do to a batch: products and passes over memory, operation by operation.

Owns which operations there are and their shapes, no seconds: those are `roofline.py`'s. Counted as good kernels work: a
norm, a rotation or a SwiGLU is one pass; attention never writes its scores; FP8 products have their inputs quantised
in a pass of their own, as it is done (DeepSeek-V3 section 3.5.2; memory).
A multiply and an add are two FLOP. Causal attention counts only the pairs that a query may see.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from abyssal.model.config import ModelConfig
from abyssal.plan.layout import NUMBER_BYTES
from abyssal.plan.machine_file import Precision
from abyssal.plan.operation import Batch, Operation, OperationWriter, not_fp8

Mode = Literal["train", "prefill", "decode"]


def layer_operations(
    config: ModelConfig,
    layer: int,
    *,
    n_rows: int,
    new_tokens: int,
    cached_tokens: int = 0,
    precision: Precision,
    mode: Mode = "train",
    tp: int = 1,
    cp: int = 1,
    ep: int = 1,
    cache_bytes_per_number: float = 2.0,
) -> list[Operation]:
    """Forward operations of one block on one rank; layers from `num_hidden_layers` on are MTP blocks.

    `new_tokens` are computed in each of `n_rows` sequences, behind `cached_tokens` that the cache holds. In "decode"
    MLA works absorbed: each head attends to the latents themselves. Experts' rows are spread evenly.
    """
    batch = Batch(n_rows, new_tokens, cached_tokens, tp, cp, ep)
    of = OperationWriter(precision, batch)
    d = config.hidden_size
    operations = [of.norm("input_norm", "attention", d)]
    if config.attention == "mla":
        operations += _mla(config, of, mode=mode, cache_bytes_per_number=cache_bytes_per_number)
    else:
        operations += _gqa(config, of, mode=mode, cache_bytes_per_number=cache_bytes_per_number)
    operations += [of.add("attention_residual", "attention", d)]
    if config.is_moe(layer):
        operations += [of.norm("post_norm", "router", d), *_moe(config, of)]
    else:
        operations += [of.norm("post_norm", "feed_forward", d)]
        operations += _ffn(of, "ffn", d, config.intermediate_size)
        operations += [of.add("feed_forward_residual", "feed_forward", d)]
    return operations


def embedding_operations(
    config: ModelConfig, *, n_rows: int, new_tokens: int, precision: Precision, tp: int = 1, cp: int = 1
) -> list[Operation]:
    """The table's rows are read and written as hidden states; backward adds a token's gradient to its row in FP32."""
    of = OperationWriter(precision, Batch(n_rows, new_tokens, tp=tp, cp=cp))
    numbers = of.batch.own_tokens * config.hidden_size
    return [of.memory("embedding", "embedding", 2 * of.wide * numbers, backward_bytes=(of.wide + 8) * numbers)]


def head_operations(
    config: ModelConfig,
    *,
    n_rows: int,
    new_tokens: int,
    precision: Precision,
    mode: Mode = "train",
    tp: int = 1,
    cp: int = 1,
) -> list[Operation]:
    """Final norm, the head's product, BF16 even under FP8 (DeepSeek-V3 section 3.3.1), and, in training, the loss.

    The loss reads the logits once forward and turns them into their gradient backward.
    """
    batch = Batch(n_rows, new_tokens, tp=tp, cp=cp)
    of = OperationWriter(not_fp8(precision), batch)
    vocabulary = _share(config.vocab_size, tp)
    operations = [
        of.norm("final_norm", "head", config.hidden_size),
        of.product("lm_head", "head", config.hidden_size, vocabulary, saved="hidden"),
    ]
    if mode == "train":
        numbers = batch.n_tokens * vocabulary
        logits = of.wide * numbers
        operations.append(of.memory("loss", "head", logits, backward_bytes=2 * logits, saved=logits, selective=logits))
    return operations


def mtp_operations(
    config: ModelConfig,
    k: int,
    *,
    n_rows: int,
    new_tokens: int,
    precision: Precision,
    tp: int = 1,
    cp: int = 1,
    ep: int = 1,
) -> list[Operation]:
    """The whole k-th module, k from 0, in training: the embedding of the token ahead, both norms, the projection of the
    joined pair, its block, and the head and loss that it shares with the main model. (DeepSeek-V3 section 2.2)"""
    batch = Batch(n_rows, new_tokens, tp=tp, cp=cp, ep=ep)
    of = OperationWriter(precision, batch)
    d = config.hidden_size
    table = embedding_operations(config, n_rows=n_rows, new_tokens=new_tokens, precision=precision, tp=tp, cp=cp)
    layer = config.num_hidden_layers + k
    block = layer_operations(
        config, layer, n_rows=n_rows, new_tokens=new_tokens, precision=precision, tp=tp, cp=cp, ep=ep
    )
    head = head_operations(config, n_rows=n_rows, new_tokens=new_tokens, precision=precision, tp=tp, cp=cp)
    operations = [
        *table,
        of.norm("enorm", "mtp", d),
        of.norm("hnorm", "mtp", d),
        *of.quantise("eh_proj", "mtp", 2 * d),
        of.product("eh_proj", "mtp", 2 * d, d, saved="hidden"),
        *block,
        *head,
    ]
    return [replace(operation, part="mtp") for operation in operations]


def _mla(config: ModelConfig, of: OperationWriter, *, mode: Mode, cache_bytes_per_number: float) -> list[Operation]:
    heads, d = _share(config.num_attention_heads, of.batch.tp), config.hidden_size
    nope, rope, value, latent = (
        config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank,
    )  # fmt: skip
    n, wide = of.batch.n_tokens, of.wide
    operations = of.quantise("attention_input", "attention", d)
    if config.q_lora_rank is None:
        width = heads * config.qk_head_dim + latent + rope
        operations.append(of.product("q_kv_a_proj", "attention", d, width, saved="hidden"))
    else:
        rank = config.q_lora_rank
        operations += [
            of.product("q_a_kv_a_proj", "attention", d, rank + latent + rope, saved="hidden"),
            of.norm("q_a_norm", "attention", rank, sharded=False),
            *of.quantise("q_latent", "attention", rank),
            of.product("q_b_proj", "attention", rank, heads * config.qk_head_dim, saved="input"),
        ]
    if config.latent_norm:
        operations.append(of.norm("kv_a_norm", "attention", latent, sharded=False))
    if mode == "decode":
        in_bf16 = OperationWriter(not_fp8(of.precision), of.batch)  # the two halves of kv_b_proj, as engines keep them
        operations += [
            of.memory("rope", "attention", 2 * wide * n * (heads + 1) * rope),
            in_bf16.product("absorb_keys", "attention", nope, latent, groups=heads),
            of.decode_core(
                heads=heads, key=latent + rope, value=latent, held=latent + rope,
                cache_bytes_per_number=cache_bytes_per_number,
            ),
            in_bf16.product("absorb_values", "attention", latent, value, groups=heads),
        ]  # fmt: skip
    else:
        # of a query only the rotated part is touched; a key is put together from its own part and the shared one
        assembled = n * heads * (2 * rope + (2 * nope + 2 * rope))
        cached = of.batch.n_rows * of.batch.cached_tokens
        up = of.product("kv_b_proj", "attention", latent, heads * (nope + value), saved="input", more_rows=cached)
        operations += [
            *of.quantise("kv_latent", "attention", latent),
            up,
            *_of_others(up, of.batch.cp),
            of.memory("rope", "attention", wide * assembled, backward_bytes=wide * assembled, recomputed=True),
            of.core(heads=heads, kv_heads=heads, key=nope + rope, value=value, made_again=True),
        ]
    return [
        *operations,
        *of.quantise("attention_output", "attention", heads * value, kept=True),
        of.product("o_proj", "attention", heads * value, d, saved="attention"),
    ]


def _of_others(up: Operation, cp: int) -> list[Operation]:
    """Latents of other context parallel ranks, which pass by one after the other, are projected up here as well."""
    if cp == 1:
        return []
    times = cp - 1
    return [
        replace(
            up, name="kv_b_proj_of_others", kind="grouped_gemm", groups=times, calls=times, backward_calls=times,
            flops=times * up.flops, moved_bytes=times * up.moved_bytes, backward_bytes=times * up.backward_bytes,
            saved_bytes=0.0,
        )
    ]  # fmt: skip


def _gqa(config: ModelConfig, of: OperationWriter, *, mode: Mode, cache_bytes_per_number: float) -> list[Operation]:
    heads, width = _share(config.num_attention_heads, of.batch.tp), config.head_dim
    kv_heads = _share(config.num_key_value_heads, of.batch.tp)
    d, n = config.hidden_size, of.batch.n_tokens
    rotated = 2 * of.wide * n * (heads + kv_heads) * width
    operations = [
        *of.quantise("attention_input", "attention", d),
        of.product("qkv_proj", "attention", d, (heads + 2 * kv_heads) * width, saved="hidden"),
    ]
    if config.qk_norm:
        operations.append(of.memory("qk_norm", "attention", rotated, backward_bytes=1.5 * rotated, saved=rotated / 2))
    operations.append(of.memory("rope", "attention", rotated, backward_bytes=rotated))
    if mode == "decode":
        held = 2 * kv_heads * width
        core = of.decode_core(
            heads=heads, key=width, value=width, held=held, cache_bytes_per_number=cache_bytes_per_number
        )
    else:
        core = of.core(heads=heads, kv_heads=kv_heads, key=width, value=width)
    return [
        *operations,
        core,
        *of.quantise("attention_output", "attention", heads * width, kept=True),
        of.product("o_proj", "attention", heads * width, d, saved="attention"),
    ]


def _ffn(of: OperationWriter, name: str, d: int, width: int, *, quantised: bool = False) -> list[Operation]:
    """SwiGLU whose two input projections are one product, `quantised`: of an input that is quantised already."""
    width = _share(width, of.batch.tp)
    n = of.batch.n_tokens
    return [
        *([] if quantised else of.quantise(f"{name}_input", "feed_forward", d)),
        of.product(f"{name}_gate_up", "feed_forward", d, 2 * width, saved="none" if quantised else "hidden"),
        of.swiglu(f"{name}_swiglu", "feed_forward", n * width),
        *of.quantise(f"{name}_inner", "feed_forward", width),
        of.product(f"{name}_down", "feed_forward", width, d, saved="input"),
    ]


def _moe(config: ModelConfig, of: OperationWriter) -> list[Operation]:
    d, width, k, n_experts = (
        config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok, config.n_routed_experts,
    )  # fmt: skip
    own = of.batch.own_tokens  # expert ranks are found among tp too, so each rank dispatches its own tokens
    in_fp32 = OperationWriter("float32", of.batch)
    assigned = own * k  # rows that this rank's experts get: as many as its tokens send out
    held = max(1, n_experts // of.batch.ep)
    # at few tokens most experts have none, and those are neither read nor computed
    busy = min(held, max(1, round(held * (1 - (1 - k / n_experts) ** (own * of.batch.ep)))))
    rows = max(1, round(assigned / busy))
    each = NUMBER_BYTES[of.precision]
    operations = [
        # in FP32, as V2's and V3's released code has it (modeling_deepseek.py, MoEGate)
        of.memory("router_cast", "router", (of.wide + 4) * own * d, backward_bytes=(of.wide + 4) * own * d),
        in_fp32.product("router", "router", d, n_experts, tokens=own),
        in_fp32.memory("top_k", "router", 3 * 4 * own * n_experts, backward_bytes=2 * 4 * own * n_experts,
                       saved=4 * own * n_experts, selective=4 * own * n_experts),
        *of.quantise("moe_input", "experts", d, tokens=own, kept=True),
    ]  # fmt: skip
    turned = each if of.precision == "fp8" else 0  # its tiles, for the weights' gradients
    routed = [
        of.memory("permute", "experts", 2 * each * assigned * d, backward_bytes=2 * (of.wide + turned) * assigned * d,
                  saved=each * assigned * d, selective=each * assigned * d),
        of.grouped("experts_gate_up", d, 2 * width, groups=busy, rows=rows, held=held),
        of.swiglu("experts_swiglu", "experts", assigned * width),
        *of.quantise("experts_inner", "experts", width, tokens=assigned),
        of.grouped("experts_down", width, d, groups=busy, rows=rows, held=held, saved=True),
        of.memory("unpermute", "experts", 2 * of.wide * assigned * d, backward_bytes=2 * of.wide * assigned * d),
    ]  # fmt: skip
    operations += [replace(operation, routed=True) for operation in routed]
    if config.n_shared_experts:
        operations += _ffn(of, "shared", d, config.n_shared_experts * width, quantised=True)
    return [*operations, of.add("experts_residual", "experts", d, n_terms=3 if config.n_shared_experts else 2)]


def _share(size: int, tp: int) -> int:
    """This rank's part of heads, widths or vocabulary; what does not divide is filled up."""
    return -(-size // tp)
