"""What was published of serving, beside what the plan makes of the same case with the machine files as they are.

Nothing here was fitted. The machines are those of the training lines; what the publisher did not say is an input of
ours and stands in `inputs`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from abyssal.model.presets import v2, v3
from abyssal.plan.inference_time import exchange_limit_seconds
from abyssal.plan.machine_file import Host, MachineSpec, Sourced, read_machine
from abyssal.plan.offload import OffloadPlan, plan_offload
from abyssal.plan.published import Published
from abyssal.plan.serving import (
    SECONDS_PER_HOUR,
    DecodePoint,
    PrefillPoint,
    ServingConfig,
    ServingLayout,
    cache_bytes_per_token,
    decode_point,
    draft_gain,
    plan_serving,
    prefill_point,
)

V3_PAPER = "DeepSeek-V3 paper (arXiv 2412.19437)"
V2_PAPER = "DeepSeek-V2 paper (arXiv 2405.04434), section 3.2.3"
ISCA = "ISCA paper (arXiv 2505.09343)"
SERVICE = "deepseek-ai/open-infra-index, day 6: inference system overview (1 March 2025)"
SGLANG = "LMSYS, Deploying DeepSeek on 96 H100 GPUs (5 May 2025), as others cite it"
KTRANSFORMERS = "kvcache-ai/ktransformers, doc/en/DeepseekR1_V3_tutorial.md (February 2025)"

# units as the service had them (day 6) and SGLang after them
PREFILL_UNIT = ServingLayout(devices=32, ep=32, redundant_experts=32, overlap=True)
DECODE_UNIT = ServingLayout(devices=144, ep=144, redundant_experts=32, overlap=True, by_node=False)
SGLANG_DECODE_UNIT = ServingLayout(devices=72, ep=72, redundant_experts=32, overlap=True, by_node=False)


@dataclass(frozen=True, kw_only=True)
class ServiceDay:
    """DeepSeek's online service from noon of 27 to noon of 28 February 2025, UTC+8. (SERVICE)"""

    input_tokens: float = 608e9
    hit_tokens: float = 342e9
    output_tokens: float = 168e9
    nodes: float = 226.75  # of 8 H800, in the mean
    usd_per_device_hour: float = 2.0
    # R1's prices
    hit_usd_per_million_tokens: float = 0.14
    miss_usd_per_million_tokens: float = 0.55
    output_usd_per_million_tokens: float = 2.19
    # in the mean, of one node
    prefill_tokens_per_second: float = 73.7e3  # hits among them
    decode_tokens_per_second: float = 14.8e3
    user_tokens_per_second: float = 21.0  # 20 to 22
    held_tokens: float = 4989  # of the cache, for each token of output
    prompt_tokens: int = 4096  # not published; the prompts of deepseek-ai/profile-data

    @property
    def hit_share(self) -> float:
        return self.hit_tokens / self.input_tokens

    @property
    def income_usd(self) -> float:
        paid = (
            (self.hit_tokens, self.hit_usd_per_million_tokens),
            (self.input_tokens - self.hit_tokens, self.miss_usd_per_million_tokens),
            (self.output_tokens, self.output_usd_per_million_tokens),
        )
        return sum(tokens / 1e6 * price for tokens, price in paid)

    def nodes_for(self, *, prefill_tokens_per_second: float, decode_tokens_per_second: float) -> float:
        """So many nodes does the day's work take at these rates of one node."""
        day = 24 * SECONDS_PER_HOUR
        return self.input_tokens / day / prefill_tokens_per_second + self.output_tokens / day / decode_tokens_per_second

    def cost_usd(self, nodes: float) -> float:
        return nodes * 8 * 24 * self.usd_per_device_hour

    def margin_percent(self, nodes: float) -> float:
        """Income over cost, less one."""
        return 100 * (self.income_usd / self.cost_usd(nodes) - 1)


def published_serving() -> list[Published]:
    return [*_arithmetic(), *_service(ServiceDay()), *_sglang(), *_v2(), *_drafts(), *_one_card(), *_unified()]


