"""A machine of round figures for tests: what the plan says of it can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from abyssal.plan.machine_file import GemmPoint, Host, Link, MachineSpec, Sourced


def given(value: float) -> Sourced:
    return Sourced(value=value, source="a test")


def round_machine(**changes: Any) -> MachineSpec:
    """One device of 100 GB: 100 TFLOP/s in BF16 at every shape, 1 TB/s of memory, operations for nothing, 3.6 USD an
    hour. Beside it a host of 1 TB at 100 GB/s and 1 TFLOP/s, behind a link of 10 GB/s."""
    machine = MachineSpec(
        name="round",
        title="round figures",
        kind="gpu",
        n_devices=1,
        devices_per_node=1,
        memory_bytes=100e9,
        usable_memory_share=given(1.0),
        price_usd_per_device_hour=given(3.6),
        peak_flops_per_second={"bfloat16": 100e12, "float32": 50e12},
        peak_source="a test",
        gemm=tuple(
            GemmPoint(
                precision=precision, groups=1, rows=4096, inner=4096, outer=4096, flops_per_second=rate, source="a test"
            )
            for precision, rate in (("bfloat16", 100e12), ("float32", 50e12))
        ),
        attention_forward_flops_per_second=given(100e12),
        attention_backward_flops_per_second=given(100e12),
        decode_attention_flops_per_second=given(100e12),
        memory_bytes_per_second=given(1e12),
        seconds_per_operation=given(1e-12),
        communication_share=given(0.0),
        host=Host(
            memory_bytes=1e12,
            memory_bytes_per_second=given(100e9),
            flops_per_second=given(1e12),
            link_bytes_per_second=given(10e9),
        ),
    )
    return replace(machine, **changes)


def linked(n_devices: int, *, devices_per_node: int = 8, bytes_per_second: float = 50e9) -> dict[str, Any]:
    """Changes that make a cluster of it, ten times as fast within a node."""
    return {
        "n_devices": n_devices,
        "devices_per_node": devices_per_node,
        "intra_node": Link(bytes_per_second=given(10 * bytes_per_second), latency_seconds=given(1e-12)),
        "inter_node": Link(bytes_per_second=given(bytes_per_second), latency_seconds=given(1e-12)),
    }
