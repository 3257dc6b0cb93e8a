"""Loading a sharded BF16 checkpoint, time and peak memory, beside transformers: python bench/load.py

    python bench/load.py [--preset r1_distill_qwen_7b] [--shard-gb 2] [--work DIR] [--random]

Each loads in a process of its own, in turn, from files that the kernel was told to forget, and then reads every weight
once, so that nothing is left to be fetched later. The checkpoint has the published shape and no numbers: its files are
holes, which take no disk (`--random` fills them). So the time is that of memory, not of a disk. Peaks are the kernel's:
all that is resident (VmHWM), which counts file pages that a process maps, and memory of its own (RssAnon, looked at 50
times a second). The aim is a peak of at most the weights and one shard, and 10 % of both.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from common import append_result
from transformers import AutoModelForCausalLM

from abyssal.checkpoint.convert import config_to_hf
from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.shard_index import INDEX
from abyssal.checkpoint.tensor_names import official_views
from abyssal.machine import set_threads
from abyssal.model.presets import PRESETS
from abyssal.model.transformer import Transformer

Who = Literal["abyssal", "transformers"]
WHO: tuple[Who, ...] = ("abyssal", "transformers")
LOOK_EVERY_S = 0.02
FILL_BYTES = 64_000_000


@dataclass(frozen=True, kw_only=True)
class Options:
    preset: str = "r1_distill_qwen_7b"
    shard_gb: float = 2.0
    pairs: int = 1
    threads: int = 2
    random: bool = False  # numbers in the files, which then take disk
    work: Path | None = None  # where the checkpoint is made, and removed again
    save: bool = True  # append the result to results/load.jsonl
    who: Who | None = None  # load --work with this one and print what it took: what the child processes do


def write_checkpoint(path: Path, options: Options) -> tuple[int, int]:
    """A config.json, an index and shards of the right names and sizes. Returns bytes of all and of the largest."""
    config = PRESETS[options.preset]()
    with torch.device("meta"):
        shapes = {name: tuple(view.shape) for name, view in official_views(Transformer(config)).items()}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and sum(map(n_bytes, [*shards[-1].values(), shape])) > options.shard_gb * 1e9:
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = path / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(file, shard, random=options.random)
        weight_map |= dict.fromkeys(shard, file.name)
    sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
    (path / "config.json").write_text(json.dumps(config_to_hf(config), indent=2))
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}))
    return sum(sizes), max(sizes)


def n_bytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


def write_shard(file: Path, shapes: dict[str, tuple[int, ...]], *, random: bool) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + n_bytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        if random:
            numbers = torch.randn(FILL_BYTES // 2).bfloat16().view(torch.uint8).numpy().tobytes()
            for start in range(0, end, FILL_BYTES):
                handle.write(numbers[: end - start])
        handle.truncate(8 + len(text) + end)


def load_as(who: Who, path: Path, *, threads: int) -> dict[str, float]:
    """Seconds, and the peak of all that is resident, before loading and after every weight was read."""
    set_threads(threads)
    before, start = peak_bytes(), time.perf_counter()
    model: torch.nn.Module
    if who == "abyssal":
        model = load_checkpoint(path, dtype="bfloat16", weights="compute").model
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    loaded = time.perf_counter() - start
    for parameter in model.parameters():
        parameter.detach().amax()
    return {
        "seconds": loaded,
        "seconds_with_touch": time.perf_counter() - start,
        "peak_before": before,
        "peak": peak_bytes(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def peak_bytes() -> int:
    return status_bytes("self", "VmHWM")


def status_bytes(process: str, field: str) -> int:
    """A line of /proc/<process>/status, which counts in kB; 0 when the process has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def forget(file: Path) -> None:
    """Drop it from the page cache: else whoever loads second finds it there."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_a_child(who: Who, path: Path, options: Options) -> dict[str, float]:
    for file in path.glob("*.safetensors"):
        forget(file)
    command = [sys.executable, __file__, "--who", who, "--work", str(path), "--threads", str(options.threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        own = 0
        while child.poll() is None:
            own = max(own, status_bytes(str(child.pid), "RssAnon"))
            time.sleep(LOOK_EVERY_S)
        assert child.stdout is not None
        said = child.stdout.read()
    if child.returncode:
        raise RuntimeError(f"{who} ended with status {child.returncode} after {own / 1e9:.1f} GB of its own")
    return json.loads(said.splitlines()[-1]) | {"peak_own": own}


def main(options: Options) -> None:
    if options.who is not None:
        assert options.work is not None
        print(json.dumps(load_as(options.who, options.work, threads=options.threads)))
        return
    path = Path(tempfile.mkdtemp(dir=options.work))
    try:
        size, shard = write_checkpoint(path, options)
        runs = [(who, in_a_child(who, path, options)) for _ in range(options.pairs) for who in WHO]
    finally:
        shutil.rmtree(path)
    most = 1.1 * (size + shard)
    print(f"{options.preset}, {size / 1e9:.1f} GB in shards of at most {shard / 1e9:.1f}, {options.threads} threads")
    print(f"{'':>13} {'load s':>7} {'with touch':>10} {'peak GB':>8} {'own GB':>7}   at most {most / 1e9:.1f}")
    for who, run in runs:
        print(
            f"{who:>13} {run['seconds']:7.1f} {run['seconds_with_touch']:10.1f} {run['peak'] / 1e9:8.2f} "
            f"{run['peak_own'] / 1e9:7.2f}   {'within' if run['peak'] <= most else 'above'}"
        )
    if options.save:
        result = {"preset": options.preset, "bytes": size, "shard": shard, "at_most": most, "random": options.random}
        append_result("load", result | {"runs": {who: [run for name, run in runs if name == who] for who in WHO}})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