def _arithmetic() -> list[Published]:
    flash_mla = ServingConfig(cache_bytes_per_number=(512 + 4 * 4 + 2 * 64) / 576)  # FP8 latent, 4 scales, BF16 key
    fast, slow = (
        2 * 61 * exchange_limit_seconds(tokens=32, copies=9, width=7000, dispatch_bytes=1, bytes_per_second=rate)
        for rate in (900e9, 50e9)
    )
    limit = {"kind": "arithmetic", "inputs": "32 tokens a device, 9 experts, 7,000 wide, 61 layers, two micro-batches"}
    day = ServiceDay()
    return [
        Published(
            name="V3: cache of one token in FlashMLA's FP8 form", unit="bytes", published=61 * 656,
            planned=cache_bytes_per_token(v3(), flash_mla), kind="arithmetic",
            source="FlashMLA README: 656 bytes a token and layer",
        ),
        Published(
            name="V3: shortest time of a token, experts over InfiniBand at 50 GB/s", unit="ms", published=14.76,
            planned=1e3 * slow, digits=2, source=f"{ISCA}, section 2.3.2", **limit,  # type: ignore[arg-type]
        ),
        Published(
            name="V3: the same over NVLink at 900 GB/s", unit="ms", published=0.82, planned=1e3 * fast, digits=2,
            source=f"{ISCA}, section 2.3.2", **limit,  # type: ignore[arg-type]
        ),
        Published(
            name="online service: cost of the day", unit="USD", published=87_072, planned=day.cost_usd(day.nodes),
            kind="arithmetic", source=SERVICE, inputs="226.75 nodes of 8 H800 at 2 USD an hour",
        ),
    ]  # fmt: skip


def service_points(machine: MachineSpec, day: ServiceDay) -> tuple[PrefillPoint, DecodePoint]:
    """The plan's prefill and decode units, with as many requests on each device as the published rates come to."""
    asked = ServingConfig(
        prompt_tokens=day.prompt_tokens,
        answer_tokens=round(2 * (day.held_tokens - day.prompt_tokens)),
        weights="fp8",
        cache_hit_share=day.hit_share,
        prefill_tokens=16384,
    )
    running = round(day.decode_tokens_per_second / 8 / day.user_tokens_per_second)
    return (
        prefill_point(v3(), machine=machine, serving=asked, layout=PREFILL_UNIT),
        decode_point(v3(), machine=machine, serving=asked, layout=DECODE_UNIT, requests=running),
    )


def _service(day: ServiceDay) -> list[Published]:
    prefill, decode = service_points(read_machine("h800x2048"), day)
    of_node = prefill.tokens_per_second / 4, decode.tokens_per_second / 18
    nodes = day.nodes_for(prefill_tokens_per_second=of_node[0], decode_tokens_per_second=of_node[1])
    at_published = day.nodes_for(
        prefill_tokens_per_second=day.prefill_tokens_per_second, decode_tokens_per_second=day.decode_tokens_per_second
    )
    mean = "a node's own speed, balanced and never idle, against the mean of a day"
    return [
        Published(
            name="online service: nodes from tokens and published rates", unit="nodes", published=day.nodes,
            planned=at_published, kind="measured", source=SERVICE, inputs="608B tokens in, 168B out",
        ),
        Published(
            name="online service: income at R1's prices", unit="USD", published=562_027, planned=day.income_usd,
            kind="measured", source=SERVICE, inputs="tokens as published, rounded to billions",
        ),
        Published(
            name="online service: theoretical margin on 226.75 nodes", unit="%", published=545,
            planned=day.margin_percent(day.nodes), kind="measured", source=SERVICE, inputs="as the line above",
        ),
        Published(
            name="online service: input of a prefill node, hits counted", unit="tokens/s",
            published=day.prefill_tokens_per_second, planned=of_node[0], kind="measured", source=SERVICE,
            inputs=f"EP32, prompts of 4,096, 16,384 computed a pass (profile-data), 56.3 % hits; {mean}",
        ),
        Published(
            name="online service: output of a decode node", unit="tokens/s", published=day.decode_tokens_per_second,
            planned=of_node[1], kind="measured", source=SERVICE,
            inputs=f"EP144, 88 requests a device (14.8K / 8 / 21), 4,989 tokens held, no drafts; {mean}",
        ),
        Published(
            name="online service: speed for one user", unit="tokens/s", published=day.user_tokens_per_second,
            planned=decode.tokens_per_second_per_user, kind="measured", source=f"{SERVICE}: 20 to 22",
            inputs="as the line above",
        ),
        Published(
            name="online service: theoretical margin at the plan's own rates", unit="%", published=545,
            planned=day.margin_percent(nodes), kind="measured", source=SERVICE, inputs="the two node rates above",
        ),
    ]  # fmt: skip


def _sglang() -> list[Published]:
    machine = read_machine("h100x1024")
    asked = ServingConfig(prompt_tokens=2000, answer_tokens=100, weights="fp8", prefill_tokens=16384)
    prefill = prefill_point(v3(), machine=machine, serving=asked, layout=PREFILL_UNIT)
    decode = decode_point(v3(), machine=machine, serving=asked, layout=SGLANG_DECODE_UNIT, requests=256)
    return [
        Published(
            name="SGLang, 12 nodes of H100: input of a prefill node", unit="tokens/s", published=52_300,
            planned=prefill.tokens_per_second / 4, kind="measured", source=SGLANG,
            inputs="EP32, prompts of 2,000 tokens, 16,384 a pass",
        ),
        Published(
            name="SGLang, 12 nodes of H100: output of a decode node", unit="tokens/s", published=22_282,
            planned=decode.tokens_per_second / 9, kind="measured", source=SGLANG,
            inputs="EP72, 256 requests a device, prompts of 2,000 tokens",
        ),
    ]  # fmt: skip


