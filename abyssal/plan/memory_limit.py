"""How much memory this process can have: the machine's, or less by a container's limit or a `ulimit`.

Owns reading the limits of Linux. Does not own what is planned to fit into them (memory.py), nor a GPU's memory, which
only torch knows (stages/refuse.py).

Two numbers, because they mean different things: more than `limit_bytes` can never be had, whatever else ends on the
machine, so that is what a plan is refused by; `free_bytes` is what there is right now, which is only worth a warning.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

NO_LIMIT = 1 << 60  # cgroup v1 writes "none" as nearly 2^63, `ulimit` as the largest number there is


class MemoryLimit(NamedTuple):
    limit_bytes: int
    free_bytes: int
    limited_by: str  # "RAM and swap of this machine", "the container's limit", "ulimit -v", "cuda:0"


def memory_limit(root: Path = Path("/")) -> MemoryLimit:
    """Of this process on a CPU. `root` is where proc and sys are found."""
    total, free, swap_total, swap_free = _machine(root)
    found = MemoryLimit(total + swap_total, free + swap_free, "RAM and swap of this machine" if swap_total else "RAM")
    for limit, used in _control_groups(root, swap_total):
        if limit < found.limit_bytes:
            found = MemoryLimit(limit, min(found.free_bytes, max(0, limit - used)), "the container's limit")
        else:
            found = found._replace(free_bytes=min(found.free_bytes, max(0, limit - used)))
    if (limit := _address_space()) < found.limit_bytes:
        found = MemoryLimit(limit, min(found.free_bytes, limit), "ulimit -v")
    return found


def resident_bytes(name: str = "VmRSS", root: Path = Path("/")) -> int:
    """What of this process is in memory now, or, as "VmHWM", at its highest since `forget_peak`. 0 where no Linux."""
    return _table(root / "proc/self/status").get(name, 0)


def forget_peak() -> None:
    """Let VmHWM begin anew, so that a stage's peak is its own. Where the system has none, nothing happens."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _machine(root: Path) -> tuple[int, int, int, int]:
    """RAM, available RAM, swap, free swap, in bytes."""
    table = _table(root / "proc/meminfo")
    if "MemTotal" in table:
        total, free = table["MemTotal"], table.get("MemAvailable", table.get("MemFree", 0))
        return total, free, table.get("SwapTotal", 0), table.get("SwapFree", 0)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # macOS
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total, 0, 0
    return NO_LIMIT, NO_LIMIT, 0, 0


def _control_groups(root: Path, swap_bytes: int) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of each group that this process is in: a limit above it holds too.

    What the page cache holds is not used: the kernel gives it back before anybody is refused.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            home, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "memory.swap.max")
        elif "memory" in kinds.split(","):
            home, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "")
        else:
            continue
        # inside a container the path is often the host's, and what is seen at `home` is our own group
        inside = home / path.strip("/")
        for group in [inside, *inside.parents]:
            if (limit := _number(group / names[0])) is not None and limit < NO_LIMIT:
                stat = _table(group / "memory.stat", unit=1)
                used = (_number(group / names[1]) or 0) - stat.get("inactive_file", 0) - stat.get("active_file", 0)
                swap = _number(group / names[2]) if names[2] else None
                yield limit + min(swap_bytes, NO_LIMIT if swap is None else swap), max(0, used)
            if group == home:
                break


def _address_space() -> int:
    try:
        import resource  # not on Windows
    except ImportError:
        return NO_LIMIT
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return NO_LIMIT if limit == resource.RLIM_INFINITY else limit


def _table(path: Path, *, unit: int = 1024) -> dict[str, int]:
    """`Name: 12 kB` a line, or `name 12`; in bytes."""
    table = {}
    for line in _text(path).splitlines():
        name, *values = line.replace(":", " ").split()
        if values and values[0].isdecimal():
            table[name] = int(values[0]) * unit
    return table


def _number(path: Path) -> int | None:
    """None where there is no such file, NO_LIMIT where it says "max"."""
    text = _text(path).strip()
    return NO_LIMIT if text == "max" else int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
