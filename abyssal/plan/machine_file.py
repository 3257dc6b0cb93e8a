"""A machine as the plan knows it: one TOML in machines/ with its rates, links, memory and price, each with its source.

Owns the file's form, its checks, and how the rate of a product follows from the measured or published ones nearest to
it. Every quantity is in SI units (bytes, seconds, FLOP, USD). Rates are what is reached, not what a data sheet
promises; the data sheet's peaks stand apart, for MFU and as the roof that the points are measured against.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from abyssal.typed_toml import from_dict, table_toml

Precision = Literal["fp8", "bfloat16", "float32"]
PRECISIONS: tuple[Precision, ...] = ("fp8", "bfloat16", "float32")  # from narrow to wide
BYTES: dict[Precision, int] = {"fp8": 1, "bfloat16": 2, "float32": 4}
OUTPUT_BYTES: dict[Precision, int] = {"fp8": 2, "bfloat16": 2, "float32": 4}  # FP8 products are written in BF16
MACHINES = Path(__file__).resolve().parents[2] / "machines"


@dataclass(frozen=True, kw_only=True)
class Sourced:
    """A figure and where it is from: paper and section, repository README and date, "measured", or "memory"."""

    value: float
    source: str


@dataclass(frozen=True, kw_only=True)
class GemmPoint:
    """A product that somebody timed: `groups` times (rows x inner) @ (inner x outer), and what it reached."""

    precision: Precision
    groups: int  # 1: one dense product; E: a grouped product of E experts, `rows` rows for each
    rows: int
    inner: int
    outer: int
    flops_per_second: float
    source: str


@dataclass(frozen=True, kw_only=True)
class GemmTable:
    """How points stand in the file: those of one source and precision together."""

    precision: Precision
    source: str
    points: tuple[tuple[int, int, int, int, float], ...]  # groups, rows, inner, outer, flops_per_second


@dataclass(frozen=True, kw_only=True)
class Link:
    bytes_per_second: Sourced  # usable, for each device, in one direction
    latency_seconds: Sourced


@dataclass(frozen=True, kw_only=True)
class Host:
    """The CPU and RAM beside the accelerators of one node."""

    memory_bytes: float
    memory_bytes_per_second: Sourced
    flops_per_second: Sourced  # of products at many rows, in the precision that experts are kept in there
    link_bytes_per_second: Sourced  # between host and one device


@dataclass(frozen=True, kw_only=True)
class MachineSpec:
    name: str
    title: str
    kind: Literal["cpu", "gpu", "unified"]
    n_devices: int
    devices_per_node: int
    memory_bytes: float  # of each device
    usable_memory_share: Sourced  # the rest is the runtime's: context, kernels, fragments
    price_usd_per_device_hour: Sourced | None = None  # None: a machine that one owns
    peak_flops_per_second: dict[Precision, float]  # dense, from the data sheet
    peak_source: str
    gemm: tuple[GemmPoint, ...]
    # the attention core; a causal one counts its lower half only
    attention_forward_flops_per_second: Sourced
    attention_backward_flops_per_second: Sourced
    decode_attention_flops_per_second: Sourced
    memory_bytes_per_second: Sourced  # what a pass over memory reaches, reads and writes together
    seconds_per_operation: Sourced  # one more operation costs this beside its work: launch, dispatch
    communication_share: Sourced  # of the compute units, taken by communication that overlaps with computing
    engine_gemm: tuple[GemmPoint, ...] = ()  # of the engine's own kernels (engine/native.py), where they were measured
    runtime_bytes: Sourced | None = None  # what libraries take for themselves once they compute
    allocator_share: Sourced | None = None  # memory taken for each byte of tensors that come and go, holes included
    intra_node: Link | None = None
    inter_node: Link | None = None
    host: Host | None = None

    def __post_init__(self) -> None:
        for name, value in _figures(self, ""):
            if name == "communication_share.value":
                if not 0 <= value < 1:
                    raise ValueError(f"{name}={value} must be a share from 0 to below 1")
            elif not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value} must be above 0 and finite; leave out what the machine lacks")
        for name, text in _sources(self, ""):
            if not text.strip():
                raise ValueError(f'{name} is empty; name paper and section, a README and its date, or say "memory"')
        if self.allocator_share is not None and self.allocator_share.value < 1:
            raise ValueError(f"allocator_share.value={self.allocator_share.value} must be at least 1, for no holes")
        if self.usable_memory_share.value > 1:
            raise ValueError(f"usable_memory_share.value={self.usable_memory_share.value} must be a share up to 1")
        if self.n_devices % self.devices_per_node:
            raise ValueError(
                f"n_devices={self.n_devices} is no multiple of devices_per_node={self.devices_per_node}; "
                "count whole nodes"
            )
        if self.devices_per_node > 1 and self.intra_node is None:
            raise ValueError(
                f"intra_node is missing, but there are {self.devices_per_node} devices a node; say how they are linked"
            )
        if self.n_devices > self.devices_per_node and self.inter_node is None:
            raise ValueError(
                f"inter_node is missing, but there are {self.n_devices // self.devices_per_node} nodes; "
                "say how they are linked"
            )
        if not self.gemm:
            raise ValueError("gemm has no points; name at least one product and the rate that it reached")
        for point in (*self.gemm, *self.engine_gemm):
            peak = self.peak_flops_per_second.get(point.precision)
            if peak is None:
                raise ValueError(f"peak_flops_per_second.{point.precision} is missing, but gemm has points of it")
            if point.flops_per_second > peak:
                raise ValueError(
                    f"gemm: {point.flops_per_second:.4g} FLOP/s in {point.precision} is above the peak of {peak:.4g}; "
                    "correct one of them"
                )

    def computes_in(self, precision: Precision) -> Precision:
        """`precision`, or the next wider one that the machine multiplies: weights are widened before the product."""
        for wider in PRECISIONS[PRECISIONS.index(precision) :]:
            if wider in self._points:
                return wider
        raise ValueError(f"machine {self.name} has no products in {precision} or wider; add points to its gemm")

    def gemm_seconds(self, *, precision: Precision, rows: int, inner: int, outer: int, groups: int = 1) -> float:
        """Seconds of `groups` products (rows x inner) @ (inner x outer), without `seconds_per_operation`.

        A roofline gives every shape its ideal time; the share of it that is reached is interpolated between the points
        in log space, each weighing 1 / distance^4 (Shepard 1968), so that a point's own shape gets its own rate. No
        product is faster than the fastest point.
        """
        shape = (groups, rows, inner, outer)
        if 0 in shape:
            return 0.0
        precision = self.computes_in(precision)
        key = (precision, *shape)
        if key not in self._known:
            fastest = max(point.flops_per_second for point in self._points[precision])
            seconds = self._ideal_seconds(precision, shape) / _interpolated(_log(shape), self._reached[precision])
            self._known[key] = max(seconds, 2.0 * math.prod(shape) / fastest)
        return self._known[key]

    @cached_property
    def for_engine(self) -> MachineSpec:
        """The same machine as the project's engine finds it: on a CPU its products are in its own C++."""
        return dataclasses.replace(self, gemm=self.engine_gemm, engine_gemm=()) if self.engine_gemm else self

    def memory_seconds(self, n_bytes: float) -> float:
        """Seconds of a pass that reads and writes so many bytes together."""
        return n_bytes / self.memory_bytes_per_second.value

    def resident_bytes(self, *, lasting_bytes: float, passing_bytes: float = 0.0) -> float:
        """What the system shows of a process above its import: for tensors that are made once, and for those that come
        and go with every step, which leave holes."""
        runtime = 0.0 if self.runtime_bytes is None else self.runtime_bytes.value
        holes = 1.0 if self.allocator_share is None else self.allocator_share.value
        return runtime + lasting_bytes + holes * passing_bytes

    def _ideal_seconds(self, precision: Precision, shape: tuple[int, int, int, int]) -> float:
        """The longer of computing at the peak and of moving both operands in and the product out."""
        groups, rows, inner, outer = shape
        moved_bytes = groups * (BYTES[precision] * inner * (rows + outer) + OUTPUT_BYTES[precision] * rows * outer)
        flops = 2.0 * math.prod(shape)
        return max(flops / self.peak_flops_per_second[precision], moved_bytes / self.memory_bytes_per_second.value)

    @cached_property
    def _points(self) -> dict[Precision, list[GemmPoint]]:
        points: dict[Precision, list[GemmPoint]] = {}
        for point in self.gemm:
            points.setdefault(point.precision, []).append(point)
        return points

    @cached_property
    def _reached(self) -> dict[Precision, list[tuple[tuple[float, ...], float]]]:
        """Where each point stands in log space, and its share of the ideal."""
        reached: dict[Precision, list[tuple[tuple[float, ...], float]]] = {}
        for point in self.gemm:
            seconds = 2.0 * math.prod(_shape(point)) / point.flops_per_second
            share = self._ideal_seconds(point.precision, _shape(point)) / seconds
            reached.setdefault(point.precision, []).append((_log(_shape(point)), share))
        return reached

    @cached_property
    def _known(self) -> dict[tuple[Any, ...], float]:
        """Seconds of the shapes asked for so far: a search asks for the same ones thousands of times."""
        return {}


