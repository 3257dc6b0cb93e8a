"""Serving on a machine of round figures, by hand; and what must hold for every batch, context and price."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from round_machine import given as sourced
from round_machine import linked, round_machine

from abyssal.model.presets import r1_distill_llama_8b, v2_lite, v3
from abyssal.plan.inference_time import exchange_seconds, reached_nodes
from abyssal.plan.machine_file import read_machine
from abyssal.plan.parameters import count
from abyssal.plan.served_weights import served_weights
from abyssal.plan.serving import ServingConfig, ServingLayout, decode_point, draft_gain, plan_serving, prefill_point
from abyssal.plan.weight_forms import weight_form

FEW = settings(max_examples=12, deadline=None)


def test_one_request_waits_for_the_weights():
    """Llama 8B in BF16 without its embedding table: 7.50e9 weights of 2 bytes at 1 TB/s are 15.0 ms a token; and
    1,536 cached tokens of 131,072 bytes 0.2 ms."""
    serving = ServingConfig(prompt_tokens=1024, answer_tokens=1024)
    point = decode_point(
        r1_distill_llama_8b(), machine=round_machine(), serving=serving, layout=ServingLayout(), requests=1
    )
    assert point.step.other_weights_seconds == pytest.approx(15.0e-3, rel=0.01)
    assert point.step.cache_seconds == pytest.approx(0.2e-3, rel=0.02)
    assert point.tokens_per_second == pytest.approx(66, rel=0.02)
    assert point.step.bottleneck == "reading the weights that every token uses"
    # 3.6 USD an hour are 0.001 a second: a million tokens take 15,200 of them
    assert point.cost_usd_per_million_tokens == pytest.approx(15.2, rel=0.02)


def test_few_bits_are_read_as_they_lie():
    shape = {"machine": round_machine(), "layout": ServingLayout(), "requests": 1}
    wide, narrow = (
        decode_point(r1_distill_llama_8b(), serving=ServingConfig(weights=form), **shape)  # type: ignore[arg-type]
        for form in ("bfloat16", "q4_k_m")
    )
    ratio = narrow.step.other_weights_seconds / wide.step.other_weights_seconds
    assert ratio == pytest.approx(4.82 / 16, rel=0.01)


def test_what_the_cache_holds_and_what_fits():
    """V3's 70,272 bytes a token in BF16 (ISCA paper, table 1); Llama 8B has 2 x 8 x 128 numbers in 32 layers."""
    plan = plan_serving(v3(), machine=round_machine(), serving=ServingConfig(weights="bfloat16"))
    assert plan.cache_bytes_per_token == 70_272
    assert not plan.fits and plan.best is None and plan.bottleneck.startswith("memory")
    small = plan_serving(r1_distill_llama_8b(), machine=round_machine(), serving=ServingConfig())
    assert small.cache_bytes_per_token == 2 * 2 * 8 * 128 * 32
    assert small.largest_batch == int(small.cache_room_bytes // (131_072 * 2048))
    assert small.largest_context_tokens == 131_072  # it was made for no more
    assert [point.fits for point in small.decode] == [p.requests_per_rank <= small.largest_batch for p in small.decode]


def test_served_weights_are_the_models_parameters():
    weights = served_weights(v3(), form=weight_form("float32"))
    assert weights.total_bytes == 4 * count(v3())  # 671,026,419,200 of them
    shared_out = served_weights(v3(), form=weight_form("float32"), ep=32, experts=288)
    assert shared_out.experts_bytes == pytest.approx(weights.experts_bytes * 9 / 256)  # 9 on each of 32


def test_hits_are_input_that_is_not_computed():
    """Half the prompt in the cache: nearly twice the input tokens a second, less what attention still does for them."""
    machine = round_machine()
    cold, warm = (
        prefill_point(
            r1_distill_llama_8b(),
            machine=machine,
            serving=ServingConfig(prompt_tokens=1024, cache_hit_share=share),
            layout=ServingLayout(),
        )
        for share in (0.0, 0.5)
    )
    assert 1.9 < warm.tokens_per_second / cold.tokens_per_second < 2.0
    assert warm.first_token_seconds < cold.first_token_seconds


def test_a_token_reaches_its_groups_nodes():
    """V3 chooses 4 of 8 groups. On 8 nodes these are 4 nodes; on 4 nodes of 2 groups 4 x (1 - 6x5x4x3 / 8x7x6x5)."""
    assert reached_nodes(v3(), n_nodes=8) == 4
    assert reached_nodes(v3(), n_nodes=4) == pytest.approx(4 * (1 - 15 / 70))
    assert reached_nodes(v3(), n_nodes=1) == 1


def test_the_exchange_by_hand():
    """64 tokens, 8 copies, 15 in 16 of them to other nodes, 7,168 x (1 + 2) bytes each, at 50 GB/s."""
    seconds = exchange_seconds(
        v3(), machine=round_machine(**linked(128)), tokens=64, ep=128, dispatch_bytes=1.0, by_node=False
    )
    assert seconds == pytest.approx(64 * 8 * 15 / 16 * 7168 * 3 / 50e9)


def test_overlap_hides_the_shorter_of_the_two():
    machine = round_machine(**linked(64))
    serving = ServingConfig(prompt_tokens=4096, prefill_tokens=32768)
    one, two = (
        prefill_point(v3(), machine=machine, serving=serving, layout=ServingLayout(devices=64, ep=64, overlap=overlap))
        for overlap in (False, True)
    )
    travelling = one.step.exposed_communication_seconds
    computing = one.step.total_seconds - travelling
    assert two.step.total_seconds == pytest.approx(max(computing, travelling), rel=0.02)


def test_a_draft_pays_by_what_a_step_costs_more():
    gain = draft_gain(
        v3(), machine=round_machine(), serving=ServingConfig(draft_acceptance=0.9), layout=ServingLayout(), requests=1
    )
    assert gain.times_tokens_per_second == pytest.approx(1.9 / gain.step_times)
    # one stream on one device reads 15.75 experts a layer for two tokens instead of 8: little is won
    assert 0.9 < gain.times_tokens_per_second < 1.3


@FEW
@given(st.integers(0, 9), st.sampled_from(["v2_lite", "llama"]), st.floats(64, 30_000))
def test_a_larger_batch_is_never_less_in_all_and_never_faster_for_one(power: int, name: str, held: float):
    config = v2_lite() if name == "v2_lite" else r1_distill_llama_8b()
    serving = ServingConfig(prompt_tokens=int(held), answer_tokens=1)
    shape: dict[str, Any] = {"machine": read_machine("h800x2048"), "serving": serving, "layout": ServingLayout()}
    fewer, more = (decode_point(config, requests=2 ** (power + i), **shape) for i in (0, 1))
    assert more.tokens_per_second >= fewer.tokens_per_second * (1 - 1e-9)
    assert more.tokens_per_second_per_user <= fewer.tokens_per_second_per_user * (1 + 1e-9)


@FEW
@given(st.integers(1, 60_000), st.integers(1, 60_000), st.sampled_from([1, 32]))
def test_a_longer_context_is_never_faster(held: int, more: int, requests: int):
    def point(tokens: int) -> float:
        serving = ServingConfig(prompt_tokens=tokens, answer_tokens=1)
        return decode_point(
            v2_lite(), machine=round_machine(), serving=serving, layout=ServingLayout(), requests=requests
        ).tokens_per_second

    assert point(held + more) <= point(held) * (1 + 1e-9)


@FEW
@given(st.floats(0.01, 100), st.floats(1, 10))
def test_cost_follows_the_price(price: float, factor: float):
    def cost(usd: float) -> float:
        machine = round_machine(price_usd_per_device_hour=sourced(usd))
        point = decode_point(
            v2_lite(), machine=machine, serving=ServingConfig(), layout=ServingLayout(), requests=8
        )
        assert point.cost_usd_per_million_tokens is not None
        return point.cost_usd_per_million_tokens

    assert cost(price * factor) == pytest.approx(cost(price) * factor)


@FEW
@given(st.integers(1, 64))
def test_parts_are_the_whole(requests: int):
    serving = ServingConfig(weights="fp8", draft_acceptance=0.5)
    step = decode_point(
        v3(), machine=read_machine("h800x2048"), serving=serving,
        layout=ServingLayout(devices=32, ep=32, redundant_experts=32, overlap=True), requests=requests,
    ).step  # fmt: skip
    assert step.total_seconds == pytest.approx(sum(vars(step).values()))


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: ServingLayout(devices=8, ep=3), "serving.ep=3 does not divide serving.devices=8"),
        (lambda: ServingLayout(devices=0), "serving.devices=0 must be at least 1"),
        (lambda: ServingConfig(weights="int3"), "is no form that weights are served in"),
        (lambda: ServingConfig(cache_hit_share=1.0), "use 0 to below 1"),
        (lambda: ServingConfig(prompt_tokens=0), "serving.prompt_tokens=0"),
        (lambda: ServingLayout(devices=144, ep=144).physical_experts(v3()), "use 32 redundant ones"),
        (
            lambda: plan_serving(
                v3(), machine=round_machine(), serving=ServingConfig(), layout=ServingLayout(devices=2, ep=2)
            ),
            "more than the 1 of round",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make: Any, says: str):
    with pytest.raises(ValueError, match=says) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_machine_without_a_price_costs_nothing_to_say():
    free = replace(round_machine(), price_usd_per_device_hour=None)
    plan = plan_serving(r1_distill_llama_8b(), machine=free, serving=ServingConfig())
    assert plan.best is not None and plan.best.cost_usd_per_million_tokens is None

