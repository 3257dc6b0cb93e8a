"""One operation of the model of work, what backward makes of it, and how each kind of operation is written down.

Owns the counting of bytes and FLOP of a kind; `operations.py` owns which of them a model consists of.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from abyssal.plan.layout import NUMBER_BYTES
from abyssal.plan.machine_file import Precision

Part = Literal["embedding", "attention", "feed_forward", "router", "experts", "mtp", "head"]
Kind = Literal["gemm", "grouped_gemm", "attention", "memory"]

E5M6_BYTES = 1.5 + 4 / 128  # what V3 keeps of attention's result for backward (DeepSeek-V3 section 3.3.3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """Forward work on one rank. Products are `groups` times (rows x inner) @ (inner x outer).

    `saved_bytes` is what backward needs of its inputs and results; `selective_saved_bytes` what it still needs where
    norms, MLA up-projections and SwiGLU are computed again, which are the operations with `recomputed`.
    """

    name: str
    part: Part
    kind: Kind
    precision: Precision
    flops: float = 0.0
    moved_bytes: float = 0.0  # read and written
    rows: int = 0  # of each group
    inner: int = 0
    outer: int = 0
    groups: int = 1
    weights: int = 0  # numbers in the matrices that it multiplies with: what a weight gradient is added to
    backward_flops: float = 0.0  # attention only; products have theirs from their shape
    backward_bytes: float = 0.0  # of a pass; of a product, passes beside its two products
    saved_bytes: float = 0.0
    selective_saved_bytes: float = 0.0
    recomputed: bool = False
    routed: bool = False  # on the rows that reach a rank's experts, which may be more than the mean
    calls: int = 1  # operations that this stands for, each with the machine's cost of one more
    backward_calls: int = 1


class Batch(NamedTuple):
    """What a rank is given: `n_rows` sequences of `new_tokens` behind `cached_tokens` others, and how it is cut."""

    n_rows: int
    new_tokens: int
    cached_tokens: int = 0
    tp: int = 1
    cp: int = 1
    ep: int = 1

    @property
    def n_tokens(self) -> int:
        """New tokens that this rank's products see."""
        return max(1, self.n_rows * self.new_tokens // self.cp)

    @property
    def own_tokens(self) -> int:
        """Tokens whose hidden states lie on this rank: sequence parallel shares them among tp."""
        return max(1, self.n_tokens // self.tp)

    @property
    def n_pairs(self) -> float:
        """(query, key) pairs that are visible, over all rows, on this rank."""
        each = self.new_tokens * self.cached_tokens + self.new_tokens * (self.new_tokens + 1) / 2
        return self.n_rows * each / self.cp


def input_gradient(operation: Operation) -> list[Operation]:
    """What backward does to hand the gradient on: attention's backward, a pass's, a product with the weights."""
    if operation.kind in ("memory", "attention"):
        return [
            replace(
                operation,
                flops=operation.backward_flops,
                moved_bytes=operation.backward_bytes,
                calls=operation.backward_calls,
            )
        ]
    beside = []
    if operation.backward_bytes:
        beside = [_pass(operation, "gradient_casts", operation.backward_bytes)]
    return [*beside, replace(operation, inner=operation.outer, outer=operation.inner)]


def weight_gradient(operation: Operation, *, accumulated: bool, gradient_bytes: float = 4.0) -> list[Operation]:
    """What backward does for the weights' own gradient: a product over the rows, and, where it is added to that of
    earlier micro-batches, reading and writing the sum. FP8's own kernels add while they multiply, and were timed so."""
    if not operation.weights:
        return []
    product = replace(operation, rows=operation.inner, inner=operation.rows, outer=operation.outer)
    if not accumulated or operation.precision == "fp8":
        return [product]
    return [product, _pass(operation, "gradient_sum", 2 * gradient_bytes * operation.weights)]


def _pass(operation: Operation, name: str, moved_bytes: float) -> Operation:
    full_name = f"{operation.name}.{name}"
    return Operation(
        name=full_name, part=operation.part, kind="memory", precision=operation.precision, moved_bytes=moved_bytes
    )


class OperationWriter:
    """Writes operations down for one batch in one precision. `wide` are the bytes of a number between products."""

    def __init__(self, precision: Precision, batch: Batch) -> None:
        self.precision, self.batch = precision, batch
        self.wide = NUMBER_BYTES[not_fp8(precision)]

    def memory(
        self,
        name: str,
        part: Part,
        moved_bytes: float,
        *,
        backward_bytes: float = 0.0,
        saved: float = 0.0,
        selective: float = 0.0,
        recomputed: bool = False,
    ) -> Operation:
        return Operation(
            name=name, part=part, kind="memory", precision=self.precision, moved_bytes=moved_bytes,
            backward_bytes=backward_bytes, saved_bytes=saved, selective_saved_bytes=selective, recomputed=recomputed,
            backward_calls=1 if backward_bytes else 0,
        )  # fmt: skip

    def norm(self, name: str, part: Part, width: int, *, sharded: bool = True) -> Operation:
        """Reads and writes once; backward reads its input and the gradient and writes one. Its input is kept."""
        numbers = (self.batch.own_tokens if sharded else self.batch.n_tokens) * width
        kept = self.wide * numbers
        return self.memory(name, part, 2 * kept, backward_bytes=3 * kept, saved=kept, selective=kept, recomputed=True)

    def quantise(
        self, name: str, part: Part, width: int, *, tokens: int | None = None, kept: bool = False
    ) -> list[Operation]:
        """The pass that makes FP8 of a product's input. Backward reads it, transposes it and writes it with its tiles
        turned from 1 x 128 to 128 x 1, for the weight gradient. (V3 section 3.5.2; memory) `kept`: not made again."""
        if self.precision != "fp8":
            return []
        numbers = (self.batch.n_tokens if tokens is None else tokens) * width
        moved, turned = (2 + NUMBER_BYTES["fp8"]) * numbers, 2 * NUMBER_BYTES["fp8"] * numbers
        return [self.memory(f"{name}.quantise", part, moved, backward_bytes=turned, recomputed=not kept)]

    def add(self, name: str, part: Part, width: int, *, n_terms: int = 2) -> Operation:
        """A residual sum. Backward adds the branch's gradient to the stream's."""
        numbers = self.batch.own_tokens * width
        return self.memory(name, part, (n_terms + 1) * self.wide * numbers, backward_bytes=3 * self.wide * numbers)

    def swiglu(self, name: str, part: Part, numbers: int) -> Operation:
        """silu(gate) * up: two read, one written; backward reads both and the gradient and writes two. Its inputs are
        kept, under FP8 and selective recomputation in FP8. (DeepSeek-V3 section 3.3.3)"""
        return self.memory(
            name, part, 3 * self.wide * numbers, backward_bytes=5 * self.wide * numbers,
            saved=2 * self.wide * numbers, selective=2 * NUMBER_BYTES[self.precision] * numbers, recomputed=True,
        )  # fmt: skip

    def product(
        self,
        name: str,
        part: Part,
        inner: int,
        outer: int,
        *,
        groups: int = 1,
        tokens: int | None = None,
        more_rows: int = 0,
        saved: Literal["none", "hidden", "input", "attention"] = "none",
    ) -> Operation:
        """A linear layer. `saved`: "input": it keeps its input, which selective recomputation makes again from what
        a norm or a SwiGLU keeps; "hidden": the same of hidden states, of which a tp rank keeps its share; "attention":
        its input is attention's result, kept there; "none": it shares one."""
        rows = (self.batch.n_tokens if tokens is None else tokens) + more_rows
        each = NUMBER_BYTES[self.precision]
        # backward of attention needs its result as well: in BF16 the two are one, and so are V3's 12 bits of it
        own = saved in ("hidden", "input") or (saved == "attention" and self.precision == "fp8")
        kept = each * rows * inner / (self.batch.tp if saved == "hidden" else 1) if own else 0.0
        weights = groups * inner * outer
        moved = each * (groups * rows * inner + weights) + self.wide * groups * rows * outer
        # the gradient of the result is quantised twice, for the products with weights and with inputs
        casts = (2 + 2 * each) * rows * outer * groups if self.precision == "fp8" else 0.0
        return Operation(
            name=name, part=part, kind="gemm" if groups == 1 else "grouped_gemm", precision=self.precision,
            flops=2.0 * groups * rows * inner * outer, moved_bytes=moved, rows=rows, inner=inner, outer=outer,
            groups=groups, weights=weights, backward_bytes=casts, saved_bytes=kept,
            recomputed=name in ("q_b_proj", "kv_b_proj"),
        )  # fmt: skip

    def grouped(
        self, name: str, inner: int, outer: int, *, groups: int, rows: int, held: int, saved: bool = False
    ) -> Operation:
        each = NUMBER_BYTES[self.precision]
        n_rows = groups * rows
        moved = each * (n_rows * inner + groups * inner * outer) + self.wide * n_rows * outer
        casts = (2 + 2 * each) * n_rows * outer if self.precision == "fp8" else 0.0
        return Operation(
            name=name, part="experts", kind="grouped_gemm", precision=self.precision,
            flops=2.0 * n_rows * inner * outer, moved_bytes=moved, rows=rows, inner=inner, outer=outer, groups=groups,
            weights=held * inner * outer, backward_bytes=casts, saved_bytes=each * n_rows * inner if saved else 0.0,
        )  # fmt: skip

    def core(self, *, heads: int, kv_heads: int, key: int, value: int, made_again: bool = False) -> Operation:
        """Scores and weighted values, scores never written. Backward computes the scores again: five products for two.
        (FlashAttention-2, section 3.2) Kept: queries, keys, values, the result and a logarithm for each query; where
        MLA's up-projections are `made_again`, only the last two."""
        n, pairs = self.batch.n_tokens, self.batch.n_pairs
        inputs = self.wide * n * (heads * key + kv_heads * (key + value))
        output = self.wide * n * heads * value
        logs = 4.0 * n * heads
        flops = 2.0 * pairs * heads * (key + value)
        backward = 2.0 * pairs * heads * (3 * key + 2 * value)
        kept_output = output if self.precision != "fp8" else E5M6_BYTES * n * heads * value
        kept_inputs = 0.0 if made_again else inputs
        precision = not_fp8(self.precision)
        return Operation(
            name="attention_core", part="attention", kind="attention", precision=precision, flops=flops,
            moved_bytes=inputs + output, rows=n, inner=key, outer=value, groups=heads, backward_flops=backward,
            backward_bytes=2 * (inputs + output), saved_bytes=inputs + output + logs,
            selective_saved_bytes=kept_inputs + kept_output + logs,
        )  # fmt: skip

    def decode_core(self, *, heads: int, key: int, value: int, held: int, cache_bytes_per_number: float) -> Operation:
        """New tokens against the cache, of which `held` numbers a token are read once for all heads and new tokens."""
        batch = self.batch
        read = cache_bytes_per_number * batch.n_rows * (batch.cached_tokens + batch.new_tokens) * held
        own = self.wide * batch.n_tokens * heads * (key + value)
        return Operation(
            name="attention_core", part="attention", kind="attention", precision=not_fp8(self.precision),
            flops=2.0 * batch.n_pairs * heads * (key + value), moved_bytes=read + own, rows=batch.n_tokens, inner=key,
            outer=value, groups=heads,
        )  # fmt: skip


def not_fp8(precision: Precision) -> Precision:
    return "bfloat16" if precision == "fp8" else precision