def read_machine(name_or_path: str | Path) -> MachineSpec:
    """`h800x2048` is machines/h800x2048.toml of this repository; anything with a suffix or a slash is a path.

    A file with `base = "NAME"` says only in what it differs from that machine of the same folder.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml" and len(path.parts) == 1:
        path = MACHINES / f"{name_or_path}.toml"
    content = _content(path)
    try:
        content["gemm"] = _points(content, "gemm")
        content["engine_gemm"] = _points(content, "engine_gemm")
        spec: MachineSpec = from_dict(MachineSpec, {"name": path.stem, **content}, "", whole="a machine")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return spec


def machine_toml(spec: MachineSpec) -> str:
    """The file of a machine; reading it gives the same machine."""
    content = dataclasses.asdict(spec)
    content["gemm"] = _tables(spec.gemm)
    if spec.engine_gemm:
        content["engine_gemm"] = _tables(spec.engine_gemm)
    else:
        del content["engine_gemm"]
    return table_toml(content)


def _tables(points: tuple[GemmPoint, ...]) -> list[dict[str, Any]]:
    tables: dict[tuple[str, str], list[list[float]]] = {}
    for point in points:
        tables.setdefault((point.precision, point.source), []).append([*_shape(point), point.flops_per_second])
    return [
        {"precision": precision, "source": source, "points": rows} for (precision, source), rows in tables.items()
    ]


def _content(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What stands in the file, on top of what stands in the one that it names as `base`."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        known = ", ".join(sorted(file.stem for file in MACHINES.glob("*.toml")))
        raise FileNotFoundError(
            f"machine {path} does not exist; there are {known}, or give a path, or write one by "
            "`abyssal plan --measure`"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str) or Path(base).name != base:
        raise ValueError(f"{path}: base={base!r} must be the name of a machine in the same folder, without .toml")
    below = path.with_name(f"{base}.toml")
    if below in (path, *above):
        raise ValueError(f"{path}: base={base!r} leads back to itself; name a machine with a file of its own")
    return _content(below, (path, *above)) | content


def _points(content: dict[str, Any], name: str) -> list[dict[str, Any]]:
    tables = content.get(name, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{name} must be tables; write [[{name}]] with precision, source and points")
    names, points = ("groups", "rows", "inner", "outer", "flops_per_second"), []
    for table in tables:
        read: GemmTable = from_dict(GemmTable, table, f"{name}.")
        shared = {"precision": read.precision, "source": read.source}
        points += [{**shared, **dict(zip(names, point, strict=True))} for point in read.points]
    return points


def _shape(point: GemmPoint) -> tuple[int, int, int, int]:
    return point.groups, point.rows, point.inner, point.outer


def _log(shape: tuple[int, int, int, int]) -> tuple[float, ...]:
    return tuple(math.log2(size) for size in shape)


def _interpolated(at: tuple[float, ...], known: list[tuple[tuple[float, ...], float]]) -> float:
    """The mean of what is known, weighed by 1 / distance^4."""
    total = weights = 0.0
    for place, value in known:
        squared = sum((a - b) ** 2 for a, b in zip(at, place, strict=True))
        if squared == 0:
            return value
        weight = squared**-2
        total, weights = total + weight * value, weights + weight
    return total / weights


def _figures(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Every number of a spec under its name in the file."""
    for inner, item in _fields(value, name):
        if isinstance(item, int | float):
            yield inner, item


def _sources(value: Any, name: str) -> Iterator[tuple[str, str]]:
    for inner, item in _fields(value, name):
        if isinstance(item, str) and inner.endswith("source"):
            yield inner, item


def _fields(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _fields(getattr(value, field.name), f"{name}.{field.name}" if name else field.name)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _fields(item, f"{name}.{key}")
    elif isinstance(value, tuple):
        for item in value:
            yield from _fields(item, name)
    else:
        yield name, value
