"""What torch really does where a good kernel would take one pass: this project's own training, operation by operation.

Owns how many numbers each of our modules reads and writes, forward and backward, when every one of torch's operations
is a pass of its own, and how many operations those are; products stay what they are, but for those that a good kernel
joins. Counted from the code (a norm is pow, mean, rsqrt and two products, ...); a test lets the code run and counts
again. What it keeps in memory is eager_memory.py's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from abyssal.model.config import ModelConfig
from abyssal.plan.operation import Operation

# name of a pass -> (numbers moved forward, backward, for each number of its own; operations forward, backward)
NORM = (7.0, 24.0, 6, 14)
ROTATION = (9.5, 14.5, 7, 10)
SWIGLU = (5.0, 9.0, 2, 3)
EXPERTS_SWIGLU = (5.0, 13.0, 2, 4)  # gate and up are halves of one product: backward joins them
PERMUTE = (2.0, 1.8, 22, 2)  # with what finds each row its place
UNPERMUTE = (5.3, 10.1, 3, 5)
ROUTER = (27.0, 29.0, 27, 23)  # with the sequence-wise balance loss
ADD = (3.0, 3.0, 1, 1)
LOSS = (2.0, 4.0, 2, 2)
FLOAT64 = 2  # attention's own products on a CPU are in FP64 where the rest is in FP32 (model/attention.py)


def as_torch_runs(
    operations: Iterable[Operation], config: ModelConfig, *, n_tokens: int, on_cpu: bool
) -> list[Operation]:
    """The same operations in FP32 or BF16 with each pass as torch makes it."""
    written: list[Operation] = []
    for operation in operations:
        if operation.kind == "memory":
            written.append(_pass(operation, config, n_tokens, on_cpu=on_cpu))
        else:
            written += _products(operation, config, on_cpu=on_cpu)
    return written


def _pass(operation: Operation, config: ModelConfig, n_tokens: int, *, on_cpu: bool) -> Operation:
    name, wide = operation.name, 4.0 if operation.precision == "float32" else 2.0
    if name.endswith("norm"):
        return _moved(operation, NORM, operation.moved_bytes / 2)
    if name == "rope":
        return _attention_inputs(operation, config, n_tokens, on_cpu=on_cpu)
    if name == "experts_swiglu":
        return _moved(operation, EXPERTS_SWIGLU, operation.moved_bytes / 3)
    if name.endswith("swiglu"):  # and the gradients of the input, which come from two products, are added
        moved = _moved(operation, SWIGLU, operation.moved_bytes / 3)
        joined = ADD[0] * wide * n_tokens * config.hidden_size
        return replace(moved, backward_bytes=moved.backward_bytes + joined, backward_calls=moved.backward_calls + 1)
    if name == "permute":
        return _moved(operation, PERMUTE, operation.moved_bytes / 2)
    if name == "unpermute":
        return _moved(operation, UNPERMUTE, operation.moved_bytes / 2)
    if name == "top_k":
        return _moved(operation, ROUTER, 4.0 * n_tokens * config.n_routed_experts)
    if name == "loss":
        chosen = 2 * wide * n_tokens * config.hidden_size  # the places that have a target
        moved = _moved(operation, LOSS, operation.moved_bytes)
        return replace(
            moved, moved_bytes=moved.moved_bytes + chosen, backward_bytes=moved.backward_bytes + 2 * chosen
        )
    if name == "embedding":  # backward fills a gradient as large as the table
        table = 4.0 * config.vocab_size * config.hidden_size
        return replace(operation, backward_bytes=operation.backward_bytes + table, calls=1, backward_calls=2)
    return operation


def _attention_inputs(operation: Operation, config: ModelConfig, n_tokens: int, *, on_cpu: bool) -> Operation:
    """Rotations, the casts to the type of attention's own products, and MLA's keys and queries put together."""
    n, wide = n_tokens, 4.0 if operation.precision == "float32" else 2.0
    core = wide * (FLOAT64 if on_cpu and operation.precision == "float32" else 1)
    heads = config.num_attention_heads
    if config.attention == "mla":
        rope, query = config.qk_rope_head_dim, config.qk_head_dim
        latent, value = config.kv_lora_rank, config.v_head_dim
        nope_value = config.qk_nope_head_dim + value
        rotated = wide * n * (heads + 1) * rope
        entries, queries, values = n * (latent + rope), n * heads * query, n * heads * value
        cast = (wide + core) if core != wide else 0.0
        forward = (
            2 * wide * entries  # joined as the cache would keep them
            + cast * (queries + entries + values)
            + 2 * 2 * core * queries  # queries and keys joined
            + 2 * wide * values  # laid out for the product behind
        )
        backward = (
            cast * (queries + entries + values)
            + 2 * core * n * heads * nope_value
            + core * n * heads * rope  # the shared key's gradient, summed over heads
            + 2 * core * entries
            + 2 * wide * queries
            + 4 * wide * n * latent  # queries' and keys' gradients meet
        )
        calls, backward_calls = 2 * ROTATION[2] + 10, 2 * ROTATION[3] + 12
    else:
        kv_heads, width = config.num_key_value_heads, config.head_dim
        rotated = wide * n * (heads + kv_heads) * width
        values = n * heads * width
        cast = (wide + core) if core != wide else 0.0
        forward = cast * values + 2 * wide * values  # casts of what goes in are the core's own
        backward = cast * values + 2 * ADD[0] * wide * n * config.hidden_size  # three products' input gradients meet
        calls, backward_calls = 2 * ROTATION[2] + 2, 2 * ROTATION[3] + 3
    return replace(
        operation,
        moved_bytes=ROTATION[0] * rotated + forward,
        backward_bytes=ROTATION[1] * rotated + backward,
        calls=calls,
        backward_calls=backward_calls,
    )


def _products(operation: Operation, config: ModelConfig, *, on_cpu: bool) -> list[Operation]:
    """Products that a good kernel joins are apart, and MLA's up-projection of keys and values is in FP64 on a CPU."""
    name = operation.name
    if name == "kv_b_proj" and on_cpu and operation.precision == "float32":
        return [replace(operation, groups=FLOAT64)]
    if name in ("q_a_kv_a_proj", "q_kv_a_proj"):
        behind = config.kv_lora_rank + config.qk_rope_head_dim
        return _apart(operation, (operation.outer - behind, behind))
    if name.endswith("gate_up") and operation.kind == "gemm":
        return _apart(operation, (operation.outer // 2, operation.outer // 2))
    if name == "qkv_proj":
        one = config.num_key_value_heads * config.head_dim
        return _apart(operation, (operation.outer - 2 * one, one, one))
    return [operation]


def _apart(operation: Operation, outers: tuple[int, ...]) -> list[Operation]:
    parts = []
    for k, outer in enumerate(outers):
        share = outer / operation.outer
        parts.append(
            replace(
                operation,
                outer=outer,
                flops=operation.flops * share,
                moved_bytes=operation.moved_bytes * share,
                weights=operation.inner * outer * operation.groups,
                saved_bytes=operation.saved_bytes if k == 0 else 0.0,
                selective_saved_bytes=operation.selective_saved_bytes if k == 0 else 0.0,
            )
        )
    return parts


def _moved(operation: Operation, times: tuple[float, float, int, int], own_bytes: float) -> Operation:
    forward, backward, calls, backward_calls = times
    return replace(
        operation,
        moved_bytes=forward * own_bytes,
        backward_bytes=backward * own_bytes,
        calls=calls,
        backward_calls=backward_calls,
    )
