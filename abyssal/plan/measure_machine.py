"""The machine that this runs on, measured: `abyssal plan --measure` writes its TOML by microbenchmarks of a minute.

Owns what is timed and how; each figure is the median of a few runs of one small operation, never of a model. Products
take weights in turn from a pool that no cache holds and inputs that were just written, as a model's do. With one thread
the clock is the processor's own, which other processes hardly lengthen; with more it is the wall's. Imports torch, so
nothing else of `plan` imports this.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.engine.native import NativeForward, native_forward
from abyssal.kernels.grouped import grouped_matmul
from abyssal.machine import compute_dtype, keep_freed_memory, resolve_device, set_threads
from abyssal.model.attention import attend, core_dtype
from abyssal.model.config import ModelConfig
from abyssal.model.transformer import Transformer
from abyssal.plan.machine_file import GemmPoint, MachineSpec, Precision, Sourced, machine_toml
from abyssal.plan.measure_memory import allocator_share, runtime_bytes
from abyssal.plan.memory_limit import memory_limit

SIZES = (16, 48, 144, 432, 1296, 3888)  # of products, in steps of three
FEW_ROWS = (1, 4)
GROUPS = 8
MOST_FLOPS = 1.5e9  # of one product on a CPU
ROUND_FLOPS = 1e8  # of the products in one go through the pool
LEAST_SECONDS = 4e-3  # of a timed row of calls
POOL_BYTES = 48e6  # operands taken in turn: more than the last cache of most CPUs holds
ENGINE_ROWS = (1, 2, 4, 8, 16, 64)
ENGINE_SHAPES = ((96, 768, 1), (192, 1536, 40), (384, 3072, 10), (768, 12288, 2))  # inner, outer, how many in turn
GPU_TIMES, GPU_POOL_TIMES = 100, 20  # as much work, and as much memory, for a GPU
ATTENTION = (4, 288, 6, 60, 44)  # rows, tokens, heads, key width, value width
GPU_ATTENTION = (2, 4096, 16, 192, 128)
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def measure_machine(*, threads: int = 0, out: Path | None = None, device: str = "auto") -> MachineSpec:
    """Measure, write it to `out` if that is given, and return it. `threads` 0: every core, as a recipe's."""
    where, n_threads = resolve_device(device), set_threads(threads or None)
    keep_freed_memory()
    bench = Bench(where, n_threads)
    spec = bench.machine()
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(machine_toml(spec), encoding="utf-8")
    return spec


