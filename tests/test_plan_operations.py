from __future__ import annotations

from dataclasses import replace

import pytest

from abyssal.model.presets import r1_distill_llama_8b, v2, v3
from abyssal.plan.operation import input_gradient, weight_gradient
from abyssal.plan.operations import head_operations, layer_operations, mtp_operations


def flops_of(operations) -> float:
    return sum(operation.flops for operation in operations)


def named(operations, name: str):
    return next(operation for operation in operations if operation.name == name)


def test_a_dense_gqa_layer_by_hand():
    """Llama-8B, 2 rows of 3 tokens: q 4096, k and v 1024 each, o 4096, three matrices of 14336, and the pairs a query
    sees, 1 + 2 + 3 in each row."""
    operations = layer_operations(r1_distill_llama_8b(), 0, n_rows=2, new_tokens=3, precision="bfloat16")
    weights = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    assert flops_of(operations) == 2 * 6 * weights + 2 * 2 * 6 * 32 * (128 + 128)


def test_a_v3_layer_s_products_multiply_each_active_weight_once():
    """187,107,328 weights of attention less norms; router; shared expert and 8 routed ones of 44,040,192."""
    config = v3()
    operations = layer_operations(config, 60, n_rows=1, new_tokens=4096, precision="fp8")
    products = [o for o in operations if o.kind in ("gemm", "grouped_gemm")]
    norms = 1536 + 512
    assert flops_of(products) == 2 * 4096 * (187_107_328 - norms + 256 * 7168 + 9 * 44_040_192)


def test_expert_ranks_share_the_experts_and_keep_the_rows():
    """64 ranks: 4 experts each, and of 4,096 tokens x 8 choices everywhere as many rows as a rank's tokens send out."""
    operation = named(layer_operations(v3(), 60, n_rows=1, new_tokens=4096, precision="fp8", ep=64), "experts_down")
    assert (operation.groups, operation.rows) == (4, 8192)
    assert (operation.inner, operation.outer) == (2048, 7168)


def test_few_tokens_meet_few_experts():
    """One token meets its 8 experts, once each."""
    operation = named(
        layer_operations(v3(), 60, n_rows=1, new_tokens=1, cached_tokens=99, precision="fp8", mode="decode"),
        "experts_gate_up",
    )
    assert (operation.groups, operation.rows) == (8, 1)


def test_decode_attends_to_latents():
    """One query against 100 tokens of 576 numbers, absorbed: 128 heads x 100 x (576 + 512) multiplications."""
    operations = layer_operations(
        v3(), 0, n_rows=1, new_tokens=1, cached_tokens=99, precision="bfloat16", mode="decode"
    )
    core = named(operations, "attention_core")
    assert core.flops == 2 * 100 * 128 * (576 + 512)
    assert core.moved_bytes == 2 * (100 * 576 + 128 * (576 + 512))


def test_backward_is_two_products_of_the_same_size():
    operation = named(layer_operations(v2(), 5, n_rows=1, new_tokens=64, precision="bfloat16"), "o_proj")
    (into_input,) = input_gradient(operation)
    into_weight, added = weight_gradient(operation, accumulated=True)
    assert (into_input.rows, into_input.inner, into_input.outer) == (64, 5120, 128 * 128)
    assert (into_weight.rows, into_weight.inner, into_weight.outer) == (128 * 128, 64, 5120)
    assert added.moved_bytes == 8 * 5120 * 128 * 128  # an FP32 sum is read and written
    assert weight_gradient(operation, accumulated=False) == [into_weight]
    norm = layer_operations(v2(), 5, n_rows=1, new_tokens=64, precision="bfloat16")[0]
    assert weight_gradient(norm, accumulated=True) == []


@pytest.mark.parametrize(("tp", "cp"), [(8, 1), (1, 4), (2, 2)])
def test_ranks_do_the_whole_work_between_them(tp: int, cp: int):
    """Attention, dense feed-forward, head: of MLA alone is something done more than once, latents under tp and what is
    projected up from them under cp."""
    config = replace(v3(), q_lora_rank=None, vocab_size=129_024)
    shape = {"n_rows": 2, "new_tokens": 1024, "precision": "bfloat16"}
    down = 2 * 2048 * 7168 * 576  # latent and rotated key
    up = 2 * 2048 * 512 * 128 * (128 + 128)
    whole, cut = (flops_of(layer_operations(config, 0, **shape, **ranks)) for ranks in ({}, {"tp": tp, "cp": cp}))
    assert cut * tp * cp == pytest.approx(whole + (tp - 1) * down + (cp - 1) * up)
    whole, cut = (flops_of(head_operations(config, **shape, **ranks)) for ranks in ({}, {"tp": tp, "cp": cp}))
    assert cut * tp * cp == pytest.approx(whole)
    config = r1_distill_llama_8b()
    whole, cut = (flops_of(layer_operations(config, 0, **shape, **ranks)) for ranks in ({}, {"tp": tp, "cp": cp}))
    assert cut * tp * cp == pytest.approx(whole)


def test_an_mtp_module_is_a_projection_a_block_and_the_head():
    config = v3()
    shape = {"n_rows": 1, "new_tokens": 128, "precision": "bfloat16"}
    whole = flops_of(mtp_operations(config, 0, **shape))
    block, head = flops_of(layer_operations(config, 61, **shape)), flops_of(head_operations(config, **shape))
    assert whole == block + head + 2 * 128 * 2 * 7168 * 7168
