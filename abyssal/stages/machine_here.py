"""The machine that this process runs on, as the plan knows it: its measured file, or a built-in one for want of it.

Owns where the measured file lies and what is said of it. Times nothing: measuring is `abyssal plan --measure`'s.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from abyssal.machine import cache_directory
from abyssal.plan.machine_file import MachineSpec, read_machine
from abyssal.plan.memory_limit import MemoryLimit, memory_limit

# what stands in for a GPU that nobody measured: a part of its name -> a machine of the same kind
KNOWN_GPUS = {"H200": "h200", "H100": "h100x1024", "H800": "h800x2048", "GB300": "gb300x256", "B300": "gb300x256"}


class MachineHere(NamedTuple):
    spec: MachineSpec  # one device, with the memory that this process can have
    limit: MemoryLimit
    note: str  # whose figures these are


def measured_file(device: torch.device, n_threads: int) -> Path:
    """Where --measure leaves its file: one for each number of CPU threads, which have rates of their own."""
    name = f"cuda_{torch.cuda.get_device_name(device)}" if device.type == "cuda" else f"cpu_{n_threads}_threads"
    return cache_directory() / "machines" / f"{name.replace(' ', '_').replace('/', '_')}.toml"


def machine_here(device: torch.device, n_threads: int) -> MachineHere:
    file, limit = measured_file(device, n_threads), device_limit(device)
    if file.is_file():
        spec, note = read_machine(file), f"as measured here ({file})"
    else:
        name = "laptop" if device.type == "cpu" else built_in(torch.cuda.get_device_name(device))
        spec, note = (
            read_machine(name),
            f"with machines/{name}.toml for want of a measured file: abyssal plan --measure",
        )
    return MachineHere(one_device(spec, limit.limit_bytes), limit, note)


def one_device(spec: MachineSpec, memory_bytes: float) -> MachineSpec:
    """One of its devices, with other memory: a laptop's file stands for laptops of any size."""
    share = replace(spec.usable_memory_share, value=1.0, source="all that this process can have")
    return replace(spec, n_devices=1, devices_per_node=1, memory_bytes=memory_bytes, usable_memory_share=share)


def built_in(gpu_name: str) -> str:
    return next((machine for part, machine in KNOWN_GPUS.items() if part in gpu_name), "rtx4090")


def device_limit(device: torch.device) -> MemoryLimit:
    """Of a GPU all its memory, and what is free; of a CPU what this process can have."""
    if device.type != "cuda":
        return memory_limit()
    free, total = torch.cuda.mem_get_info(device)
    return MemoryLimit(total, free, f"{torch.cuda.get_device_name(device)}")
