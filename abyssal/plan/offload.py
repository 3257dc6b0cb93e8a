"""One device too small for a mixture of experts: the routed ones stay in the host's RAM, all else on the device.

They are computed where they lie, on the CPU, as KTransformers and llama.cpp do, or streamed to the device layer by
layer. What the device has left holds experts of its own. On a machine with unified memory there is nothing to move:
`serving.py` plans it. Letters: B requests, K experts of a token, E experts of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from abyssal.model.config import ModelConfig
from abyssal.plan.inference_time import Counted, PassSeconds, forward_operations, operations_seconds
from abyssal.plan.machine_file import Host, MachineSpec
from abyssal.plan.served_weights import served_weights
from abyssal.plan.serving import ServingConfig, cache_bytes_per_token, pass_bytes, usd_per_million_tokens
from abyssal.plan.weight_forms import WeightForm, weight_form

Place = Literal["device", "cpu", "stream"]  # where the routed experts are computed, "stream": having been brought there
HOST_KEPT_BYTES = 8e9  # for the system and the server itself; memory: what an idle Linux desktop and Python hold


@dataclass(frozen=True, kw_only=True)
class OffloadStep:
    """One pass by what it waits for; device and host take turns, but that the host works beside shared experts."""

    device: PassSeconds
    host_seconds: float  # routed experts on the CPU, or their way to the device, beyond what the device hides
    transfer_seconds: float  # hidden states to the host and back

    @property
    def total_seconds(self) -> float:
        return self.device.total_seconds + self.host_seconds + self.transfer_seconds

    @property
    def bottleneck(self) -> str:
        if self.host_seconds >= self.device.total_seconds:
            return "the routed experts in the host's RAM"
        return self.device.bottleneck


@dataclass(frozen=True, kw_only=True)
class OffloadPlan:
    form: WeightForm
    decode_place: Place
    prefill_place: Place
    device_bytes: float  # weights on the device, its share of the experts among them
    host_bytes: float
    device_share: float  # of the routed experts that lie on the device
    largest_context_tokens: int  # of all requests together, no longer than the model was made for
    decode: OffloadStep
    decode_tokens_per_second_per_user: float
    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    first_token_seconds: float
    cost_usd_per_million_tokens: float | None  # of answers
    fits: bool
    why_not: str = ""

    @property
    def bottleneck(self) -> str:
        return self.why_not or f"decode waits for {self.decode.bottleneck}"


def plan_offload(
    config: ModelConfig,
    *,
    machine: MachineSpec,
    serving: ServingConfig,
    requests: int = 1,
    chosen_experts: int = 0,
    device_share: float | None = None,
) -> OffloadPlan:
    """`chosen_experts`: fewer of a token's experts than the model has, 0: as many. `device_share`: of the experts on
    the device; None: what fits beside everything else and the cache of these requests at full length."""
    host = machine.host
    if host is None:
        raise ValueError(f"machine {machine.name} has no [host] to hold experts; name its memory, bandwidth and link")
    if config.feed_forward != "moe":
        raise ValueError("a dense model has no routed experts to keep in the host's RAM; use fewer bits a weight")
    if chosen_experts:
        config = replace(config, num_experts_per_tok=chosen_experts)
    form = weight_form(serving.weights)
    weights = served_weights(config, form=form)
    limit = machine.memory_bytes * machine.usable_memory_share.value
    beside = weights.total_bytes - weights.experts_bytes + pass_bytes(config, serving, form)
    cache_bytes = cache_bytes_per_token(config, serving)
    room = limit - beside - cache_bytes * serving.most_tokens * requests
    share = min(1.0, max(0.0, room / weights.experts_bytes)) if device_share is None else device_share
    host_bytes = (1 - share) * weights.experts_bytes
    why_not = ""
    if room < 0:
        why_not = "memory of the device: no room for what every token uses and the cache"
    elif host_bytes > host.memory_bytes - HOST_KEPT_BYTES:
        why_not = "memory of the host: no room for the routed experts"

    def fastest(mode: Literal["prefill", "decode"]) -> tuple[Place, OffloadStep]:
        places: tuple[Place, ...] = ("cpu", "stream") if share < 1 else ("device",)
        steps = {
            place: _step(
                config, machine=machine, host=host, serving=serving, form=form, requests=requests, share=share,
                place=place, mode=mode,
            )
            for place in places
        }  # fmt: skip
        best = min(places, key=lambda place: steps[place].total_seconds)
        return best, steps[best]

    decode_place, decode = fastest("decode")
    prefill_place, prefill = fastest("prefill")
    per_user = 1 / decode.total_seconds
    return OffloadPlan(
        form=form,
        decode_place=decode_place,
        prefill_place=prefill_place,
        device_bytes=beside + share * weights.experts_bytes,
        host_bytes=host_bytes,
        device_share=share,
        largest_context_tokens=min(config.max_position_embeddings, max(0, int((limit - beside) // cache_bytes))),
        decode=decode,
        decode_tokens_per_second_per_user=per_user,
        decode_tokens_per_second=requests * per_user,
        prefill_tokens_per_second=serving.prompt_tokens / prefill.total_seconds,
        first_token_seconds=prefill.total_seconds,
        cost_usd_per_million_tokens=usd_per_million_tokens(machine, devices=1, tokens_per_second=requests * per_user),
        fits=not why_not,
        why_not=why_not,
    )


def touched_experts(n_experts: int, chosen: int, tokens: float) -> float:
    """Expected experts of a layer that any of the tokens chose, if all are equally likely."""
    return n_experts * (1 - (1 - chosen / n_experts) ** tokens)


def _step(
    config: ModelConfig,
    *,
    machine: MachineSpec,
    host: Host,
    serving: ServingConfig,
    form: WeightForm,
    requests: int,
    share: float,
    place: Place,
    mode: Literal["prefill", "decode"],
) -> OffloadStep:
    rows, new, held = (requests, 1, serving.held_tokens) if mode == "decode" else (1, serving.prompt_tokens, 0)
    operations = forward_operations(
        config, form=form, mode=mode, n_rows=rows, new_tokens=new, cached_tokens=round(held),
        cache_bytes_per_number=serving.cache_bytes_per_number,
    )  # fmt: skip
    routed = [counted for counted in operations if counted[1].name.startswith("experts_")]
    rest = [counted for counted in operations if not counted[1].name.startswith("experts_")]
    shared = [counted for counted in rest if counted[1].name.startswith("shared")]

    def seconds_of(some: list[Counted]) -> PassSeconds:
        return operations_seconds(some, machine=machine, form=form, mode=mode)

    device, beside = seconds_of(rest), seconds_of(shared).total_seconds
    here = seconds_of(routed)  # the whole of them, were they on the device
    tokens = rows * new
    n_moe = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    read = n_moe * touched_experts(config.n_routed_experts, config.num_experts_per_tok, tokens) * expert
    elsewhere_bytes = (1 - share) * read * form.bytes_per_weight
    if place == "cpu":
        computed = 2.0 * (1 - share) * n_moe * tokens * config.num_experts_per_tok * expert
        host_seconds = max(elsewhere_bytes / host.memory_bytes_per_second.value, computed / host.flops_per_second.value)
        hidden = beside + share * here.total_seconds  # what the device does in the meantime
        travels = 2 * tokens * config.hidden_size * 2.0 * n_moe  # there and back, in BF16
        return OffloadStep(
            device=device + here.times(share),
            host_seconds=max(0.0, host_seconds - hidden),
            transfer_seconds=travels / host.link_bytes_per_second.value
            + 2 * n_moe * machine.seconds_per_operation.value,
        )
    streaming = elsewhere_bytes / host.link_bytes_per_second.value
    computing = device + here
    # the next layer's experts are not known before its router has spoken; with many tokens all of them are needed
    hidden = computing.total_seconds if mode == "prefill" else beside
    return OffloadStep(device=computing, host_seconds=max(0.0, streaming - hidden), transfer_seconds=0.0)
