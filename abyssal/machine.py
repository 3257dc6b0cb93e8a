"""Which device and how many threads a process uses. Owns no tensors; the one place where a device name is looked up."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]
BF16_UNITS = ("avx512_bf16", "amx_bf16")  # of an x86 CPU
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def resolve_device(name: str | torch.device) -> torch.device:
    """ "auto" is the GPU when there is one, else the CPU; "cpu", "cuda" and "cuda:1" are taken at their word."""
    text = str(name)
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ValueError(f"device={text!r} is unknown; use 'auto', 'cpu', 'cuda' or 'cuda:N'") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"device={text!r} is not supported; use 'auto', 'cpu', 'cuda' or 'cuda:N'")
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= n_gpus:
        raise ValueError(f"device={text!r} is not there: torch sees {n_gpus} CUDA devices; use 'cpu' or 'auto'")
    return device


def compute_dtype(name: Precision, device: torch.device) -> torch.dtype:
    """The type that products are computed in. "auto" is BF16 where the hardware multiplies it, else FP32.

    A CPU without such units computes BF16 in software: measured on AVX2, a tenth of the FP32 speed forward and far less
    backward.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    units = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(units.get(unit) for unit in BF16_UNITS) else torch.float32


def set_threads(n_threads: int | None = None) -> int:
    """Let torch use `n_threads` CPU threads, or every core this process may run on. Returns the number."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if n_threads is None:
        n_threads = n_cores
    if n_threads < 1:
        raise ValueError(f"threads={n_threads} leaves nothing to compute with; use 1 to {n_cores}")
    torch.set_num_threads(n_threads)
    return n_threads


def leave_busy_cores(load: Path = Path("/proc/loadavg")) -> None:
    """Let torch use no more threads than there are cores which nobody else computes on right now, at least one.

    Threads wait for one another at every product. Beside five other busy processes on two cores, two took seven times
    as long for a token as one.
    """
    try:
        n_running = int(load.read_text(encoding="ascii").split()[3].split("/")[0])  # ourselves among them
    except (OSError, ValueError, IndexError):  # no Linux: nobody can be asked
        return
    n_cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, min(torch.get_num_threads(), n_cores + 1 - n_running)))


def keep_freed_memory() -> None:
    """Let the C library keep what tensors free for the next ones, instead of returning it to the system at once.

    By default glibc maps every large tensor anew and the kernel fills it with zeros page by page: a sixth of the time
    of a small model's training step. Does nothing where there is no glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Give the system back what keep_freed_memory() kept, so that what is measured next is its own."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def cache_directory() -> Path:
    """$ABYSSAL_CACHE, or where this system keeps what can be fetched again."""
    if own := os.environ.get("ABYSSAL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "abyssal"
