"""The figures of a machine as rows for people: what it is, how much, and where that was read or measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from abyssal.plan.in_words import bytes_text, flops_text, percent_text, seconds_text, usd_text
from abyssal.plan.machine_file import MachineSpec, Sourced


class Figure(NamedTuple):
    what: str
    value: str
    source: str


def machine_figures(machine: MachineSpec) -> list[Figure]:
    """Data sheet, rates, links, price. Products that were timed are told together, by source, from slowest to
    fastest."""
    figures = [Figure("memory of a device", bytes_text(machine.memory_bytes), machine.peak_source)]
    for kind, rate in machine.peak_flops_per_second.items():
        figures.append(Figure(f"peak in {kind}, for MFU alone", flops_text(rate), machine.peak_source))
    rates: dict[tuple[str, str], list[float]] = {}
    for point in machine.gemm:
        rates.setdefault((point.precision, point.source), []).append(point.flops_per_second)
    for (precision, source), reached in rates.items():
        slowest, fastest = flops_text(min(reached)), flops_text(max(reached))
        said = fastest if len(reached) == 1 else f"{slowest} to {fastest}"
        shapes = f"{len(reached)} shape{'s' * (len(reached) > 1)}"
        figures.append(Figure(f"products in {precision}, {shapes}", said, source))
    return figures + list(_sourced(machine, ""))


def _sourced(value: object, name: str) -> Iterator[Figure]:
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        item = getattr(value, field.name)
        if isinstance(item, Sourced):
            yield Figure(*_said(f"{name}{field.name}", item.value), item.source)
        elif dataclasses.is_dataclass(item):
            yield from _sourced(item, f"{name}{field.name} ")


NAMES = {
    "usable_memory_share": "memory that can be used",
    "price_usd_per_device_hour": "price of a device-hour",
    "attention_forward_flops_per_second": "attention core, forward",
    "attention_backward_flops_per_second": "attention core, backward",
    "decode_attention_flops_per_second": "attention core, decoding",
    "memory_bytes_per_second": "passes over memory",
    "seconds_per_operation": "one more operation",
    "communication_share": "compute units taken by communication",
    "runtime_bytes": "what the runtime holds",
    "allocator_share": "more that the allocator holds",
    "intra_node bytes_per_second": "link within a node, a device",
    "intra_node latency_seconds": "its latency",
    "inter_node bytes_per_second": "link between nodes, a device",
    "inter_node latency_seconds": "its latency",
    "host memory_bytes_per_second": "the host’s memory",
    "host flops_per_second": "the host’s products",
    "host link_bytes_per_second": "link between host and a device",
}


def _said(name: str, value: float) -> tuple[str, str]:
    """What it is called and how much it is, by the unit in its name."""
    for unit, text in (
        ("usd_per_device_hour", usd_text),
        ("flops_per_second", flops_text),
        ("bytes_per_second", lambda v: f"{bytes_text(v)}/s"),
        ("seconds", seconds_text),
        ("seconds_per_operation", seconds_text),
        ("share", percent_text),
        ("runtime_bytes", bytes_text),
    ):
        if name.endswith(unit):
            return NAMES.get(name, name.replace("_", " ")), text(value)
    return name.replace("_", " "), f"{value:g}"
