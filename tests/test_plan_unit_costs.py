"""Seconds of operations and of a model's units, on a machine of round figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
from round_machine import given, linked, round_machine

from abyssal.model.presets import r1_distill_llama_8b, v2_lite
from abyssal.plan.layout import Layout
from abyssal.plan.operations import layer_operations
from abyssal.plan.roofline import WorkSeconds, seconds_of, work_of
from abyssal.plan.training import stage_seconds
from abyssal.plan.unit_costs import UnitCost, unit_cost, unit_kinds

ROUND = round_machine()
LLAMA = r1_distill_llama_8b()
LAYOUT = Layout(kernels="fused", precision="bfloat16", weights="bfloat16", dp=8)


def unit(kind, config, *, machine=ROUND, accumulated: bool = False, **changes) -> UnitCost:
    return unit_cost(
        kind, config, machine=machine, layout=replace(LAYOUT, **changes), precision="bfloat16", micro_rows=1,
        row_len=4096, accumulated=accumulated,
    )  # fmt: skip


def test_products_by_their_rate_passes_by_their_bytes():
    operations = {o.name: o for o in layer_operations(LLAMA, 0, n_rows=1, new_tokens=4096, precision="bfloat16")}
    product, norm, core = operations["o_proj"], operations["input_norm"], operations["attention_core"]
    assert seconds_of(product, ROUND) == pytest.approx(2 * 4096**3 / 100e12)
    assert seconds_of(norm, ROUND) == pytest.approx(2 * 2 * 4096 * 4096 / 1e12)
    pairs = 4096 * 4097 / 2
    assert seconds_of(core, ROUND) == pytest.approx(2 * pairs * 32 * (128 + 128) / 100e12)
    assert seconds_of(core, round_machine(attention_forward_flops_per_second=given(1e18))) == pytest.approx(
        core.moved_bytes / 1e12  # then the memory is slower
    )


def test_communication_takes_compute_units_and_no_memory():
    machine = round_machine(communication_share=given(0.2))
    assert WorkSeconds(8.0, 3.0, 1.0).beside_communication(machine) == 8 / 0.8 + 3 + 1
    norm = layer_operations(LLAMA, 0, n_rows=1, new_tokens=64, precision="bfloat16")[0]
    assert work_of(norm, machine).units_seconds == 0


def test_a_layer_forward_backward_and_again():
    """Backward of products and of attention takes twice the forward's, attention's scores made again half of that more;
    computing all again is one forward more."""
    plain, again = unit("dense", LLAMA), unit("dense", LLAMA, recompute="full")
    core = 2 * 4096 * 4097 / 2 * 32 * 256 / 100e12
    products = plain.forward.units_seconds - core
    assert plain.backward_input.units_seconds == pytest.approx(products + 2.5 * core)
    assert plain.backward_weight.units_seconds == pytest.approx(products)
    assert again.backward_input.total_seconds == pytest.approx(
        plain.backward_input.total_seconds + plain.forward.total_seconds
    )
    assert again.saved_bytes == 2 * 4096 * 4096  # what came into the layer
    added = unit("dense", LLAMA, accumulated=True).backward_weight.passes_seconds
    assert added == pytest.approx(8 * (4096 * (4096 + 2048) + 4096**2 + 3 * 4096 * 14336) / 1e12)


def test_the_fullest_rank_holds_up_all():
    even, uneven = (unit("moe", v2_lite(), expert_imbalance=share) for share in (0.0, 0.5))
    operations = layer_operations(v2_lite(), 1, n_rows=1, new_tokens=4096, precision="bfloat16")
    routed = sum(seconds_of(o, ROUND) for o in operations if o.routed)
    assert uneven.forward.total_seconds - even.forward.total_seconds == pytest.approx(routed / 2)


def test_shared_experts_hide_what_pairs_hide_all_of():
    machine = round_machine(**linked(16), communication_share=given(0.2))
    moe = unit("moe", v2_lite(), machine=machine, ep=16, dp=16)
    experts = moe.forward_experts_seconds
    assert experts > 0 and moe.backward_experts_seconds == experts
    bare, beside = (
        stage_seconds(moe, machine, replace(LAYOUT, pp=2, schedule="1f1b", overlap_expert_communication=overlap))
        for overlap in (False, True)
    )
    assert bare.forward_seconds == pytest.approx(moe.forward.total_seconds + experts)
    assert bare.forward_seconds - beside.forward_seconds == pytest.approx(
        min(experts, moe.beside_experts.total_seconds)
    )
    pair = stage_seconds(moe, machine, replace(LAYOUT, pp=2, schedule="dualpipe", overlap_expert_communication=True))
    slowed = moe.work.units_seconds / 0.8 + moe.work.passes_seconds + moe.work.calls_seconds
    assert pair.pair_seconds == pytest.approx(
        min(max(slowed, 2 * experts), pair.forward_seconds + pair.backward_seconds)
    )


def test_units_in_the_order_of_a_micro_batch():
    config = replace(v2_lite(), num_hidden_layers=3, num_nextn_predict_layers=1)
    assert unit_kinds(config) == ["embedding", "dense", "moe", "moe", "head", "mtp"]
