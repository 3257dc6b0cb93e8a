"""What the disk tier of the prefix cache costs, and what it saves.

    python bench/disk_cache.py [--models 3M 63M smollm2] [--tokens 960] [--pairs 3] [--no-save]

For each model and pair one new prompt: computed and offered by one engine, and read back by another one, as after a
restart. A step's share of that is the tier's alone: to copy what it is offered, to
read, check and place what it brings. Times are those of the engine's own thread, so that a busy machine does not count;
the files are in the page cache, so that the disk does not either. `opened` is the hash of the weights, which runs
before the first answer or beside it. Then the start with 10,000 small blocks in the folder.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from common import append_result, make_ours, model_config

import abyssal
from abyssal.engine.block_files import BlockFiles
from abyssal.engine.cache_fingerprint import fingerprint, weights_of
from abyssal.engine.disk_cache import DiskCache
from abyssal.engine.engine import Engine
from abyssal.model.transformer import Transformer
from abyssal.types import SamplingParams

ONE = SamplingParams(max_tokens=1, temperature=0.0)
SMALL_BLOCK = 16 << 10


@dataclass(frozen=True, kw_only=True)
class Options:
    models: tuple[str, ...] = ("3M", "63M", "smollm2")
    tokens: int = 960  # of a prompt; the last one is always computed
    pairs: int = 3
    save: bool = True  # append the results to results/disk_cache.jsonl


def model_of(name: str) -> Transformer:
    if name in ("3M", "11M", "63M"):
        return make_ours(model_config(name), dtype=torch.float32)  # type: ignore[arg-type]
    return abyssal.load(name).model


def thread_seconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def timed(engine: Engine, prompt: list[int], part: str) -> tuple[float, float]:
    """Seconds of one answer, and of those in one method of the tier."""
    spent, method = 0.0, getattr(engine._tier, part)

    def watched(*arguments: object) -> object:
        nonlocal spent
        start = time.thread_time()
        result = method(*arguments)
        spent += time.thread_time() - start
        return result

    setattr(engine._tier, part, watched)
    whole = thread_seconds(lambda: engine.generate([prompt], ONE))
    return whole, spent


def measure(name: str, folder: Path, options: Options) -> dict[str, Any]:
    model = model_of(name)
    anew, offering, read, bringing = [], [], [], []
    generator = torch.Generator().manual_seed(0)
    settings: dict[str, Any] = {"eos_ids": [], "max_batch": 4, "record_experts": False}
    Engine(model, **settings).generate([[1] * 64], ONE)  # warm
    cache, stats, found = DiskCache(folder=folder), None, 0
    for _ in range(options.pairs):
        prompt = torch.randint(0, model.config.vocab_size, (options.tokens,), generator=generator).tolist()
        for is_there in (False, True):
            engine = Engine(model, prefix_cache=True, disk_cache=cache, **settings)
            whole, parts = timed(engine, prompt, "bring" if is_there else "offer")
            (read if is_there else anew).append(whole - (0 if is_there else parts))
            (bringing if is_there else offering).append(parts)
            engine.close()
            stats, found = engine.disk_stats, engine.prefix_stats.n_found_on_disk
        assert found >= options.tokens - 65, f"only {found} tokens were found"
    assert stats is not None and stats.fault is None
    return {
        "model": name,
        "tokens": options.tokens,
        "bytes_per_token": stats.n_bytes // (stats.n_blocks * 64),
        "anew_ms": 1e3 * statistics.median(anew),
        "offer_ms": 1e3 * statistics.median(offering),
        "bring_ms": 1e3 * statistics.median(bringing),
        "read_ms": 1e3 * statistics.median(read),
        "faster": statistics.median(a / b for a, b in zip(anew, read, strict=True)),
        "weights_mb": sum(tensor.nbytes for _, tensor in weights_of(model)) / 1e6,
        "opened_s": thread_seconds(lambda: fingerprint({}, weights_of(model))),
    }


def scan(folder: Path, n_blocks: int = 10_000) -> dict[str, Any]:
    files, block = BlockFiles(folder, max_bytes=1 << 40), np.zeros(SMALL_BLOCK, np.uint8)
    written = thread_seconds(
        lambda: [files.write("0" * 64, n.to_bytes(32, "little"), block, used_ns=n) for n in range(n_blocks)]
    )
    files.close()
    times = []
    for _ in range(5):
        start = time.thread_time()
        files = BlockFiles(folder, max_bytes=1 << 40)
        times.append(time.thread_time() - start)
        assert len(files.records) == n_blocks
        files.close()
    return {"blocks": n_blocks, "scan_ms": 1e3 * statistics.median(times), "write_us": 1e6 * written / n_blocks}


def main(options: Options) -> None:
    torch.set_num_threads(1)
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(name, Path(folder), options)
        print(
            "{model}: {bytes_per_token:,} B a token; {tokens} tokens anew {anew_ms:.0f} ms, offered in "
            "{offer_ms:.1f} ms; brought in {bring_ms:.1f} ms, answered in {read_ms:.0f} ms, {faster:.1f} times "
            "as fast; {weights_mb:.0f} MB of weights hashed in {opened_s:.2f} s".format(**result)
        )
        if options.save:
            append_result("disk_cache", result)
    with tempfile.TemporaryDirectory() as folder:
        result = scan(Path(folder))
    print("{blocks:,} blocks: found in {scan_ms:.0f} ms at the start, {write_us:.0f} us to write one".format(**result))
    if options.save:
        append_result("disk_cache", result)


if __name__ == "__main__":
    main(tyro.cli(Options))
