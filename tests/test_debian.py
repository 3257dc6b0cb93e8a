"""Packages as a source, with programs of our own in the place of apt-get and dpkg-deb: no network, no Debian."""

from pathlib import Path

import pytest

from abyssal.data.corpus import open_source

APT = """#!/bin/sh
case "$2" in
    nosuch) echo "E: Unable to locate package $2" >&2; exit 100;;
    *) echo "$2" >> "$FETCHED"; echo deb > "$2_1%3a2.0_all.deb";;
esac
"""
DPKG = """#!/bin/sh
mkdir -p "$3/usr/share/doc"
case "$2" in bare*) ;; *) echo "text of $2" > "$3/usr/share/doc/manual.txt";; esac
"""


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("apt-get", APT), ("dpkg-deb", DPKG)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FETCHED", str(tmp_path / "fetched"))
    return tmp_path / "fetched"


def test_packages_are_fetched_once_and_read_as_text(fetched: Path):
    for _ in range(2):
        source = open_source("debian:git-doc,perl-doc", seed=0)
        assert sorted((d.name, d.text) for d in source.documents()) == [
            ("git-doc/usr/share/doc/manual.txt", "text of git-doc_1%3a2.0_all.deb\n"),
            ("perl-doc/usr/share/doc/manual.txt", "text of perl-doc_1%3a2.0_all.deb\n"),
        ]
    assert fetched.read_text().split() == ["git-doc", "perl-doc"]


def test_what_cannot_be_fetched_is_named_with_a_remedy(fetched: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(OSError, match=r"debian:nosuch: apt-get failed \(E: Unable to locate package nosuch\); check"):
        open_source("debian:nosuch", seed=0)
    with pytest.raises(ValueError, match="package bare holds no documentation; take it out"):
        open_source("debian:bare", seed=0)
    cache = fetched.parent / "cache" / "abyssal" / "debian"
    assert [path.name for path in cache.iterdir()] == ["bare_1%3a2.0_all"]  # nothing half fetched
    monkeypatch.setenv("PATH", str(fetched.parent / "no-programs"))
    with pytest.raises(
        FileNotFoundError, match="debian:git-doc needs apt-get, which this machine lacks; name a folder"
    ):
        open_source("debian:git-doc", seed=0)


@pytest.mark.parametrize("name", ["debian:", "debian:a, b", "debian:-o=x", "debian:../x", "debian:git-doc,"])
def test_names_that_are_none_never_reach_a_program(name: str):
    with pytest.raises(ValueError, match="is no package name; write debian:NAME,NAME"):
        open_source(name, seed=0)
