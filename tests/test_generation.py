"""The engine's own generation on a machine of round figures, by hand; and what must hold for all."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from round_machine import given as sourced
from round_machine import round_machine

from abyssal.model.presets import r1_distill_llama_8b, smollm2_135m, v2_lite
from abyssal.plan.answer_lengths import AnswerLengths
from abyssal.plan.generation import REQUEST_OPERATIONS, STEP_OPERATIONS, GenerationPlan, plan_generation

CPU = round_machine(kind="cpu", seconds_per_operation=sourced(10e-6))


def plan(**changes: object) -> GenerationPlan:
    asked: dict[str, object] = {"requests": 1, "prompt_tokens": 1, "answers": 101, "greedy": True}
    return plan_generation(r1_distill_llama_8b(), machine=CPU, **(asked | changes))  # type: ignore[arg-type]


def test_one_request_by_hand():
    """Llama 8B in FP32: 7.50e9 weights of 4 bytes at 1 TB/s are 30 ms a token. 101 tokens take 100 steps, for the first
    comes out of the prompt's own pass; a step has 58 operations of 10 us beside it, a request 114."""
    made = plan()
    assert made.decode_seconds == pytest.approx(100 * 30e-3, rel=0.01)
    assert made.prefill_seconds == pytest.approx(30e-3, rel=0.02)
    logits = 101 * 2 * 4 * 128_256 / 1e12
    assert made.engine_seconds == pytest.approx((101 * STEP_OPERATIONS + REQUEST_OPERATIONS) * 10e-6 + logits)
    assert made.drawn_tokens == 101 and made.bottleneck == "reading the weights that every token uses"


def test_memory_by_hand():
    """8.03e9 weights of 4 bytes, a packed copy of them, and 102 tokens of 2 x 8 x 128 numbers in 32 layers."""
    made = plan()
    assert made.weights_bytes == made.packed_bytes == pytest.approx(8.03e9 * 4, rel=0.01)
    assert made.cache_bytes == 4 * 102 * 2048 * 32
    half = plan(precision="bfloat16")
    assert half.packed_bytes == pytest.approx(made.packed_bytes / 2) and half.cache_bytes == made.cache_bytes / 2


def test_a_group_shares_its_prompt():
    alone = plan(requests=8, prompt_tokens=512)
    grouped = plan(requests=8, prompt_tokens=512, answers_per_prompt=8)
    assert grouped.prefill_seconds == pytest.approx(plan(prompt_tokens=512).prefill_seconds)
    assert grouped.prefill_seconds < alone.prefill_seconds and grouped.decode_seconds == alone.decode_seconds


def test_plain_torch_pays_for_every_operation():
    """On a GPU: 30 dense layers of 82 operations and 31 outside of them (counted), 10 us each."""
    gpu = round_machine(seconds_per_operation=sourced(10e-6))
    made = plan_generation(
        smollm2_135m(), machine=gpu, requests=1, prompt_tokens=1, answers=2, precision="bfloat16", greedy=True
    )
    assert made.first_step.launches_seconds == pytest.approx((30 * 82 + 31) * 10e-6)


def test_uneven_answers_take_as_long_as_the_longest():
    lengths = AnswerLengths(mean_tokens=50, max_tokens=400)
    uneven, even = plan(requests=64, answers=lengths), plan(requests=64, answers=50)
    assert uneven.drawn_tokens == pytest.approx(even.drawn_tokens, rel=0.02)
    assert uneven.decode_seconds > 2 * even.decode_seconds
    assert 0 < uneven.tail_seconds < uneven.decode_seconds


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 200), st.integers(1, 300), st.integers(1, 64))
def test_more_of_anything_takes_longer_and_more_requests_are_faster_in_all(answers: int, prompt: int, requests: int):
    def made(a: int, p: int, r: int) -> GenerationPlan:
        return plan_generation(v2_lite(), machine=CPU, requests=r, prompt_tokens=p, answers=a)

    base = made(answers, prompt, requests)
    assert made(answers + 1, prompt, requests).total_seconds >= base.total_seconds
    assert made(answers, prompt + 1, requests).total_seconds >= base.total_seconds
    assert made(answers, prompt, 2 * requests).tokens_per_second >= base.tokens_per_second * (1 - 1e-9)
    parts = base.prefill_seconds + base.decode_seconds + base.engine_seconds
    assert base.total_seconds == pytest.approx(parts)


def test_groups_must_be_whole():
    with pytest.raises(ValueError, match="7 requests are no multiple of 2 answers"):
        plan(requests=7, answers_per_prompt=2)
