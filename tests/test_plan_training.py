from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.model.presets import r1_distill_llama_8b, v2, v2_lite, v3
from abyssal.plan.layout import Layout
from abyssal.plan.machine_file import read_machine
from abyssal.plan.parameters import weights
from abyssal.plan.published_training import V3_LAYOUT
from abyssal.plan.training import TrainingPlan, flops_per_token, plan_training

H800 = read_machine("h800x2048")
DENSE = r1_distill_llama_8b()


def dense_plan(n_devices: int, rows: int = 64, **cut) -> TrainingPlan:
    machine = replace(H800, n_devices=n_devices)
    layout = Layout(micro_rows=1, precision="bfloat16", weights="bfloat16", kernels="fused", **cut)
    return plan_training(DENSE, machine=machine, layout=layout, row_len=1024, batch_rows=rows)


def test_flops_per_token_as_published():
    """GFLOP per token of ISCA 2025, table 2."""
    assert round(flops_per_token(v3(), 4096) / 1e9) == 250
    assert round(flops_per_token(v2(), 4096) / 1e9) == 155


def test_the_parts_of_a_step_and_of_memory_are_the_whole():
    plan = plan_training(v3(), machine=H800, layout=V3_LAYOUT, row_len=4096, batch_rows=4096)
    parts = [getattr(plan.step, f.name) for f in dataclasses.fields(plan.step)]
    assert all(part >= 0 for part in parts) and sum(parts) == pytest.approx(plan.step_seconds)
    busy = plan.step.compute_seconds + plan.step.exposed_communication_seconds + plan.step.bubble_seconds
    assert busy == pytest.approx(plan.timeline.step_seconds)
    for rank in plan.memory:
        held = {f.name: getattr(rank, f.name) for f in dataclasses.fields(rank) if f.name != "rank"}
        assert sum(held.values()) == rank.total_bytes
    assert [unit for stage in plan.stages for unit in stage] == list(range(64))  # embedding, 61 layers, head, MTP


def test_ranks_hold_every_weight_as_often_as_the_layout_says():
    """Pipeline ranks of DualPipe hold each stage twice; 64 expert ranks hold each expert once."""
    plan = plan_training(v3(), machine=H800, layout=V3_LAYOUT, row_len=4096, batch_rows=4096)
    every = weights(v3())
    routed = sum(w.n for w in every if w.is_routed)
    whole = sum(w.n for w in every if not w.is_routed)
    held = sum(rank.weights_bytes for rank in plan.memory) / 2  # numbers, of BF16
    assert held == 2 * (whole + routed / 64)


def test_the_optimizer_s_state_is_shared_out_once():
    """ZeRO 1: over all devices, each number has one FP32 master and two BF16 moments."""
    plan = plan_training(v3(), machine=H800, layout=V3_LAYOUT, row_len=4096, batch_rows=4096)
    trained = sum(w.n for w in weights(v3()) if w.is_trained)
    per_pipeline = sum(rank.master_bytes for rank in plan.memory) / 4
    assert per_pipeline * plan.layout.dp == pytest.approx(trained)
    assert sum(rank.moments_bytes for rank in plan.memory) == sum(rank.master_bytes for rank in plan.memory)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["dp", "tp", "ep"]),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 3),
    st.sampled_from([v2_lite(), DENSE]),
)
def test_more_devices_never_need_more_memory_on_each(way: str, already: int, zero: int, config):
    if way == "ep" and config.feed_forward == "dense":
        return
    layout = Layout(micro_rows=1, precision="bfloat16", weights="bfloat16", kernels="fused", zero=zero)

    def peak_bytes(n: int) -> float:
        cut = {} if way == "dp" else {way: n}
        machine = replace(H800, n_devices=n * 8 if way == "dp" else 8)
        plan = plan_training(config, machine=machine, layout=replace(layout, **cut), row_len=512, batch_rows=64)
        return plan.peak_memory_bytes

    assert peak_bytes(2 * already) <= peak_bytes(already)


@settings(max_examples=20, deadline=None)
@given(st.floats(1e6, 1e13), st.floats(1.0, 10.0))
def test_cost_grows_with_tokens(tokens: float, factor: float):
    plan = PLAN_8
    less, more = plan.for_tokens(tokens), plan.for_tokens(tokens * factor)
    assert less.cost_usd is not None and more.cost_usd is not None
    assert less.cost_usd <= more.cost_usd and less.hours <= more.hours
    assert more.device_hours == pytest.approx(8 * more.hours)
    assert more.cost_usd == pytest.approx(2 * more.device_hours)  # USD per H800 hour


