"""Machine files: their rates come back for their own shapes, and a bad file is refused in one line."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.plan.machine_file import MACHINES, MachineSpec, Sourced, machine_toml, read_machine
from abyssal.typed_toml import table_toml

NAMES = sorted(path.stem for path in MACHINES.glob("*.toml"))
SIZES = st.integers(1, 1 << 16)


@pytest.fixture(scope="module")
def h800() -> MachineSpec:
    return read_machine("h800x2048")


@pytest.mark.parametrize("name", NAMES)
def test_writing_and_reading_gives_the_same_machine(name: str, tmp_path: Path):
    machine = read_machine(name)
    path = tmp_path / f"{name}.toml"
    path.write_text(machine_toml(machine), encoding="utf-8")
    assert read_machine(path) == machine


@pytest.mark.parametrize("name", NAMES)
def test_a_point_gets_its_own_rate(name: str):
    machine = read_machine(name)
    for p in machine.gemm:
        seconds = machine.gemm_seconds(
            precision=p.precision, rows=p.rows, inner=p.inner, outer=p.outer, groups=p.groups
        )
        flops = 2 * p.groups * p.rows * p.inner * p.outer
        assert flops / seconds == pytest.approx(p.flops_per_second, rel=1e-9), p


def test_the_experts_of_a_v3_rank_take_what_deepgemm_published(h800: MachineSpec):
    """EP64 leaves 4 experts a rank, which see 4 x 8,192 of 4,096 x 8 routed rows: gate and up are one product."""
    seconds = h800.gemm_seconds(precision="fp8", groups=4, rows=8192, inner=7168, outer=4096)
    assert seconds == pytest.approx(2 * 4 * 8192 * 7168 * 4096 / 1297e12)


def test_one_row_is_bound_by_reading_the_weights(h800: MachineSpec):
    """7,168 x 4,096 FP8 weights are 29.4 MB: 9.8 us at 3.0 TB/s, while their 59 MFLOP would take 0.03 us."""
    seconds = h800.gemm_seconds(precision="fp8", rows=1, inner=7168, outer=4096)
    assert 9.8e-6 < seconds < 9.8e-6 / 0.65


@given(rows=SIZES, inner=SIZES, outer=SIZES, groups=st.integers(1, 64))
def test_no_product_is_faster_than_its_weights_are_read_or_than_the_fastest_point(
    rows: int, inner: int, outer: int, groups: int
):
    machine = read_machine("h800x2048")
    seconds = machine.gemm_seconds(precision="fp8", rows=rows, inner=inner, outer=outer, groups=groups)
    assert seconds >= groups * inner * outer / machine.memory_bytes_per_second.value
    assert 2 * groups * rows * inner * outer / seconds <= 1358e12 * (1 + 1e-9)


def test_nothing_takes_no_time(h800: MachineSpec):
    assert h800.gemm_seconds(precision="fp8", rows=0, inner=7168, outer=4096) == 0.0
    assert h800.memory_seconds(3.0e12) == 1.0


def test_the_system_shows_more_than_the_tensors(h800: MachineSpec):
    assert h800.resident_bytes(lasting_bytes=40e6, passing_bytes=60e6) == 100e6
    shown = replace(h800, runtime_bytes=Sourced(value=20e6, source="x"), allocator_share=Sourced(value=1.1, source="x"))
    assert shown.resident_bytes(lasting_bytes=40e6, passing_bytes=60e6) == pytest.approx(126e6)


def test_a_precision_that_is_missing_is_widened(h800: MachineSpec):
    assert h800.computes_in("fp8") == "fp8"
    narrow = replace(h800, gemm=tuple(point for point in h800.gemm if point.precision != "fp8"))
    assert narrow.computes_in("fp8") == "bfloat16"
    shape: dict[str, Any] = {"rows": 6144, "inner": 2816, "outer": 17920}
    assert narrow.gemm_seconds(precision="fp8", **shape) == h800.gemm_seconds(precision="bfloat16", **shape)
    no_wide = replace(h800, gemm=tuple(point for point in h800.gemm if point.precision == "fp8"))
    with pytest.raises(ValueError, match="machine h800x2048 has no products in float32 or wider; add points"):
        no_wide.computes_in("float32")


def figures(**changes: Any) -> dict[str, Any]:
    content = tomllib.loads((MACHINES / "h800x2048.toml").read_text(encoding="utf-8"))
    return content | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "green"}, "unknown key colour; a machine has .*title"),
        ({"price_usd_per_device_hour": {"value": 2.0, "source": "x", "kind": 1}}, "unknown key price.*hour.kind; "),
        ({"kind": "tpu"}, "kind='tpu'; use one of 'cpu', 'gpu', 'unified'"),
        ({"memory_bytes": "80 GB"}, "memory_bytes='80 GB' must be of type float"),
        ({"memory_bytes": -1}, "memory_bytes=-1.0 must be above 0 and finite"),
        ({"memory_bytes": float("nan")}, "memory_bytes=nan must be above 0 and finite"),
        ({"memory_bytes_per_second": {"value": 0, "source": "x"}}, "memory_bytes_per_second.value=0.0 must be above 0"),
        ({"memory_bytes_per_second": {"value": 3e12}}, "memory_bytes_per_second.source is missing; give it a value"),
        ({"memory_bytes_per_second": 3e12}, "memory_bytes_per_second=3000000000000.0 must be a table"),
        ({"peak_source": " "}, "peak_source is empty; name paper and section"),
        ({"usable_memory_share": {"value": 1.2, "source": "x"}}, "usable_memory_share.value=1.2 must be a share up"),
        ({"allocator_share": {"value": 0.9, "source": "x"}}, "allocator_share.value=0.9 must be at least 1"),
        ({"communication_share": {"value": 1, "source": "x"}}, "communication_share.value=1.0 must be a share"),
        ({"n_devices": 2047}, "n_devices=2047 is no multiple of devices_per_node=8; count whole nodes"),
        ({"peak_flops_per_second": {"fp4": 1e15}}, "key of peak_flops_per_second='fp4'; use one of 'fp8'"),
        ({"peak_flops_per_second": {"fp8": 2e15}}, "peak_flops_per_second.bfloat16 is missing, but gemm has points"),
        ({"peak_flops_per_second": {"fp8": 1e15, "bfloat16": 1e15}}, "1.058e.15 FLOP/s in fp8 is above the peak"),
        ({"gemm": []}, "gemm has no points; name at least one product"),
        ({"gemm": [1]}, r"gemm must be tables; write \[\[gemm\]\]"),
        ({"gemm": [{"precision": "fp8", "source": "x", "points": [[1, 2, 3, 4]]}]}, "must be a list of 5 values"),
        ({"gemm": [{"precision": "fp8", "source": "x", "points": [[1, 0, 3, 4, 1e9]]}]}, "gemm.rows=0 must be above 0"),
        ({"gemm": [{"precision": "fp8", "points": []}]}, "gemm.source is missing"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_in_one_line(changes: dict[str, Any], message: str, tmp_path: Path):
    path = tmp_path / "bad.toml"
    path.write_text(table_toml(figures(**changes)), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as refusal:
        read_machine(path)
    assert str(refusal.value).startswith(str(path)) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("field", ["intra_node", "inter_node"])
def test_devices_that_nothing_links_are_refused(field: str, tmp_path: Path):
    content = figures()
    del content[field]
    path = tmp_path / "bad.toml"
    path.write_text(table_toml(content), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{field} is missing, but .* say how they are linked"):
        read_machine(path)


def test_a_file_says_in_what_it_differs_from_its_base(tmp_path: Path, h800: MachineSpec):
    (tmp_path / "below.toml").write_text(table_toml(figures()), encoding="utf-8")
    (tmp_path / "above.toml").write_text('base = "below"\nn_devices = 16\n', encoding="utf-8")
    assert read_machine(tmp_path / "above.toml") == replace(h800, name="above", n_devices=16)
    (tmp_path / "below.toml").write_text('base = "above"', encoding="utf-8")
    with pytest.raises(ValueError, match="below.toml: base='above' leads back to itself"):
        read_machine(tmp_path / "above.toml")
    (tmp_path / "below.toml").write_text('base = "../h800x2048"', encoding="utf-8")
    with pytest.raises(ValueError, match="base='../h800x2048' must be the name of a machine in the same folder"):
        read_machine(tmp_path / "below.toml")


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="machine .*h900.toml does not exist; there are .*h800x2048"):
        read_machine("h900")
    (tmp_path / "x.toml").write_text("= 3", encoding="utf-8")
    with pytest.raises(ValueError, match="x.toml is not TOML"):
        read_machine(tmp_path / "x.toml")
