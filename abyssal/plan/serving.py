"""What serving takes: speed for each user and in all, first token, largest batch and context, cost.

A unit is a group of devices that runs one copy of the model: dp ranks with requests of their own, tp ranks that share
each rank's matrices, and, over all of them, ep ranks that share the experts. Prefill and decode may have units of
their own (DeepSeek-V3 section 3.4). Letters: B requests running on one dp rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from abyssal.model.config import ModelConfig
from abyssal.plan.inference_time import (
    PassSeconds,
    exchange_seconds,
    forward_operations,
    operations_seconds,
    reduce_seconds,
)
from abyssal.plan.machine_file import BYTES, MachineSpec
from abyssal.plan.served_weights import ServedWeights, served_weights
from abyssal.plan.weight_forms import WeightForm, weight_form

SECONDS_PER_HOUR = 3600.0
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, kw_only=True)
class ServingLayout:
    """One unit. Sizes are in ranks; dp = devices / tp ranks have requests of their own."""

    devices: int = 1
    tp: int = 1
    ep: int = 1
    redundant_experts: int = 0  # copies of the busiest, over all ep ranks (DeepSeek-V3 section 3.4.1)
    overlap: bool = False  # where it pays, two micro-batches: one computes while the other's tokens travel
    by_node: bool = True  # a token travels once to each node, not once to each expert; see `exchange_seconds`

    def __post_init__(self) -> None:
        for name in ("devices", "tp", "ep"):
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"serving.{name}={size} must be at least 1")
        for name in ("tp", "ep"):
            if self.devices % (size := getattr(self, name)):
                raise ValueError(f"serving.{name}={size} does not divide serving.devices={self.devices}")

    @property
    def dp(self) -> int:
        return self.devices // self.tp

    def micro_batches(self, requests: float) -> tuple[int, ...]:
        """How many there may be in a pass."""
        return (1, 2) if self.overlap and requests >= 2 else (1,)

    def physical_experts(self, config: ModelConfig) -> int:
        """Experts with their copies, which must be the same number on each ep rank. 0 without experts."""
        if config.feed_forward != "moe":
            return 0
        n_experts = config.n_routed_experts + self.redundant_experts
        if n_experts % self.ep:
            raise ValueError(
                f"{config.n_routed_experts} experts and serving.redundant_experts={self.redundant_experts} do not "
                f"divide among serving.ep={self.ep}; use {-n_experts % self.ep + self.redundant_experts} redundant ones"
            )
        return n_experts


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """What is asked of the server. Lengths are means, in tokens."""

    prompt_tokens: int = 1024
    answer_tokens: int = 1024
    weights: str = "bfloat16"  # see weight_forms.py
    cache_bytes_per_number: float = 2.0  # BF16; 1.14 in FlashMLA's FP8 form, 656 bytes for 576 numbers
    cache_hit_share: float = 0.0  # of prompt tokens, found in a prefix cache and not computed
    prefill_tokens: int = 8192  # computed of a dp rank's prompts in one pass
    draft_acceptance: float = 0.0  # of the token that one MTP module drafts; 0: no drafts

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "answer_tokens", "prefill_tokens"):
            if (tokens := getattr(self, name)) < 1:
                raise ValueError(f"serving.{name}={tokens} must be at least 1")
        if not 0 <= self.cache_hit_share < 1:
            raise ValueError(f"serving.cache_hit_share={self.cache_hit_share} is a share; use 0 to below 1")
        if not 0 <= self.draft_acceptance <= 1:
            raise ValueError(f"serving.draft_acceptance={self.draft_acceptance} is a share; use 0 to 1")
        if self.cache_bytes_per_number <= 0:
            raise ValueError(f"serving.cache_bytes_per_number={self.cache_bytes_per_number} must be above 0")
        weight_form(self.weights)

    @property
    def held_tokens(self) -> float:
        """Of one running request, in the mean over its answer."""
        return self.prompt_tokens + self.answer_tokens / 2

    @property
    def most_tokens(self) -> int:
        return self.prompt_tokens + self.answer_tokens


@dataclass(frozen=True, kw_only=True)
class DecodePoint:
    """Steady decoding with as many requests on each dp rank."""

    requests_per_rank: int
    step: PassSeconds
    tokens_per_step: float  # of one request: 1, and accepted drafts
    tokens_per_second_per_user: float
    tokens_per_second: float  # of the unit
    cost_usd_per_million_tokens: float | None
    fits: bool


@dataclass(frozen=True, kw_only=True)
class PrefillPoint:
    """Steady prefill of prompts of one length. Hits are counted as input, as bills count them."""

    step: PassSeconds
    tokens_per_second: float  # of the unit
    first_token_seconds: float  # of a prompt that waits for nobody
    cost_usd_per_million_tokens: float | None


@dataclass(frozen=True, kw_only=True)
class DraftGain:
    """What one MTP module gives at a batch: times as many tokens a second, and why not more."""

    acceptance: float
    times_tokens_per_second: float
    step_times: float  # how much longer a step with a draft takes


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    config: ServingConfig
    n_devices: int
    weights: ServedWeights  # of one device
    cache_bytes_per_token: float
    memory_limit_bytes: float  # of one device
    cache_room_bytes: float  # what the weights leave of it for the cache; below 0: they do not fit
    largest_batch: int  # requests of full length on one dp rank
    largest_context_tokens: int  # of a single request on a rank, no longer than the model was made for
    prefill: PrefillPoint
    decode: tuple[DecodePoint, ...]
    drafts: DraftGain | None
    best: DecodePoint | None  # the most tokens a second that fit

    @property
    def fits(self) -> bool:
        return self.largest_batch > 0

    @property
    def bottleneck(self) -> str:
        if not self.fits:
            return "memory: the weights leave no room for one request"
        assert self.best is not None
        return f"prefill waits for {self.prefill.step.bottleneck}, decode for {self.best.step.bottleneck}"


def plan_serving(
    config: ModelConfig,
    *,
    machine: MachineSpec,
    serving: ServingConfig,
    layout: ServingLayout | None = None,
    prefill_layout: ServingLayout | None = None,
    batches: Sequence[int] = BATCHES,
) -> ServingPlan:
    """Decoding at each of `batches` and at the largest that fits. `prefill_layout` None: on the same unit, in turn."""
    layout = layout or ServingLayout()
    if layout.devices > machine.n_devices:
        raise ValueError(f"serving.devices={layout.devices} are more than the {machine.n_devices} of {machine.name}")
    form = weight_form(serving.weights)
    weights = served_weights(
        config, form=form, tp=layout.tp, ep=layout.ep, experts=layout.physical_experts(config),
        with_drafts=serving.draft_acceptance > 0,
    )  # fmt: skip
    cache_bytes = cache_bytes_per_token(config, serving, tp=layout.tp)
    limit = machine.memory_bytes * machine.usable_memory_share.value
    room = limit - weights.total_bytes - pass_bytes(config, serving, form)
    largest = max(0, int(room // (cache_bytes * serving.most_tokens)))
    context = min(max(0, int(room // cache_bytes)), config.max_position_embeddings)
    sizes = sorted({*batches, largest} - {0})
    points = tuple(
        decode_point(config, machine=machine, serving=serving, layout=layout, requests=n, fits=n <= largest)
        for n in sizes
    )
    best = max((p for p in points if p.fits), key=lambda point: point.tokens_per_second, default=None)
    drafts = None
    if serving.draft_acceptance and config.num_nextn_predict_layers and best is not None:
        drafts = draft_gain(config, machine=machine, serving=serving, layout=layout, requests=best.requests_per_rank)
    return ServingPlan(
        config=serving,
        n_devices=layout.devices,
        weights=weights,
        cache_bytes_per_token=cache_bytes,
        memory_limit_bytes=limit,
        cache_room_bytes=room,
        largest_batch=largest,
        largest_context_tokens=context,
        prefill=prefill_point(config, machine=machine, serving=serving, layout=prefill_layout or layout),
        decode=points,
        drafts=drafts,
        best=best,
    )


def cache_bytes_per_token(config: ModelConfig, serving: ServingConfig, *, tp: int = 1) -> float:
    """On one device. Every tp rank holds MLA's latents whole; of keys and values it holds its heads."""
    width = config.cache_width
    if config.attention == "gqa":
        width = 2 * -(-config.num_key_value_heads // tp) * config.head_dim
    n_layers = config.num_hidden_layers
    if serving.draft_acceptance:
        n_layers += config.num_nextn_predict_layers
    return serving.cache_bytes_per_number * width * n_layers


def pass_bytes(config: ModelConfig, serving: ServingConfig, form: WeightForm) -> float:
    """What one prefill pass holds at once: its hidden states and the widest of its results."""
    widest = max(config.intermediate_size, config.num_attention_heads * config.qk_head_dim)
    if config.feed_forward == "moe":
        widest = max(widest, config.num_experts_per_tok * (config.hidden_size + 2 * config.moe_intermediate_size))
    return serving.prefill_tokens * (2 * config.hidden_size + 2 * widest) * max(2.0, BYTES[form.computes_in])


def decode_step(
    config: ModelConfig,
    *,
    machine: MachineSpec,
    serving: ServingConfig,
    layout: ServingLayout,
    requests: float,
    held_tokens: float | None = None,
    new_tokens: int = 1,
) -> PassSeconds:
    """One step of one dp rank with so many requests, each `new_tokens` further on behind what it holds."""
    form, experts = weight_form(serving.weights), layout.physical_experts(config)
    held = serving.held_tokens if held_tokens is None else held_tokens

    def step_of(n_parts: int) -> PassSeconds:
        rows = max(1, round(requests / n_parts))
        operations = forward_operations(
            config, form=form, mode="decode", n_rows=rows, new_tokens=new_tokens, cached_tokens=round(held),
            tp=layout.tp, ep=layout.ep, experts=experts, cache_bytes_per_number=serving.cache_bytes_per_number,
            asked_tokens=new_tokens,
        )  # fmt: skip
        computing = operations_seconds(operations, machine=machine, form=form, mode="decode")
        return _with_exchange(
            config, computing, machine=machine, layout=layout, form=form, tokens=rows * new_tokens, n_parts=n_parts,
            taken_share=machine.communication_share.value if layout.by_node else 0.0,
        )  # fmt: skip

    # two micro-batches read every weight twice: for few requests one is faster
    return min((step_of(n) for n in layout.micro_batches(requests)), key=lambda step: step.total_seconds)


def _with_exchange(
    config: ModelConfig,
    computing: PassSeconds,
    *,
    machine: MachineSpec,
    layout: ServingLayout,
    form: WeightForm,
    tokens: float,
    n_parts: int,
    taken_share: float,
) -> PassSeconds:
    """A pass of `n_parts` micro-batches with what travels between the devices. Where two overlap, one computes, on
    what communication leaves of the device, while the other travels: the longer of both counts."""
    n_moe = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
    exchange = n_moe * exchange_seconds(
        config,
        machine=machine,
        tokens=tokens / layout.tp,  # expert ranks are found among tp too: each sends its own part
        ep=layout.ep,
        dispatch_bytes=1 + 4 / 128 if form.computes_in == "fp8" else 2.0,
        by_node=layout.by_node,
    )
    reduce = reduce_seconds(config, machine=machine, tokens=tokens, tp=layout.tp)
    if n_parts == 1:
        return replace(computing, exposed_communication_seconds=exchange + reduce)
    both = computing.times(2)
    slowed = both.times(1 / (1 - taken_share)) if exchange else both
    exposed = max(0.0, 2 * exchange - slowed.total_seconds)
    return replace(slowed, exposed_communication_seconds=exposed + 2 * reduce)


def decode_point(
    config: ModelConfig,
    *,
    machine: MachineSpec,
    serving: ServingConfig,
    layout: ServingLayout,
    requests: int,
    fits: bool = True,
) -> DecodePoint:
    n_drafts = 1 if serving.draft_acceptance and config.num_nextn_predict_layers else 0
    step = decode_step(
        config, machine=machine, serving=serving, layout=layout, requests=requests, new_tokens=1 + n_drafts
    )
    if n_drafts:
        step += _draft_step(config, machine=machine, serving=serving, layout=layout, requests=requests)
    tokens = 1 + n_drafts * serving.draft_acceptance
    per_user = tokens / step.total_seconds
    rate = per_user * requests * layout.dp
    return DecodePoint(
        requests_per_rank=requests,
        step=step,
        tokens_per_step=tokens,
        tokens_per_second_per_user=per_user,
        tokens_per_second=rate,
        cost_usd_per_million_tokens=usd_per_million_tokens(machine, devices=layout.devices, tokens_per_second=rate),
        fits=fits,
    )


def _draft_step(
    config: ModelConfig, *, machine: MachineSpec, serving: ServingConfig, layout: ServingLayout, requests: int
) -> PassSeconds:
    """The MTP module once: a model of one layer and the head. Its projection of the joined pair is left out: it is a
    ninth of the attention's weights (V3)."""
    block = replace(config, num_hidden_layers=1, first_k_dense_replace=0)
    return decode_step(block, machine=machine, serving=serving, layout=layout, requests=requests)


def draft_gain(
    config: ModelConfig, *, machine: MachineSpec, serving: ServingConfig, layout: ServingLayout, requests: int
) -> DraftGain:
    """With drafts against without, at the same batch."""
    shared = {"machine": machine, "layout": layout, "requests": requests}
    drafted = decode_point(config, serving=serving, **shared)  # type: ignore[arg-type]
    plain = decode_point(config, serving=replace(serving, draft_acceptance=0.0), **shared)  # type: ignore[arg-type]
    return DraftGain(
        acceptance=serving.draft_acceptance,
        times_tokens_per_second=drafted.tokens_per_second / plain.tokens_per_second,
        step_times=drafted.step.total_seconds / plain.step.total_seconds,
    )


def prefill_point(
    config: ModelConfig, *, machine: MachineSpec, serving: ServingConfig, layout: ServingLayout
) -> PrefillPoint:
    """Passes of as many prompts as `prefill_tokens` hold; a longer prompt is one pass of its own, as if uncut."""
    form, experts = weight_form(serving.weights), layout.physical_experts(config)
    cached = round(serving.prompt_tokens * serving.cache_hit_share)
    new = max(1, serving.prompt_tokens - cached)

    def pass_of(n_prompts: int, n_parts: int) -> PassSeconds:
        rows = max(1, n_prompts // n_parts)
        operations = forward_operations(
            config, form=form, mode="prefill", n_rows=rows, new_tokens=new, cached_tokens=cached, tp=layout.tp,
            ep=layout.ep, experts=experts, cache_bytes_per_number=serving.cache_bytes_per_number,
        )  # fmt: skip
        computing = operations_seconds(operations, machine=machine, form=form, mode="prefill")
        whole = _with_exchange(
            config, computing, machine=machine, layout=layout, form=form, tokens=rows * new, n_parts=n_parts,
            taken_share=machine.communication_share.value,
        )  # fmt: skip
        return whole.times(n_prompts / (rows * n_parts))

    def fastest(n_prompts: int) -> PassSeconds:
        passes = (pass_of(n_prompts, n) for n in layout.micro_batches(n_prompts))
        return min(passes, key=lambda step: step.total_seconds)

    n_prompts = max(1, serving.prefill_tokens // new)
    step = fastest(n_prompts)
    rate = n_prompts * serving.prompt_tokens * layout.dp / step.total_seconds
    return PrefillPoint(
        step=step,
        tokens_per_second=rate,
        first_token_seconds=fastest(1).total_seconds,
        cost_usd_per_million_tokens=usd_per_million_tokens(machine, devices=layout.devices, tokens_per_second=rate),
    )


def usd_per_million_tokens(machine: MachineSpec, *, devices: int, tokens_per_second: float) -> float | None:
    """None where the machine has no price."""
    price = machine.price_usd_per_device_hour
    return None if price is None else price.value * devices / SECONDS_PER_HOUR / tokens_per_second * 1e6
