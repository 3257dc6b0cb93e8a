"""What memory there is: read from small trees of /proc and /sys that a reader can add up."""

from __future__ import annotations

import mmap
import resource
import subprocess
import sys
from pathlib import Path

from abyssal.plan.memory_limit import forget_peak, memory_limit, resident_bytes

MEMINFO = "MemTotal: 16000 kB\nMemFree: 100 kB\nMemAvailable: 9000 kB\nSwapTotal: {swap} kB\nSwapFree: {swap} kB\n"
KB = 1024


def tree(tmp_path: Path, files: dict[str, str] | None = None, *, cgroup: str, swap: int = 0) -> Path:
    """`files`: path below sys/fs/cgroup -> content."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(MEMINFO.format(swap=swap))
    (tmp_path / "proc/self/cgroup").write_text(cgroup)
    for name, content in (files or {}).items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


def test_without_a_container_it_is_ram_and_swap(tmp_path: Path):
    limit = memory_limit(tree(tmp_path, cgroup="0::/user.slice\n", swap=500))
    assert limit == (16500 * KB, 9500 * KB, "RAM and swap of this machine")


def test_a_container_of_version_2_and_what_its_page_cache_holds(tmp_path: Path):
    """8,000,000 allowed, 3,000,000 used of which 1,000,000 are files: 6,000,000 are free."""
    stat = "anon 2000000\ninactive_file 600000\nactive_file 400000\n"
    files = {"memory.max": "8000000\n", "memory.current": "3000000\n", "memory.stat": stat}
    root = tree(tmp_path, files, cgroup="0::/\n")
    assert memory_limit(root) == (8_000_000, 6_000_000, "the container's limit")


def test_a_limit_on_a_parent_group_holds_and_max_is_none(tmp_path: Path):
    files = {"a/memory.max": "5000000", "a/memory.current": "1000000", "a/b/memory.max": "max\n"}
    root = tree(tmp_path, files, cgroup="0::/a/b\n")
    assert memory_limit(root)[:2] == (5_000_000, 4_000_000)


def test_a_container_may_swap_as_far_as_it_is_let(tmp_path: Path):
    more = tree(tmp_path, {"memory.max": "8000000", "memory.swap.max": "max"}, cgroup="0::/\n", swap=100)
    assert memory_limit(more).limit_bytes == 8_000_000 + 100 * KB
    (more / "sys/fs/cgroup/memory.swap.max").write_text("0")
    assert memory_limit(more).limit_bytes == 8_000_000


def test_version_1_whose_path_is_the_hosts(tmp_path: Path):
    """Inside a container nothing lies at the path that is named; the limit stands at the root that is seen."""
    files = {"memory/memory.limit_in_bytes": "7000000", "memory/memory.usage_in_bytes": "500000"}
    root = tree(tmp_path, files, cgroup="5:cpu:/x\n4:memory:/docker/0123\n")
    assert memory_limit(root) == (7_000_000, 6_500_000, "the container's limit")
    (root / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("9223372036854771712")  # "none"
    assert memory_limit(root).limited_by == "RAM"


def test_a_ulimit_counts():
    code = "from abyssal.plan.memory_limit import memory_limit; print(memory_limit()[::2])"
    small = 1 << 31
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (small, small)),
    )  # fmt: skip
    assert done.stdout.strip() == f"({small}, 'ulimit -v')"


def test_the_peak_of_a_stage_is_its_own():
    """60 MB that are written to and unmapped again: in the peak, and out of it once it begins anew."""
    if not resident_bytes():
        return  # no Linux
    forget_peak()
    before = resident_bytes()
    with mmap.mmap(-1, 60_000_000) as block:  # not the C library's: it may keep what is freed
        block.write(b"1" * len(block))
        assert resident_bytes("VmHWM") >= resident_bytes() > before + 50_000_000
    assert resident_bytes("VmHWM") > before + 50_000_000
    forget_peak()
    assert resident_bytes("VmHWM") < before + 40_000_000