class Bench:
    def __init__(self, device: torch.device, n_threads: int) -> None:
        self.device, self.n_threads = device, n_threads
        self.is_gpu = device.type == "cuda"
        self.clock = time.process_time if n_threads == 1 and not self.is_gpu else time.perf_counter
        self.source = f"measured: {self.name()}, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}"
        if not self.is_gpu:
            self.source += f", {n_threads} thread{'s' * (n_threads > 1)}"

    @cached_property
    def pool(self) -> Tensor:
        n_bytes = POOL_BYTES * (GPU_POOL_TIMES if self.is_gpu else 1)
        return torch.rand(int(n_bytes) // 4, device=self.device) - 0.5

    def machine(self) -> MachineSpec:
        # before anything else is computed: a heap with holes of earlier work would take in what is asked for
        runtime, allocator = (0.0, 1.0) if self.is_gpu else (runtime_bytes(), allocator_share())
        per_operation, per_call = self.operation_seconds(), self.call_seconds()
        passes = self.memory_bytes_per_second()
        forward, backward = self.attention_flops_per_second()
        points, of_engine = list(self.points(per_call)), list(self.engine_points())
        peaks: dict[Precision, float] = {}
        for point in (*points, *of_engine):
            peaks[point.precision] = max(peaks.get(point.precision, 0.0), point.flops_per_second)
        return MachineSpec(
            name=platform.node() or "here",
            title=self.name(),
            kind="gpu" if self.is_gpu else "cpu",
            n_devices=1,
            devices_per_node=1,
            memory_bytes=float(self.memory_bytes()),
            usable_memory_share=Sourced(value=0.9, source="memory: the rest is for the system and other programs"),
            peak_flops_per_second=peaks,
            peak_source=f"{self.source}: the fastest product, for want of a data sheet",
            gemm=tuple(points),
            engine_gemm=tuple(of_engine),
            attention_forward_flops_per_second=self.sourced(forward),
            attention_backward_flops_per_second=self.sourced(backward),
            decode_attention_flops_per_second=self.sourced(forward),
            memory_bytes_per_second=self.sourced(passes),
            seconds_per_operation=self.sourced(per_operation),
            communication_share=Sourced(value=0.0, source="one device"),
            runtime_bytes=None if self.is_gpu else self.sourced(runtime),
            allocator_share=None if self.is_gpu else self.sourced(allocator),
        )

    def sourced(self, value: float) -> Sourced:
        return Sourced(value=rounded(value), source=self.source)

    def name(self) -> str:
        if self.is_gpu:
            return torch.cuda.get_device_name(self.device)
        return cpu_name()

    def memory_bytes(self) -> int:
        if self.is_gpu:
            return torch.cuda.get_device_properties(self.device).total_memory
        return memory_limit().limit_bytes

    def seconds(self, work: Callable[[], object], *, repeats: int = 5) -> float:
        """Median seconds of one call, each time of as many in a row as take LEAST_SECONDS."""
        n, spent = 1, self.timed(work, 1)
        while spent < LEAST_SECONDS:
            n = max(2 * n, math.ceil(n * LEAST_SECONDS / max(spent, 1e-7)))
            spent = self.timed(work, n)
        return statistics.median([spent, *(self.timed(work, n) for _ in range(repeats - 1))]) / n

    def timed(self, work: Callable[[], object], n: int) -> float:
        self.wait()
        began = self.clock()
        for _ in range(n):
            work()
        self.wait()
        return self.clock() - began

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def operation_seconds(self) -> float:
        """One of a training step's small operations: forward, recorded for backward, and its share of backward."""
        x = torch.ones(16, device=self.device, requires_grad=True)

        def chain() -> None:
            y = x
            for _ in range(20):
                y = y * 1.5
            y.sum().backward()
            x.grad = None

        return self.seconds(chain, repeats=15) / 40  # 20 forward and 20 backward; the sum is lost among them

    def call_seconds(self) -> float:
        """The smallest product: what of a larger one's time is the call, which the plan counts by itself."""
        x, weight = torch.ones(1, 1, device=self.device), torch.ones(1, 1, device=self.device)

        def calls() -> None:
            for _ in range(20):
                F.linear(x, weight)

        return self.seconds(calls) / 20

    def memory_bytes_per_second(self) -> float:
        """Of the kinds of pass that a training step makes, over tensors of a few MB that come in turn: bytes read and
        written in all, so that the slow kinds count by their time."""
        n, width = (4096, 1024) if self.is_gpu else (2048, 320)
        tensors = self.operands("float32", (n, width))
        weight = torch.ones(width, device=self.device)
        size = 4.0 * n * width
        at = itertools.count()

        def x() -> Tensor:
            return tensors[next(at) % len(tensors)]

        passes: list[tuple[float, Callable[[], object]]] = [
            (3 * size, lambda: torch.mul(x(), x())),
            (3 * size, lambda: torch.mul(x(), x())),
            (3 * size, lambda: torch.add(x(), x())),
            (3 * size, lambda: x().add_(x(), alpha=1e-3)),
            (2 * size, lambda: F.silu(x())),
            (3 * size, lambda: torch.ops.aten.silu_backward(x(), x())),
            (2 * size, lambda: x().pow(2)),
            (1 * size, lambda: x().sum(-1)),
            (2 * size, lambda: x() * weight),
            (2 * size, lambda: x().view(n // 64, 64, 8, -1).transpose(1, 2).contiguous()),
            (4 * size, lambda: torch.cat((x(), x()), dim=-1)),
            (2 * size, lambda: x().index_select(0, order)),
            (3 * size, lambda: x().index_add(0, order, x())),
            (3 * size, lambda: x().double()),
            (1 * size, lambda: x().sum(0)),
            (2 * size, lambda: x() / 3.0),
            (2 * size, lambda: x().log_softmax(-1)),
            (3 * size, lambda: torch.ops.aten._log_softmax_backward_data(x(), x(), -1, torch.float32)),
        ]
        order = torch.randperm(n, device=self.device)
        return sum(n_bytes for n_bytes, _ in passes) / sum(self.seconds(work) for _, work in passes)

    def attention_flops_per_second(self) -> tuple[float, float]:
        """(forward, backward) of a causal core, in FLOP of its lower half, as a layer of training calls it."""
        rows, tokens, heads, key, value = GPU_ATTENTION if self.is_gpu else ATTENTION
        core = core_dtype(torch.empty(0, dtype=compute_dtype("auto", self.device), device=self.device))
        q, k, v = (
            torch.randn(rows, tokens, heads, width, device=self.device, dtype=core, requires_grad=True)
            for width in (key, key, value)
        )

        def forward() -> Tensor:
            return attend(q, k, v, None, scale=key**-0.5, core=core)

        def both() -> None:
            torch.autograd.grad(forward().sum(), (q, k, v))

        pairs = rows * tokens * (tokens + 1) / 2
        forward_seconds = self.seconds(forward, repeats=9)
        backward_seconds = max(self.seconds(both, repeats=9) - forward_seconds, 1e-9)
        return (
            2 * pairs * heads * (key + value) / forward_seconds,
            2 * pairs * heads * (3 * key + 2 * value) / backward_seconds,
        )

    def points(self, per_call: float) -> Iterator[GemmPoint]:
        """Products of every size, dense and grouped, in each precision that the machine computes in."""
        most = MOST_FLOPS * (GPU_TIMES if self.is_gpu else 1)
        precisions: list[Precision] = ["float32"]
        if compute_dtype("auto", self.device) == torch.bfloat16:
            precisions.append("bfloat16")
        for precision in precisions:
            for rows in (*FEW_ROWS, *SIZES):
                for inner in SIZES:
                    for outer in SIZES:
                        if 2.0 * rows * inner * outer <= most:
                            seconds = self.product_seconds(precision, rows, inner, outer)
                            yield from self.point(precision, 1, rows, inner, outer, seconds, per_call)
            for rows in SIZES[:5]:
                for inner in SIZES[1:5]:
                    for outer in SIZES[1:5]:
                        if 2.0 * GROUPS * rows * inner * outer <= most:
                            seconds = self.grouped_seconds(precision, rows, inner, outer)
                            yield from self.point(precision, GROUPS, rows, inner, outer, seconds, per_call)

    def point(
        self, precision: Precision, groups: int, rows: int, inner: int, outer: int, seconds: float, per_call: float
    ) -> Iterator[GemmPoint]:
        """None where the call itself takes most of the time: such a product has no rate of its own."""
        if seconds < 2 * per_call:
            return
        rate = 2.0 * groups * rows * inner * outer / (seconds - per_call)
        yield GemmPoint(
            precision=precision, groups=groups, rows=rows, inner=inner, outer=outer, flops_per_second=rounded(rate),
            source=self.source,
        )  # fmt: skip

    def product_seconds(self, precision: Precision, rows: int, inner: int, outer: int) -> float:
        inputs, weights = self.operands(precision, (rows, inner))[:2], self.operands(precision, (outer, inner))
        n = self.in_a_round(len(inputs), len(weights), 2.0 * rows * inner * outer)

        def work() -> None:
            for k in range(n):
                F.linear(inputs[k % len(inputs)], weights[k % len(weights)])

        return self.seconds(work, repeats=3) / n

    def grouped_seconds(self, precision: Precision, rows: int, inner: int, outer: int) -> float:
        inputs = self.operands(precision, (GROUPS * rows, inner))[:2]
        weights = self.operands(precision, (GROUPS, outer, inner))
        ends = (torch.arange(1, GROUPS + 1, device=self.device) * rows).to(torch.int32)
        n = self.in_a_round(len(inputs), len(weights), 2.0 * GROUPS * rows * inner * outer)

        def work() -> None:
            for k in range(n):
                grouped_matmul(inputs[k % len(inputs)], weights[k % len(weights)], ends)

        return self.seconds(work, repeats=3) / n

    def engine_points(self) -> Iterator[GemmPoint]:
        """Products of the engine's own C++, as its head makes them: of weights that are packed once and, the last kind
        apart, come in turn from more memory than a cache holds. Experts are computed one by one, at the same rates."""
        if self.is_gpu:
            return
        empty = self.engine_heads(8, 8, 1)
        if empty is None:
            return
        per_call = self.seconds(lambda: empty[0].logits(torch.ones(1, 8)))
        for inner, outer, n in ENGINE_SHAPES:
            heads = self.engine_heads(inner, outer, n)
            assert heads is not None, "the library was there a moment ago"
            for rows in ENGINE_ROWS:
                hidden, turn = torch.randn(rows, inner), itertools.cycle(heads)
                seconds = self.seconds(lambda: next(turn).logits(hidden), repeats=3)  # noqa: B023
                for groups in (1, GROUPS):
                    yield from self.point("float32", groups, rows, inner, outer, groups * seconds, groups * per_call)

    def engine_heads(self, inner: int, outer: int, n: int) -> list[NativeForward] | None:
        """`n` models of next to nothing but a head of that size; None where there is no library."""
        config = ModelConfig(
            vocab_size=outer, hidden_size=inner, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
            head_dim=8, intermediate_size=8, attention="gqa", feed_forward="dense", tie_word_embeddings=True,
        )  # fmt: skip
        found = [native_forward(Transformer(config), block_size=16, native=None) for _ in range(n)]
        return [head for head in found if head is not None] or None

    def in_a_round(self, n_inputs: int, n_weights: int, flops: float) -> int:
        most = ROUND_FLOPS * (GPU_TIMES if self.is_gpu else 1)
        return max(1, min(max(n_inputs, n_weights), math.ceil(most / flops)))

    def operands(self, precision: Precision, shape: tuple[int, ...]) -> list[Tensor]:
        """Tensors of this shape that stand one behind the other in the pool, at most 32."""
        pool, size = self.pool.to(DTYPES[precision]), math.prod(shape)
        if size > len(pool):
            return [pool.repeat(math.ceil(size / len(pool)))[:size].view(shape)]
        return [pool[k * size : (k + 1) * size].view(shape) for k in range(min(32, len(pool) // size))]


def rounded(value: float, digits: int = 4) -> float:
    """More digits than a measurement has would only make the file long."""
    return float(f"{value:.{digits}g}")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    return f"{', '.join(sorted(names)) or platform.machine()}, {os.cpu_count()} cores"
