"""Experts in the host's RAM, by hand on a machine of round figures; and what must hold for all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from round_machine import round_machine

from abyssal.model.presets import r1_distill_llama_8b, v2_lite, v3
from abyssal.plan.offload import plan_offload, touched_experts
from abyssal.plan.serving import ServingConfig

Q4 = ServingConfig(prompt_tokens=512, answer_tokens=512, weights="q4_k_m")


def test_touched_experts_by_hand():
    """One token chooses 8 of 256; two tokens 8 + 8 x 248 / 256 others."""
    assert touched_experts(256, 8, 1) == pytest.approx(8)
    assert touched_experts(256, 8, 2) == pytest.approx(15.75)


def test_v3_on_one_card_by_hand():
    """58 layers x 8 experts x 3 x 7168 x 2048 weights of 4.82 bits are 12.31 GB a token, at 100 GB/s 123 ms; at 2 FLOP
    a weight and 1 TFLOP/s it would be 41 ms. The shared experts, 1.54 GB at 1 TB/s, are read in the meantime."""
    plan = plan_offload(v3(), machine=round_machine(), serving=Q4, device_share=0.0)
    assert plan.decode_place == "cpu"
    assert plan.decode.host_seconds == pytest.approx(123.1e-3 - 1.54e-3, rel=0.01)
    assert plan.host_bytes == pytest.approx(58 * 256 * 3 * 7168 * 2048 * 4.82 / 8)
    # everything else: 16.1e9 weights without the embedding table, shared experts among them, are 9.7 GB at 1 TB/s; and
    # 58 routers of 7168 x 256 in FP32 0.4 GB
    assert plan.decode.device.total_seconds == pytest.approx(10.1e-3, rel=0.05)
    assert plan.decode_tokens_per_second == pytest.approx(1 / (0.1216 + 0.0101), rel=0.02)
    assert plan.bottleneck == "decode waits for the routed experts in the host's RAM"


def test_a_long_prompt_is_better_streamed_to_the_device():
    """4,096 tokens need all experts: 394 GB at 10 GB/s are 39 s, on the CPU 58 x 4096 x 8 x 88e6 FLOP are 167 s."""
    plan = plan_offload(v3(), machine=round_machine(), serving=replace(Q4, prompt_tokens=4096), device_share=0.0)
    assert plan.prefill_place == "stream"
    assert plan.first_token_seconds == pytest.approx(39.4, rel=0.02)


def test_what_the_device_has_left_holds_experts():
    plan = plan_offload(v3(), machine=round_machine(), serving=Q4)
    assert 0 < plan.device_share < 1
    assert plan.device_bytes <= 100e9
    everything = plan_offload(v2_lite(), machine=round_machine(), serving=Q4)
    assert everything.device_share == 1 and everything.decode_place == "device" and everything.host_bytes == 0


def test_no_room_is_said():
    small_host = replace(round_machine().host, memory_bytes=128e9)  # type: ignore[type-var]
    plan = plan_offload(v3(), machine=round_machine(host=small_host), serving=Q4)
    assert not plan.fits and plan.bottleneck == "memory of the host: no room for the routed experts"
    tiny = plan_offload(v3(), machine=round_machine(memory_bytes=5e9), serving=Q4)
    assert tiny.bottleneck.startswith("memory of the device")


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 0.9), st.floats(0, 0.1), st.integers(1, 64))
def test_more_on_the_device_is_never_slower(share: float, more: float, requests: int):
    def rate(device_share: float) -> float:
        return plan_offload(
            v3(), machine=round_machine(), serving=Q4, requests=requests, device_share=device_share
        ).decode_tokens_per_second

    assert rate(share + more) >= rate(share) * (1 - 1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 64))
def test_more_requests_are_never_less_in_all(requests: int):
    fewer, more = (
        plan_offload(v3(), machine=round_machine(), serving=Q4, requests=n, device_share=0.0)
        for n in (requests, requests + 1)
    )
    assert more.decode_tokens_per_second >= fewer.decode_tokens_per_second * (1 - 1e-9)


@pytest.mark.parametrize(
    "ask, says",
    [
        (lambda: plan_offload(v3(), machine=round_machine(host=None), serving=Q4), "has no .host. to hold experts"),
        (lambda: plan_offload(r1_distill_llama_8b(), machine=round_machine(), serving=Q4), "no routed experts"),
    ],
)
def test_what_cannot_be_is_refused(ask: Any, says: str):
    with pytest.raises(ValueError, match=says):
        ask()
