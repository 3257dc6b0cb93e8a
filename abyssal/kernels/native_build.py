"""Own C++ (`native/`) made into a library where it is first used, and kept for the next time. (ahead-of-time kernels)

A library is made for this very CPU by the compiler that is there, in seconds, and stands in a folder outside the
package under a hash of everything that decides its bytes but the compiler. Two processes at once make it once; one that
is killed leaves nothing that a later one would take. Owns no tensor and no weight.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
COMPILERS = ("c++", "g++", "clang++")
# no contraction: a fused multiply-add stands where the source says so and nowhere else, whatever the compiler
FLAGS = ("-std=c++20", "-O2", "-ftree-vectorize", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
LINK = ("-shared", "-fPIC", "-pthread")
CPU_FIELDS = ("model name", "flags", "Features", "CPU part")  # of /proc/cpuinfo
SECONDS = 600  # after which a compiler counts as broken


class NotBuilt(Exception):
    """Why there is no library here, in one line."""


def library(
    name: str,
    *defined: str,
    folder: Path,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> ctypes.CDLL:
    """`name`.cpp with these macros defined; raises NotBuilt. `say` is told when a compiler is started."""
    flags = (*FLAGS, _for_this_cpu(), *(f"-D{macro}" for macro in defined), *LINK)
    try:
        path = folder / f"{name}-{_key(flags)}.so"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(folder / f"{name}.lock"):
                if not path.is_file():
                    _compile(SOURCES / f"{name}.cpp", path, flags, say)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NotBuilt(f"{folder}: {error.strerror or error}") from None


def compiler() -> list[str]:
    """$CXX, or the first that is installed; raises NotBuilt."""
    if own := os.environ.get("CXX"):
        return shlex.split(own)
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise NotBuilt("no C++ compiler is installed; install g++ or clang++, or name one in CXX")


def _compile(source: Path, path: Path, flags: tuple[str, ...], say: Callable[[str], None]) -> None:
    command = [*compiler(), *flags]
    say(f"compiling {source.stem} for this CPU, once (it is kept in {path.parent})")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as scratch:
        made = Path(scratch) / path.name
        try:
            done = subprocess.run(
                [*command, str(source), "-o", str(made)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotBuilt(f"{command[0]} could not be run: {error}") from None
        if done.returncode or not made.is_file():
            lines = [line.strip() for line in (done.stderr or done.stdout).splitlines()]
            wrong = next((line for line in lines if "error" in line), lines[-1] if lines else "it said nothing")
            raise NotBuilt(f"{command[0]} failed: {wrong[:200]}")
        os.replace(made, path)


def _for_this_cpu() -> str:
    return "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"


def _key(flags: tuple[str, ...]) -> str:
    what = hashlib.blake2b(digest_size=12)
    for path in sorted(SOURCES.iterdir()):
        what.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    what.update(repr((flags, os.environ.get("CXX"), platform.system(), platform.machine(), _cpu())).encode())
    return what.hexdigest()


def _cpu() -> str:
    """Whatever says which instructions there are: a folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(CPU_FIELDS)}))
    except OSError:
        return platform.processor()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time, where files can be locked; elsewhere each makes its own, and the last one stays."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
