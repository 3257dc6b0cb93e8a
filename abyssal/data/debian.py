"""Packages of Debian as text: fetched by apt-get, unpacked into a cache, never installed.

The names and versions of the packages stand in the cache: ~/.cache/abyssal/debian/<package>_<version>_<machine>/.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from abyssal.data.documents import Source
from abyssal.data.installed_docs import documentation_source, readable

NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "abyssal" / "debian"


def debian_source(name: str, seed: int) -> Source:
    """ "debian:git-doc,perl-doc": the documentation in these packages."""
    packages = name.removeprefix("debian:").split(",")
    if bad := [package for package in packages if not NAME.fullmatch(package)]:
        raise ValueError(f"corpus {name}: {bad[0]!r} is no package name; write debian:NAME,NAME without spaces")
    roots = {unpacked(package, cache_folder()): package for package in packages}
    files = {root: readable(root) for root in roots}
    if empty := [package for root, package in roots.items() if not files[root]]:
        raise ValueError(f"corpus {name}: package {empty[0]} holds no documentation; take it out")
    return documentation_source(name, roots, files, seed)


def unpacked(package: str, cache: Path) -> Path:
    """The folder of a package's files; fetched once, whole or not at all."""
    if found := sorted(cache.glob(f"{package}_*")):
        return found[-1]
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise FileNotFoundError(
                f"corpus debian:{package} needs {program}, which this machine lacks; name a folder of text instead"
            )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as folder:
        _run(["apt-get", "download", package], package, Path(folder))
        archive = next(Path(folder).glob("*.deb"))
        _run(["dpkg-deb", "-x", archive.name, "files"], package, Path(folder))
        target = cache / archive.stem
        os.replace(Path(folder) / "files", target)
    return target


def _run(command: list[str], package: str, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise OSError(
            f"corpus debian:{package}: {command[0]} failed ({said}); check the name, run apt-get update, "
            "or name a folder of text instead"
        )