PLAN_8 = dense_plan(8, tp=1, zero=1)


def test_longer_rows_and_larger_batches_take_longer():
    assert dense_plan(8, rows=64).step_seconds < dense_plan(8, rows=128).step_seconds
    machine = replace(H800, n_devices=8)
    layout = Layout(micro_rows=1, precision="bfloat16", weights="bfloat16", kernels="fused")
    seconds = [
        plan_training(DENSE, machine=machine, layout=layout, row_len=row_len, batch_rows=64).step_seconds
        for row_len in (512, 1024, 4096)
    ]
    assert seconds == sorted(seconds)


def test_what_a_device_sends_is_counted_by_hand():
    """Llama-8B in BF16 on two nodes of 8: tp=8, pp=2, one row of 1,024 tokens at a time, 4 of them."""
    plan = dense_plan(16, rows=4, tp=8, pp=2, schedule="1f1b")
    sent = {s.way: s for s in plan.sent}
    hidden = 2 * 1024 * 4096
    layers = max(len([unit for unit in stage if 1 <= unit <= 32]) for stage in plan.stages)
    # forward gathers and scatters twice a layer, backward the same and half as much again
    per_layer = 4 * hidden * 7 / 8 * 2.5
    assert sent["tensor"].intra_node_bytes in [4 * n * per_layer for n in (layers, 32 - layers)]
    assert sent["pipeline"].inter_node_bytes == 4 * 2 * hidden / 8
    assert (
        sent["experts"].inter_node_bytes == sent["context"].intra_node_bytes == sent["gradients"].inter_node_bytes == 0
    )


def test_what_is_computed_again_is_not_kept():
    kept = {
        recompute: plan_training(
            v3(), machine=H800, layout=replace(V3_LAYOUT, recompute=recompute), row_len=4096, batch_rows=4096
        )
        for recompute in ("none", "selective", "full")
    }
    by_size = sorted(kept, key=lambda name: kept[name].memory[3].activations_bytes)
    by_time = sorted(kept, key=lambda name: -kept[name].step_seconds)
    assert by_size == by_time == ["full", "selective", "none"]


def test_what_does_not_fit_is_told_what_to_change():
    plan = dense_plan(8)
    assert not plan.fits and "parallel.zero=" in plan.advice
    assert dense_plan(8, zero=1).advice == ""
    assert "of a step, then" in plan.bottleneck


def test_bad_sizes_are_refused_in_one_line():
    layouts = [
        (dict(pp=3), "does not go with schedule='none'"),
        (dict(tp=3), "does not divide 2048 devices"),
        (dict(pp=2, schedule="dualpipe", ep=1024, tp=2, dp=256), "parallel.ep=1024 does not divide"),
        (dict(chunks=2), "needs schedule='interleaved'"),
        (dict(dp=4096), "are more than there are: 2048"),
        (dict(zero=4), "use 0, 1, 2 or 3"),
    ]
    for sizes, message in layouts:
        with pytest.raises(ValueError, match=message) as caught:
            Layout(**sizes).on(H800)
        assert "\n" not in str(caught.value)
    small = replace(H800, n_devices=64)
    for config, cut, message in [
        (DENSE, dict(tp=64), "tp=64 does not divide 32 attention heads"),
        (DENSE, dict(ep=8), "ep=8 has no experts to share out"),
        (v2_lite(), dict(ep=32, tp=2, cp=2, dp=8, pp=2, schedule="1f1b"), None),
        (replace(v2_lite(), n_routed_experts=48), dict(ep=32), "ep=32 does not divide 48 routed experts"),
        (DENSE, dict(cp=64), "cp=64 does not divide rows of 1000 tokens"),
    ]:
        layout = Layout(kernels="fused", **cut)
        if message is None:
            assert plan_training(config, machine=small, layout=layout, row_len=1000, batch_rows=64).step_seconds > 0
            continue
        with pytest.raises(ValueError, match=message):
            plan_training(config, machine=small, layout=layout, row_len=1000, batch_rows=64)
    with pytest.raises(ValueError, match="100 rows of a step do not divide among dp=128"):
        plan_training(v3(), machine=H800, layout=V3_LAYOUT, row_len=4096, batch_rows=100)
