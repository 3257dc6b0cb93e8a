"""What was published of training, beside what the plan makes of the same case with the machine files as they are.

All lines share the figures of the machine files, each of which somebody published for a kernel or a link, not for a
run. What a publisher did not say of a run is an input of ours and stands in `inputs`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from functools import cache

from abyssal.model.config import ModelConfig
from abyssal.model.presets import v2, v3
from abyssal.plan.layout import Layout
from abyssal.plan.machine_file import MachineSpec, read_machine
from abyssal.plan.operations import layer_operations
from abyssal.plan.parameters import cache_bytes_per_token, count, count_active
from abyssal.plan.published import Published
from abyssal.plan.training import flops_per_token, plan_training
from abyssal.plan.training_plan import TrainingPlan

V3_PAPER = "DeepSeek-V3 paper (arXiv 2412.19437)"
V2_PAPER = "DeepSeek-V2 paper (arXiv 2405.04434)"
ISCA = "ISCA paper (arXiv 2505.09343)"
LLAMA_PAPER = "Llama 3 paper (arXiv 2407.21783), table 4"
MEGATRON = "NVIDIA-NeMo/Megatron-Bridge, docs/performance-summary-archive.md: 25.09 container, DGX H100"

V3_ROWS, V3_FIRST_ROWS, V3_ROW_LEN = 15360, 3072, 4096  # section 4.2
V3_TOKENS, V3_RAMP_TOKENS = 14.8e12, 469e9
V3_POST_TRAINING_HOURS = 5e3  # table 1; not planned
EXTENSION_STEPS = 1000  # of each phase, section 4.3
RAMP_PARTS = 4  # each planned at the batch in its middle

V3_LAYOUT = Layout(  # section 3.2, types of numbers section 3.3
    pp=16,
    ep=64,
    zero=1,
    schedule="dualpipe",
    micro_rows=1,
    recompute="selective",
    experts_nodes=4,
    expert_imbalance=0.04,  # MaxVio of models balanced without an auxiliary loss (arXiv 2408.15664, table 2)
    precision="fp8",
    weights="bfloat16",
    moments="bfloat16",
    overlap_expert_communication=True,
    overlap_gradient_communication=False,  # table 4 of ISCA has the optimizer's time apart
    kernels="fused",
)
V2_LAYOUT = Layout(  # section 3.1.3 (memory)
    pp=16,
    ep=8,
    zero=1,
    schedule="zb1p",
    micro_rows=1,
    recompute="selective",
    precision="bfloat16",
    weights="bfloat16",
    overlap_expert_communication=True,
    overlap_gradient_communication=False,
    kernels="fused",
)
MEGATRON_LAYOUT = Layout(zero=1, micro_rows=1, precision="fp8", weights="bfloat16", kernels="fused")


def published_training() -> list[Published]:
    return [*_counts(), *_v3_step(), *_v3_cost(), *_deepseek(), *_megatron(), *_llama()]


@cache
def machine_named(name: str) -> MachineSpec:
    return read_machine(name)


@cache
def v3_plan(rows: int = V3_ROWS) -> TrainingPlan:
    return plan_training(
        v3(), machine=machine_named("h800x2048"), layout=V3_LAYOUT, row_len=V3_ROW_LEN, batch_rows=rows
    )


def _counts() -> list[Published]:
    def gflops(name: str, config: ModelConfig, published: float, *, own_count: bool = False) -> Published:
        """`own_count`: how the publisher counted models that are not its own is not said."""
        return Published(
            name=f"{name}: training, of one token", unit="GFLOP", published=published,
            planned=flops_per_token(config, 4096) / 1e9, kind="measured" if own_count else "arithmetic",
            source=f"{ISCA}, table 2", inputs="rows of 4,096 tokens, causal",
        )  # fmt: skip

    return [
        Published(
            name="V3: parameters", unit="", published=671_026_419_200, planned=count(v3()), kind="arithmetic",
            source="deepseek-ai/DeepSeek-V3 README: 671B; the sum over its tensors, balance biases included",
        ),
        Published(
            name="V3: parameters that a token meets", unit="billion", published=37, planned=count_active(v3()) / 1e9,
            kind="arithmetic", source=f"{V3_PAPER}, abstract", inputs="with the head, without the embedding",
        ),
        Published(
            name="V3: cache of one token in BF16", unit="bytes", published=70_272, planned=cache_bytes_per_token(v3()),
            kind="arithmetic", source=f"{ISCA}, table 1",
        ),
        gflops("V3", v3(), 250),
        gflops("V2", v2(), 155),
        gflops("Llama-3.1-405B", llama_405b(), 2448, own_count=True),
        gflops("Qwen2.5-72B", qwen_72b(), 394, own_count=True),
    ]  # fmt: skip


def _v3_step() -> list[Published]:
    plan = v3_plan()
    parts = slot_seconds(plan)
    inputs = "MPFT network; mean over pipeline ranks"
    rows = [
        ("step", 19.926, plan.step_seconds),
        ("forward alone", 1.13, parts["forward"]),
        ("backward alone, for inputs or whole", 1.99, parts["backward"] + parts["backward_input"]),
        ("weight gradients alone", 0.48, parts["backward_weight"]),
        ("forward and backward in pairs", 13.95, parts["pair"]),
        ("bubble", 2.06, sum(plan.timeline.bubble_seconds) / plan.layout.pp),
        ("optimizer", 0.29, plan.step.gradient_communication_seconds + plan.step.optimizer_seconds),
    ]
    lines = [
        Published(
            name=f"V3, a step on 2,048 H800: {name}", unit="seconds", published=published, planned=planned,
            kind="measured", source=f"{ISCA}, table 4", inputs=inputs,
        )
        for name, published, planned in rows
    ]  # fmt: skip
    causal = plan.flops_per_second_per_device / 1e12
    whole = causal * (1 + _masked_flops_share(v3(), V3_ROW_LEN))
    day = 86400.0
    return [
        *lines,
        Published(
            name="V3: tokens in a day", unit="billion", published=272.80, planned=plan.tokens_per_second * day / 1e9,
            kind="measured", source=f"{ISCA}, table 4", inputs=inputs,
        ),
        Published(
            name="V3: rate of each H800, causal", unit="TFLOP/s", published=385, planned=causal, kind="measured",
            source=f"{ISCA}, table 4", inputs=inputs,
        ),
        Published(
            name="V3: rate of each H800, masked half counted", unit="TFLOP/s", published=432, planned=whole,
            kind="measured", source=f"{ISCA}, table 4", inputs=inputs,
        ),
    ]  # fmt: skip


def slot_seconds(plan: TrainingPlan) -> Counter[str]:
    """What a pipeline rank spends on each kind of slot in a step, mean over ranks; "pair": forward with backward."""
    total: Counter[str] = Counter()
    for order, spans in zip(plan.timeline.schedule.orders, plan.timeline.slot_seconds, strict=True):
        for slot, (start, end) in zip(order, spans, strict=True):
            total["pair" if len(slot) == 2 else slot[0].kind] += (end - start) / plan.layout.pp  # type: ignore[assignment]
    return total


def _masked_flops_share(config: ModelConfig, row_len: int) -> float:
    """FLOP of the pairs that no query may see, as a share of all others."""
    shape = {"n_rows": 1, "new_tokens": row_len}
    cores = [
        o.flops
        for layer in range(config.num_hidden_layers)
        for o in layer_operations(config, layer, precision="bfloat16", **shape)  # type: ignore[arg-type]
        if o.kind == "attention"
    ]
    return 3 * sum(cores) / row_len * (row_len - 1) / (row_len + 1) / flops_per_token(config, row_len)


def v3_pretraining_hours() -> float:
    """H800-hours of 14.8T tokens, the growing batch of the first 469B included."""
    width = (V3_ROWS - V3_FIRST_ROWS) // RAMP_PARTS
    middles = [V3_FIRST_ROWS + width * part + width // 2 for part in range(RAMP_PARTS)]
    ramp_hours = sum(v3_plan(rows).for_tokens(V3_RAMP_TOKENS / RAMP_PARTS).device_hours for rows in middles)
    return ramp_hours + v3_plan().for_tokens(V3_TOKENS - V3_RAMP_TOKENS).device_hours


def v3_extension_hours() -> float:
    """Two phases of 1,000 steps: 1,920 rows of 32K, then 480 of 128K. Context parallel ranks share a row so that each
    still has 4,096 tokens of it."""
    hours = 0.0
    for row_len, rows in ((32768, 1920), (131072, 480)):
        layout = replace(V3_LAYOUT, cp=row_len // V3_ROW_LEN)
        plan = plan_training(
            v3(), machine=machine_named("h800x2048"), layout=layout, row_len=row_len, batch_rows=rows, advise=False
        )
        hours += EXTENSION_STEPS * plan.step_seconds / 3600 * plan.layout.n_devices
    return hours


def _v3_cost() -> list[Published]:
    plan = v3_plan()
    table = f"{V3_PAPER}, table 1"
    pretraining, extension = v3_pretraining_hours(), v3_extension_hours()
    total = pretraining + extension + V3_POST_TRAINING_HOURS
    price = plan.price_usd_per_device_hour
    assert price is not None, "V3's cluster has the price that its paper assumes"
    given = "post-training's 5K hours are given, not planned"
    return [
        Published(
            name="V3: a trillion tokens", unit="H800-hours", published=180e3,
            planned=plan.for_tokens(1e12).device_hours, kind="measured",
            source=f"{V3_PAPER}, section 1", inputs="at the full batch",
        ),
        Published(
            name="V3: pretraining on 14.8T tokens", unit="H800-hours", published=2664e3, planned=pretraining,
            kind="measured", source=table, inputs="batch from 3,072 to 15,360 rows over 469B tokens",
        ),
        Published(
            name="V3: context extension", unit="H800-hours", published=119e3, planned=extension, kind="measured",
            source=table, inputs="layout not published: 8, then 32 context parallel ranks",
        ),
        Published(
            name="V3: all training", unit="H800-hours", published=2788e3, planned=total, kind="measured", source=table,
            inputs=given,
        ),
        Published(
            name="V3: cost of all training", unit="USD", published=5.576e6, planned=price * total, kind="measured",
            source=table, inputs=f"2 USD an H800-hour; {given}",
        ),
    ]  # fmt: skip


def _deepseek() -> list[Published]:
    machine = machine_named("h800x2048")
    of_v2 = plan_training(v2(), machine=machine, layout=V2_LAYOUT, row_len=4096, batch_rows=9216, advise=False)
    of_67b = cheapest_dense(deepseek_67b(), machine, rows=4608, row_len=4096)
    sizes = f"pp={of_67b.layout.pp}, tp={of_67b.layout.tp}"
    return [
        Published(
            name="V2: a trillion tokens", unit="H800-hours", published=172.8e3,
            planned=of_v2.for_tokens(1e12).device_hours, kind="measured", source=f"{V2_PAPER}, section 3.2.3",
            inputs="number of devices not published: V3's machine; 9,216 rows a step",
        ),
        Published(
            name="DeepSeek-67B: a trillion tokens", unit="H800-hours", published=300.6e3,
            planned=of_67b.for_tokens(1e12).device_hours, kind="measured", source=f"{V2_PAPER}, section 3.2.3",
            inputs=f"layout not published: of 1F1B's the cheapest that fits V3's machine, {sizes}",
        ),
    ]  # fmt: skip


def cheapest_dense(config: ModelConfig, machine: MachineSpec, *, rows: int, row_len: int) -> TrainingPlan:
    """By 1F1B and tensor parallel, in BF16 with ZeRO 1: as DeepSeek LLM was trained (arXiv 2401.02954, section 2.4)."""
    plans = []
    for pp, tp in itertools.product((4, 8, 16), (1, 2, 4, 8)):
        layout = Layout(
            pp=pp, tp=tp, zero=1, schedule="1f1b", micro_rows=1, precision="bfloat16", weights="bfloat16",
            kernels="fused",
        )  # fmt: skip
        if rows % (machine.n_devices // (pp * tp)):
            continue
        plan = plan_training(config, machine=machine, layout=layout, row_len=row_len, batch_rows=rows, advise=False)
        plans += [plan] if plan.fits else []
    return min(plans, key=lambda plan: plan.step_seconds)


def _megatron() -> list[Published]:
    machine = machine_named("h100x1024")
    interleaved = replace(MEGATRON_LAYOUT, pp=8, schedule="interleaved", chunks=4)
    of_v3 = replace(interleaved, tp=2, ep=64, recompute="selective")
    cases: list[tuple[str, ModelConfig, MachineSpec, Layout, int, int, float]] = [
        ("V3, dropless, forced balance", v3(), machine, of_v3, 4096, 8192, 1297),
        ("Llama-3-70B", llama_70b(), replace(machine, n_devices=64), replace(interleaved, tp=4, chunks=5), 8192, 128,
         1619),
        ("Llama-3.1-405B", llama_405b(), machine, replace(interleaved, tp=8, cp=2, chunks=8), 8192, 512, 302),
    ]  # fmt: skip
    lines = []
    for name, config, where, layout, row_len, rows, published in cases:
        plan = plan_training(config, machine=where, layout=layout, row_len=row_len, batch_rows=rows, advise=False)
        cut = ", ".join(f"{size}={getattr(layout, size)}" for size in ("tp", "pp", "cp", "ep", "chunks"))
        lines.append(
            Published(
                name=f"Megatron, {where.n_devices:,} H100 in FP8: {name}",
                unit="tokens/s of each",
                published=published,
                planned=plan.tokens_per_second / where.n_devices,
                kind="measured",
                source=MEGATRON,
                inputs=f"{cut}, {rows} rows of {row_len:,}; FP8 products at DeepGEMM's rates",
            )
        )
    return lines


def _llama() -> list[Published]:
    machine = machine_named("h100x16384")
    lines = []
    for n_devices, cp, row_len, published in ((8192, 1, 8192, 430), (16384, 1, 8192, 400), (16384, 16, 131072, 380)):
        layout = Layout(
            pp=16, tp=8, cp=cp, zero=2, schedule="interleaved", chunks=8, micro_rows=1, precision="bfloat16",
            weights="bfloat16", kernels="fused",
        )  # fmt: skip
        where = replace(machine, n_devices=n_devices)
        rows = 16 * 2**20 // row_len
        plan = plan_training(llama_405b(), machine=where, layout=layout, row_len=row_len, batch_rows=rows, advise=False)
        lines.append(
            Published(
                name=f"Llama-3.1-405B on {n_devices:,} H100 in BF16, rows of {row_len:,}",
                unit="TFLOP/s of each",
                published=published,
                planned=plan.flops_per_second_per_device / 1e12,
                kind="measured",
                source=LLAMA_PAPER,
                inputs=f"tp=8, pp=16, cp={cp}, 16M tokens a step, one layer a chunk (section 3.3.2, memory)",
            )
        )
    return lines


def dense(
    *, layers: int, hidden: int, heads: int, ffn: int, vocab: int, kv_heads: int = 8, bias: bool = False
) -> ModelConfig:
    """A shape that is no preset, for the sizes of its work."""
    return ModelConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=ffn, attention="gqa", feed_forward="dense", num_key_value_heads=kv_heads,
        head_dim=hidden // heads, qkv_bias=bias,
    )  # fmt: skip


def llama_405b() -> ModelConfig:
    """Llama 3 paper, table 3."""
    return dense(layers=126, hidden=16384, heads=128, ffn=53248, vocab=128256)


def llama_70b() -> ModelConfig:
    return dense(layers=80, hidden=8192, heads=64, ffn=28672, vocab=128256)


def qwen_72b() -> ModelConfig:
    """Qwen2.5-72B's config.json. (memory)"""
    return dense(layers=80, hidden=8192, heads=64, ffn=29568, vocab=152064, bias=True)


def deepseek_67b() -> ModelConfig:
    """DeepSeek LLM paper (arXiv 2401.02954), table 2; width of the feed-forward from its config.json. (memory)"""
    return dense(layers=95, hidden=8192, heads=64, ffn=22016, vocab=102400)
