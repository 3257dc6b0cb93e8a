from __future__ import annotations

from dataclasses import replace

import pytest

from abyssal.model.presets import r1_distill_llama_8b, v3
from abyssal.plan.communication import Group, gradient_groups
from abyssal.plan.layout import Layout
from abyssal.plan.machine_file import read_machine
from abyssal.plan.memory import held_weights
from abyssal.plan.parameters import weights
from abyssal.plan.weight_updates import exposed_gradient_seconds, gradient_traffic, optimizer_seconds

H800 = read_machine("h800x2048")
NODE = replace(H800, n_devices=8)
DENSE = weights(r1_distill_llama_8b())
N = sum(w.n for w in DENSE)


def held(layout: Layout, machine=NODE, tensors=DENSE):
    return held_weights(tensors, layout, gradient_groups(layout, machine))


def test_adamw_passes_by_hand():
    """FP32 all through: the norm reads a gradient, the update reads it, reads and writes master and two moments, and
    clears the gradient: 4 x (1 + 1 + 2 + 4 + 1) bytes."""
    layout = Layout(dp=1)
    seconds = optimizer_seconds(held(layout), layout, NODE, optimizer="adamw", precision="bfloat16")
    assert seconds == pytest.approx(36 * N / NODE.memory_bytes_per_second.value)


def test_zero_shares_the_update_and_not_the_gradients():
    """ZeRO 1 over 8: an eighth of the update; all BF16 weights are written, all gradients cleared."""
    layout = Layout(dp=8, zero=1, weights="bfloat16")
    seconds = optimizer_seconds(held(layout), layout, NODE, optimizer="adamw", precision="bfloat16")
    assert seconds == pytest.approx((32 / 8 + 2 + 4) * N / NODE.memory_bytes_per_second.value)


def test_muon_multiplies_where_adamw_only_passes():
    layout = Layout(dp=1)
    adamw, muon = (
        optimizer_seconds(held(layout), layout, NODE, optimizer=kind, precision="bfloat16")
        for kind in ("adamw", "muon")
    )
    # 5 iterations of 2 m^2 n + 2 m^3 + 2 m^2 n: the largest matrices alone, 14336 x 4096 in 32 layers
    flops = 5 * 3 * 32 * (4 * 4096**2 * 14336 + 2 * 4096**3)
    assert muon - adamw > flops / 989e12


def test_gradients_go_around_a_ring_and_weights_come_back():
    """8 ranks of a node: each sends 7/8 of FP32 gradients and of BF16 weights over NVLink."""
    layout = Layout(dp=8, zero=1, weights="bfloat16")
    sent = gradient_traffic(held(layout), layout)
    assert sent.intra_node_bytes == pytest.approx(6 * N * 7 / 8) and sent.inter_node_bytes == 0
    bare = replace(layout, overlap_gradient_communication=False)
    seconds = exposed_gradient_seconds(held(bare), bare, NODE, n_micro_batches=4, micro_batch_seconds=1e9)
    assert NODE.intra_node is not None
    assert seconds == pytest.approx(6 * N * 7 / 8 / NODE.intra_node.bytes_per_second.value, rel=1e-3)
    hidden = exposed_gradient_seconds(held(layout), layout, NODE, n_micro_batches=4, micro_batch_seconds=1e9)
    assert hidden == 0


def test_zero_two_and_three_communicate_for_every_micro_batch():
    bare = Layout(dp=8, weights="bfloat16", overlap_gradient_communication=False)
    once, twice, thrice = (
        exposed_gradient_seconds(
            held(replace(bare, zero=zero)), replace(bare, zero=zero), NODE, n_micro_batches=10, micro_batch_seconds=0.0
        )
        for zero in (1, 2, 3)
    )
    reduced = once * 4 / 6  # FP32 gradients of what is sent; the rest are BF16 weights
    assert twice == pytest.approx(once + 9 * reduced, rel=1e-3)
    assert thrice == pytest.approx(10 * (reduced + 2 * (once - reduced)), rel=1e-3)


def test_who_shares_v3_s_gradients():
    """dp = 128, whole nodes, and DualPipe's two copies; of experts two in dp, on other nodes, times those two."""
    layout = Layout(pp=16, ep=64, dp=128, schedule="dualpipe")
    assert gradient_groups(layout, H800) == (Group(size=256, per_node=8), Group(size=4, per_node=1))
    share = held(layout, H800, weights(v3())).trained_share
    trained = [w for w in weights(v3()) if w.is_trained]
    routed = sum(w.n for w in trained if w.is_routed)
    assert share == pytest.approx((sum(w.n for w in trained) - routed) / 256 + routed / 64 / 4)