def _v2() -> list[Published]:
    """The most that fits: that is what a maximum is."""
    asked = ServingConfig(prompt_tokens=1024, answer_tokens=512, weights="fp8", cache_bytes_per_number=6 / 8)
    plan = plan_serving(
        v2(), machine=read_machine("h800x2048"), serving=asked, layout=ServingLayout(devices=8, ep=8, overlap=True)
    )
    assert plan.best is not None, "V2 in FP8 fits on 8 devices"
    return [
        Published(
            name="V2 on one node of 8 H800: most output (more than 50K)", unit="tokens/s", published=50_000,
            planned=plan.best.tokens_per_second, kind="measured", source=V2_PAPER,
            inputs=f"6 bits a number of the cache; lengths are not published: 1,024 in, 512 out; "
            f"{plan.best.requests_per_rank} requests a device fit",
        ),
        Published(
            name="V2 on one node of 8 H800: most input (more than 100K)", unit="tokens/s", published=100_000,
            planned=plan.prefill.tokens_per_second, kind="measured", source=V2_PAPER, inputs="prompts of 1,024 tokens",
        ),
    ]  # fmt: skip


def _drafts() -> list[Published]:
    asked = ServingConfig(prompt_tokens=4096, answer_tokens=1786, weights="fp8", draft_acceptance=0.875)
    gain = draft_gain(v3(), machine=read_machine("h800x2048"), serving=asked, layout=DECODE_UNIT, requests=1)
    return [
        Published(
            name="V3: what one MTP draft gives", unit="times", published=1.8, planned=gain.times_tokens_per_second,
            kind="measured", source=f"{V3_PAPER}, section 5.4.3",
            inputs="acceptance 0.875 (published: 85 to 90 %); EP144, one request a device, where steps are shortest",
        )
    ]  # fmt: skip


def _one_card() -> list[Published]:
    """Decode with the kernels of version 0.2, prefill with 0.3's, whose rate is the one that the machine file has."""
    two = read_machine("gpu_and_server")
    one = replace(two, host=_half(two.host))
    lines = [
        Published(
            name=f"KTransformers 0.2, V3 in Q4_K_M on one 24 GB card, {sockets}: decode", unit="tokens/s",
            published=published, planned=_on_one_card(machine, weights="q4_k_m", prompt=500).decode_tokens_per_second,
            kind="measured", source=KTRANSFORMERS, inputs="prompt of 500 tokens, 300 of answer, all experts in RAM",
        )
        for sockets, published, machine in (("one socket", 8.73, one), ("two sockets", 12.208, two))
    ]  # fmt: skip
    prefill = _on_one_card(two, weights="q8_0", prompt=2000).prefill_tokens_per_second
    return [
        *lines,
        Published(
            name="KTransformers 0.3, V3 in 8 bits on one 24 GB card, two sockets: prefill", unit="tokens/s",
            published=255.26, planned=prefill, kind="measured", source=KTRANSFORMERS,
            inputs="prompt of 2,000 tokens, all experts in RAM",
        ),
    ]  # fmt: skip


def _on_one_card(machine: MachineSpec, *, weights: str, prompt: int) -> OffloadPlan:
    asked = ServingConfig(prompt_tokens=prompt, answer_tokens=300, weights=weights)
    return plan_offload(v3(), machine=machine, serving=asked, device_share=0.0)


def _half(host: Host | None) -> Host:
    assert host is not None, "the server has RAM"
    return replace(
        host,
        memory_bytes=host.memory_bytes / 2,
        memory_bytes_per_second=_halved(host.memory_bytes_per_second),
        flops_per_second=_halved(host.flops_per_second),
    )


def _halved(figure: Sourced) -> Sourced:
    return Sourced(value=figure.value / 2, source=f"half of: {figure.source}")


def _unified() -> list[Published]:
    asked = ServingConfig(prompt_tokens=1024, answer_tokens=512, weights="q4_k_m")
    point = decode_point(v3(), machine=read_machine("mac_unified"), serving=asked, layout=ServingLayout(), requests=1)
    return [
        Published(
            name="Mac Studio M3 Ultra, V3 in 4 bits: decode", unit="tokens/s", published=20,
            planned=point.tokens_per_second, kind="measured",
            source="runaihome.com, 100B models on Mac Studio (2026): 20 and more; not by the makers of either",
            inputs="Q4_K_M, one request, 1,024 tokens in, 512 out",
        )
    ]  # fmt: skip
