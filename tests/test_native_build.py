"""The folder of built libraries: one compilation for all, and one line for what goes wrong."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from abyssal.kernels import native_build
from abyssal.kernels.native_build import NotBuilt, library

TWICE = 'extern "C" int twice(int x) { return FACTOR * x; }\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small library instead of ours: what is tested is the folder."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "small.cpp").write_text(TWICE)
    monkeypatch.setattr(native_build, "SOURCES", folder)
    return folder


def build(folder: Path, said: list[str], factor: int = 2) -> ctypes.CDLL:
    return library("small", f"FACTOR={factor}", folder=folder, say=said.append)


def test_it_is_compiled_once_and_again_when_its_source_changes(sources: Path, tmp_path: Path):
    said: list[str] = []
    built = tmp_path / "built"
    assert build(built, said).twice(21) == 42
    assert build(built, said).twice(4) == 8
    assert said == [f"compiling small for this CPU, once (it is kept in {built})"]
    assert build(built, said, factor=3).twice(5) == 15
    (sources / "small.cpp").write_text("// changed\n" + TWICE)
    build(built, said)
    assert len(said) == 3 and len(list(built.glob("small-*.so"))) == 3
    assert not list(built.glob(".building-*"))


def test_two_processes_at_once_compile_once(sources: Path, tmp_path: Path):
    program = (
        "import sys; from pathlib import Path; from abyssal.kernels import native_build as b\n"
        "b.SOURCES = Path(sys.argv[1])\n"
        "print(b.library('small', 'FACTOR=2', folder=Path(sys.argv[2])).twice(3))\n"
    )
    command = [sys.executable, "-c", program, str(sources), str(tmp_path / "built")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [out for out, _ in outputs] == ["6\n", "6\n"]
    assert "".join(err for _, err in outputs).count("compiling") == 1


def test_what_goes_wrong_is_one_line(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    built = tmp_path / "built"
    (sources / "small.cpp").write_text("int twice(int x) { return y; }\n")
    with pytest.raises(NotBuilt, match=r"failed: .*error: .*y.* was not declared"):
        build(built, [])
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    with pytest.raises(NotBuilt, match="nothing could not be run: .*No such file"):
        build(built, [])
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(NotBuilt, match="false failed: it said nothing"):
        build(built, [])
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotBuilt, match="no C.. compiler is installed; install g.. or clang.., or name one in CXX"):
        build(built, [])
    assert not list(built.glob("*.so")) and not list(built.glob(".building-*"))


def test_a_library_needs_no_compiler_once_it_is_there(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    build(tmp_path, [])
    monkeypatch.setenv("PATH", "")
    assert build(tmp_path, []).twice(1) == 2


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_said(sources: Path, tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(NotBuilt, match="Permission denied"):
        build(tmp_path / "built", [])


def test_a_folder_that_is_a_file_is_said(sources: Path, tmp_path: Path):
    (tmp_path / "built").write_text("")
    with pytest.raises(NotBuilt, match="built: File exists"):
        build(tmp_path / "built", [])
