"""Documentation trees as packages lay them out: which files are read, and in which form they come out."""

import gzip
from pathlib import Path

import pytest

from abyssal.data import installed_docs
from abyssal.data.corpus import open_source
from abyssal.data.installed_docs import documents_of, readable


def lay(root: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(raw) if name.endswith((".gz", ".dz")) else raw)


def names(paths: list[Path], root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in paths)


def test_a_manual_in_several_formats_is_read_in_its_plain_one(tmp_path: Path):
    lay(tmp_path, {"html/a.html": "<p>a</p>" * 99, "src/a.rst.txt": "a\n" * 99, "man/man3/a.3perl.gz": ".SH a"})
    assert names(readable(tmp_path), tmp_path) == ["src/a.rst.txt"]
    (tmp_path / "src/a.rst.txt").unlink()
    assert names(readable(tmp_path), tmp_path) == ["html/a.html"]
    (tmp_path / "html/a.html").unlink()
    assert names(readable(tmp_path), tmp_path) == ["man/man3/a.3perl.gz"]


def test_licences_and_changelogs_are_not_read(tmp_path: Path):
    lay(tmp_path, {"copyright": "c", "LICENSE.txt": "l", "changelog.gz": "c", "README.gz": "r", "picture.png": b"\x89"})
    assert names(readable(tmp_path), tmp_path) == ["README.gz"]


def test_files_come_out_as_plain_text(tmp_path: Path):
    entries = "".join(f"Sea{i}\n   Water number {i}.\n\n" for i in range(1000))
    sense = "00001740 03 n 01 entity 0 000 | what is\n"
    lay(
        tmp_path,
        {"a.html": "<p>one</p>", "man/man1/a.1.gz": ".B two", "g.dict.dz": entries, "wordnet/data.noun": sense},
    )
    text = {path.name: [d.text for d in documents_of(path, "x")] for path in tmp_path.rglob("*") if path.is_file()}
    assert text["a.html"] == ["one\n"] and text["a.1.gz"] == ["two\n"] and text["data.noun"] == ["entity: what is\n"]
    assert len(text["g.dict.dz"]) > 3 and "".join(text["g.dict.dz"]) == entries  # a dictionary comes in pages
    assert all(page.startswith("Sea") and len(page) <= 8_000 for page in text["g.dict.dz"])


def test_a_damaged_file_is_passed_over_and_a_strange_encoding_shows(tmp_path: Path):
    lay(tmp_path, {"a.txt": "caf\xe9".encode("latin-1")})
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"text" * 999)[:40])
    assert [d.text for d in documents_of(tmp_path / "a.txt", "a")] == ["caf\ufffd"]
    assert list(documents_of(tmp_path / "b.txt.gz", "b")) == []


def test_the_documentation_of_this_machine_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lay(tmp_path, {"doc/git/readme.md": "one", "doc/perl/x.pod": "=head1 two", "doc/none/photo.png": b""})
    monkeypatch.setattr(installed_docs, "ROOTS", (str(tmp_path / "doc"), str(tmp_path / "gone")))
    monkeypatch.setattr(installed_docs.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path / "site")})
    lay(tmp_path, {"site/tool/README.md": "three", "site/tool/LICENSE.txt": "l"})
    found = {d.name: d.text for d in open_source("docs", seed=0).documents()}
    assert found == {"doc/git/readme.md": "one", "doc/perl/x.pod": "two\n", "site/tool/README.md": "three"}
    monkeypatch.setattr(installed_docs, "ROOTS", ())
    monkeypatch.setattr(installed_docs.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path / "nothing")})
    with pytest.raises(ValueError, match="no documentation found"):
        open_source("docs", seed=0)
