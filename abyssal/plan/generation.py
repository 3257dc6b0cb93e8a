"""What this project's own engine takes on one device: prompts computed, answers drawn token by token, all at once.

On a CPU its steps run in its own C++ (engine/native.py), elsewhere in plain torch. What a step costs beside the model's
work was counted and measured once, in the machine's own unit, one more operation; the rest is the model of work.
Letters: B requests, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from abyssal.model.config import ModelConfig
from abyssal.plan.answer_lengths import AnswerLengths
from abyssal.plan.inference_time import PassSeconds, forward_operations, operations_seconds
from abyssal.plan.machine_file import MachineSpec, Precision
from abyssal.plan.operation import Operation
from abyssal.plan.served_weights import served_weights
from abyssal.plan.weight_forms import weight_form

# Beside the native forward, in operations: measured on an EPYC of 2 cores with a model of 3M, one thread, at 1 to 64
# requests: 226 us a greedy step, 389 us more where ids are drawn, 0.64 ms a request; 9.8 us an operation (11/2026)
STEP_OPERATIONS, DRAW_OPERATIONS, REQUEST_OPERATIONS = 23, 40, 66
# Operations of a decoding step in plain torch, counted by a dispatch mode (torch 2.13): of one layer, and outside
TORCH_OPERATIONS = {("mla", True): 163, ("mla", False): 95, ("gqa", False): 82, ("gqa", True): 150}
TORCH_OUTSIDE = 31
# resident memory of a native engine with a model of next to nothing, beyond that model: at 1 to 64 requests (11/2026)
ENGINE_BYTES, REQUEST_BYTES = 8.6e6, 84e3
PASS_TOKENS = 256  # of a native pass (kernels/native/forward.h)
PREFILL_TOKENS = 8192  # of a step in plain torch (engine/engine.py)
FEW = 0.1  # of the answers: with no more running, a batch is in its tail
DRAW_PASSES = 6  # over B x V numbers in FP32: log-softmax, softmax and the sums that an id is drawn by


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """All answers to a batch of prompts that starts together. The parts of the time add up."""

    requests: int
    drawn_tokens: float
    prefill_seconds: float
    decode_seconds: float
    engine_seconds: float  # scheduling, drawing, writing down
    tail_seconds: float  # of decoding, with no more than a tenth of the requests still running
    weights_bytes: float  # the model's own
    packed_bytes: float  # the native path's copy of them; elsewhere a copy in BF16, where that is computed in
    cache_bytes: float  # as far as it is written to
    logits_bytes: float  # of the largest step, with what is drawn from them
    working_bytes: float  # hidden states and results of the largest pass
    engine_bytes: float  # rows, notes, pages of the native library
    first_step: PassSeconds

    @property
    def total_seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds + self.engine_seconds

    @property
    def tokens_per_second(self) -> float:
        """Drawn ones, over all the time."""
        return self.drawn_tokens / self.total_seconds

    @property
    def memory_bytes(self) -> float:
        return (
            self.weights_bytes + self.packed_bytes + self.cache_bytes + self.logits_bytes + self.working_bytes
            + self.engine_bytes
        )  # fmt: skip

    @property
    def bottleneck(self) -> str:
        parts = {
            self.prefill_seconds: "computing the prompts",
            self.engine_seconds: "the engine's own work beside the model",
            self.decode_seconds: self.first_step.bottleneck,
        }
        return parts[max(parts)]


def plan_generation(
    config: ModelConfig,
    *,
    machine: MachineSpec,
    requests: int,
    prompt_tokens: int,
    answers: AnswerLengths | int,
    precision: Precision = "float32",
    answers_per_prompt: int = 1,
    greedy: bool = False,
) -> GenerationPlan:
    """`answers`: their lengths, or one length that all have. Equal prompts are computed once."""
    if requests < 1 or requests % answers_per_prompt:
        raise ValueError(f"{requests} requests are no multiple of {answers_per_prompt} answers to each prompt")
    form = weight_form(machine.computes_in(precision))
    native = machine.kind == "cpu"
    machine = machine.for_engine
    per_operation = machine.seconds_per_operation.value

    def forward(*, rows: float, new_tokens: int, held: float) -> PassSeconds:
        operations = forward_operations(
            config, form=form, mode="decode", n_rows=max(1, round(rows)), new_tokens=new_tokens,
            cached_tokens=round(held), cache_bytes_per_number=form.bytes_per_weight,
        )  # fmt: skip
        if native:  # an expert's rows are a product like any other
            operations = [(n * (o.groups if o.kind == "grouped_gemm" else 1), _one_group(o)) for n, o in operations]
        seconds = operations_seconds(operations, machine=machine, form=form, mode="decode")
        calls = 0 if native else _torch_operations(config)
        return replace(seconds, launches_seconds=calls * per_operation)

    def drawing(rows: float) -> float:
        passes = 0 if greedy else DRAW_PASSES
        return machine.memory_seconds(4.0 * rows * config.vocab_size * (passes + 2))

    step_operations = STEP_OPERATIONS + (0 if greedy else DRAW_OPERATIONS)
    first = forward(rows=requests, new_tokens=1, held=prompt_tokens)
    decode_seconds = tail_seconds = n_steps = drawn_seconds = drawn = 0.0
    for steps, at, running in _steps(answers, requests):
        taken = steps * forward(rows=running, new_tokens=1, held=prompt_tokens + at).total_seconds
        decode_seconds += taken
        tail_seconds += taken if running <= FEW * requests else 0.0
        drawn_seconds += steps * drawing(running)
        n_steps += steps
        drawn += steps * running
    decode_seconds *= max(0.0, n_steps - 1) / n_steps  # the first token comes out of the prompt's own pass
    prompts = requests // answers_per_prompt
    prefill = forward(rows=prompts, new_tokens=prompt_tokens, held=0)
    engine_seconds = (n_steps * step_operations + requests * REQUEST_OPERATIONS) * per_operation + drawn_seconds
    weights = served_weights(config, form=weight_form("float32"), with_drafts=True).total_bytes
    itemsize = form.bytes_per_weight / 4
    held_tokens = prompts * prompt_tokens + requests * _mean(answers)
    largest_pass = min(PASS_TOKENS if native else PREFILL_TOKENS, max(prompts * prompt_tokens, requests))
    return GenerationPlan(
        requests=requests,
        drawn_tokens=drawn,
        prefill_seconds=prefill.total_seconds,
        decode_seconds=decode_seconds,
        engine_seconds=engine_seconds,
        tail_seconds=tail_seconds,
        weights_bytes=weights,
        packed_bytes=weights * itemsize if native or itemsize < 1 else 0.0,
        cache_bytes=form.bytes_per_weight * held_tokens * config.cache_width * config.num_hidden_layers,
        logits_bytes=4.0 * requests * config.vocab_size * (2 if greedy else 4),
        working_bytes=4.0 * largest_pass * _pass_width(config),
        engine_bytes=ENGINE_BYTES + requests * REQUEST_BYTES if native else 0.0,
        first_step=first,
    )


def _one_group(operation: Operation) -> Operation:
    if operation.kind != "grouped_gemm":
        return operation
    share = 1 / operation.groups
    return replace(
        operation, kind="gemm", groups=1, flops=share * operation.flops, moved_bytes=share * operation.moved_bytes
    )


def _steps(answers: AnswerLengths | int, requests: int) -> list[tuple[float, float, float]]:
    """(steps, tokens drawn by then, requests that run) stretch by stretch."""
    if isinstance(answers, AnswerLengths):
        return [tuple(stretch) for stretch in answers.stretches(requests)]  # type: ignore[misc]
    pieces = min(answers, 16)
    width = answers / pieces
    return [(width, (piece + 0.5) * width, float(requests)) for piece in range(pieces)]


def _mean(answers: AnswerLengths | int) -> float:
    return answers.mean_tokens if isinstance(answers, AnswerLengths) else float(answers)


def _pass_width(config: ModelConfig) -> int:
    """Numbers that one token has in the buffers of a pass (kernels/native/forward.h)."""
    d, heads, chosen = config.hidden_size, config.num_attention_heads, config.num_experts_per_tok
    if config.attention == "mla":
        first = (config.q_lora_rank or heads * config.qk_head_dim) + config.cache_width
        attention = first + heads * (config.qk_head_dim + config.v_head_dim)
    else:
        attention = (2 * heads + 2 * config.num_key_value_heads) * config.head_dim
    dense = max(config.intermediate_size, config.n_shared_experts * config.moe_intermediate_size)
    routed = chosen * (config.moe_intermediate_size + d) + d if config.feed_forward == "moe" else 0
    return 3 * d + attention + dense + routed


def _torch_operations(config: ModelConfig) -> int:
    of_layers = (TORCH_OPERATIONS[config.attention, config.is_moe(layer)] for layer in range(config.num_hidden_layers))
    return sum(of_layers) + TORCH_OUTSIDE
