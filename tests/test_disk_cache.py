"""The disk tier behind the engine: the same answers from it as without it, whatever happens to its files."""

from __future__ import annotations

import errno
import functools
import gc
import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import KINDS, random_prompts, small_model
from test_engine import GREEDY, plain, same

import abyssal.engine.block_files as block_files
from abyssal.engine import Engine
from abyssal.engine.block_bytes import block_width, read_blocks, write_blocks
from abyssal.engine.block_files import FOLDER
from abyssal.engine.cache_fingerprint import cpu, facts, fingerprint, weights_of
from abyssal.engine.disk_cache import DiskCache
from abyssal.engine.scheduler import PrefixStats
from abyssal.types import SamplingParams


def engine_on(folder: Path, model=None, *, max_bytes: int = 1 << 30, tokenizer: str = "", **settings) -> Engine:
    cache = DiskCache(folder=folder, max_bytes=max_bytes, tokenizer=tokenizer)
    settings = {"eos_ids": [], "block_size": 4, "prefix_cache": True, "disk_cache": cache} | settings
    return Engine(model or small_model(), **settings)


@functools.cache
def _wanted(prompt: tuple[int, ...]):
    return plain(small_model(), list(prompt), GREEDY)


def wanted(prompt: list[int]):
    """What `small_model` answers, without any cache."""
    return _wanted(tuple(prompt))


def records(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / FOLDER).glob("*/*"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_block_go_into_another_and_are_the_same(kind: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    stores = [torch.randn(40, 6, generator=generator).to(dtype), torch.randn(40, 5, generator=generator).to(dtype),
              torch.randint(0, 9, (40, 2, 3), generator=generator, dtype=torch.uint8)]  # fmt: skip
    before = [store.clone() for store in stores]
    bytes_NX = read_blocks(stores, torch.tensor([7, 2]), 4)
    assert bytes_NX.shape == (2, block_width(stores, 4)) == (2, 4 * (11 * dtype.itemsize + 6))
    write_blocks(stores, torch.tensor([3, 9]), 4, bytes_NX)
    for store, was in zip(stores, before, strict=True):
        assert torch.equal(store[12:16], was[28:32]) and torch.equal(store[36:40], was[8:12])
        others = [slot for slot in range(40) if slot // 4 not in (3, 9)]
        assert torch.equal(store[others], was[others])


@pytest.mark.parametrize("kind, how", [*((kind, {}) for kind in KINDS), ("mla_moe_query_latent", {"native": False})])
def test_answers_after_a_restart_are_those_computed_anew_to_the_bit(tmp_path: Path, kind: str, how: dict[str, bool]):
    model = small_model(kind)
    [head] = random_prompts([20])
    prompts = [head + tail for tail in random_prompts([1, 4, 9], seed=1)]
    each = [SamplingParams(max_tokens=9, seed=i) for i in range(3)]
    want = Engine(model, eos_ids=[], block_size=4, invariant=True, **how).generate(prompts, each)
    first = engine_on(tmp_path, model, invariant=True, **how)
    assert first.generate(prompts[:1], each[:1]) is not None
    first.close()
    engine = engine_on(tmp_path, model, invariant=True, **how)
    got = engine.generate(prompts, each)
    # the head of one prompt and what was drawn: seven blocks; the other two find the first five in memory by then
    assert engine.prefix_stats == PrefixStats(21 + 24 + 29, 20 * 3, 20) and engine.disk_stats.n_read == 5
    for one, other in zip(got, want, strict=True):
        assert one.ids == other.ids and one.logps == other.logps
        assert (one.experts is None) == (other.experts is None)
        assert one.experts is None or torch.equal(one.experts, other.experts)
    engine.close()


def test_a_conversation_goes_on_after_a_restart_answers_included(tmp_path: Path):
    [prompt] = random_prompts([9])
    first = engine_on(tmp_path)
    answer = first.generate([prompt], GREEDY)[0].ids
    first.close()
    engine = engine_on(tmp_path)
    engine.generate([prompt + answer + [5, 6, 7]], GREEDY)
    assert engine.prefix_stats == PrefixStats(24, 20, 20)


def test_what_memory_has_lost_comes_back_from_the_disk(tmp_path: Path):
    model = small_model()
    engine = engine_on(tmp_path, model, n_blocks=13)  # twelve hold one answer: each takes what the last one left
    prompts = random_prompts([20, 21, 22])
    for _ in range(2):
        for prompt in prompts:
            same(engine.generate([prompt], GREEDY), [wanted(prompt)])
            engine._tier.flush()
    assert engine.prefix_stats.n_found_on_disk == 16 + 20 + 20
    assert engine.n_free_blocks == engine._scheduler.pool.n_usable


def test_a_namespace_finds_nothing_of_anothers_on_the_disk(tmp_path: Path):
    [prompt] = random_prompts([20])
    found = []
    for namespace in "aba":
        engine = engine_on(tmp_path)
        engine.add(prompt, GREEDY, namespace=namespace)
        while engine.n_unfinished:
            engine.step()
        found.append(engine.prefix_stats.n_found_on_disk)
        engine.close()
    assert found == [0, 0, 16]


def test_other_weights_config_tokenizer_or_numerics_find_nothing(tmp_path: Path):
    [prompt] = random_prompts([20])

    def found(model=None, **settings) -> int:
        engine = engine_on(tmp_path, model, **settings)
        engine.generate([prompt], GREEDY)
        engine.close()
        return engine.prefix_stats.n_found_on_disk

    one_weight = small_model()
    with torch.no_grad():
        one_weight.layers[1].mlp.experts.down_proj.view(-1)[-1] += 1e-3  # one number of thousands
    bias = small_model()
    bias.layers[1].mlp.gate.e_score_correction_bias[0] += 1e-3
    assert found() == 0 and found() == 16
    for settings in (
        {"model": small_model(seed=1)},
        {"model": one_weight},
        {"model": bias},
        {"model": small_model(rope_theta=20000.0)},
        {"tokenizer": "another"},
        {"native": False},
        {"native": False, "invariant": True},
        {"record_experts": False},
        {"block_size": 8},
    ):
        assert found(**settings) == 0, settings
        assert found(**settings) == 16, settings
    assert len(list((tmp_path / FOLDER).glob("*/"))) == 10


def test_the_fingerprint_names_what_bits_depend_on(tmp_path: Path):
    model = small_model()
    named = facts(model.config, [torch.zeros(4, 3)], block_size=4, numerics="plain", tokenizer="t")
    weights = weights_of(model)
    name = fingerprint(named, weights)
    assert name == fingerprint(named, weights_of(small_model())) and len(name) == 64
    for fact in named:
        assert fingerprint(named | {fact: "other"}, weights) != name
    assert {"torch", "device", "numerics", "tokenizer", "config", "layout"} == set(named)
    assert sum(tensor.numel() for _, tensor in weights) >= sum(p.numel() for p in model.parameters())
    info = tmp_path / "cpuinfo"
    info.write_text("vendor_id\t: A\nmodel\t\t: 1\ncpu MHz\t\t: 2\n\nvendor_id\t: B\n")
    assert cpu(info)[2:] == ["model\t\t: 1", "vendor_id\t: A"] and len(cpu(tmp_path / "none")) == 3
    assert fingerprint(named, weights, is_wanted=lambda: False) is None


def test_new_weights_find_nothing_of_the_old_and_the_old_are_found_again(tmp_path: Path):
    old, new = small_model(), small_model(seed=1)
    [prompt] = random_prompts([20])
    engine = engine_on(tmp_path, old, invariant=True)
    found, logps = [], []
    for model in (old, new, old):
        engine.load_weights(model)
        engine._tier.flush()
        before = engine.prefix_stats.n_found_on_disk
        logps.append(engine.generate([prompt], GREEDY)[0].logps)
        found.append(engine.prefix_stats.n_found_on_disk - before)
        engine._tier.flush()
    assert found == [0, 0, 16] and logps[0] == logps[2] != logps[1]
    engine.close()


def test_nothing_is_kept_under_weights_that_are_not_hashed_yet(tmp_path: Path):
    """Trained in place while the thread still hashes: what it hashes is not what the blocks were computed with."""
    model = small_model()
    engine = engine_on(tmp_path, model)
    gate = threading.Event()
    engine._tier._writer.queue.put(gate.wait)  # a slow disk
    engine.load_weights(model)
    [prompt] = random_prompts([20])
    engine.generate([prompt], GREEDY)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    gate.set()
    engine.load_weights(model)
    engine._tier.flush()
    assert engine.disk_stats.n_written == 0
    got = engine.generate([prompt], GREEDY)
    engine._tier.flush()
    assert engine.prefix_stats.n_found == 0 and engine.disk_stats.n_written == 7
    same(got, [plain(model, prompt, GREEDY)])


@pytest.mark.parametrize("bad", [0, 2, 6])
def test_a_spoilt_block_is_computed_anew_and_written_again(tmp_path: Path, bad: int):
    model = small_model()
    [prompt] = random_prompts([30])  # seven blocks, and three of the answer's
    engine_on(tmp_path, model).generate([prompt], GREEDY)
    gc.collect()
    path = in_order(tmp_path)[bad]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    engine = engine_on(tmp_path, model)
    same(engine.generate([prompt], GREEDY), [wanted(prompt)])
    engine.close()
    # what comes behind a spoilt block is found again, but for what was computed in the same step
    assert 4 * bad <= engine.prefix_stats.n_found_on_disk < 4 * 7 and engine.disk_stats.n_spoilt == 1
    assert path.read_bytes() == content


def in_order(folder: Path) -> list[Path]:
    """Records of one prompt from its beginning: each a little younger than the next."""
    return sorted(records(folder), key=lambda path: -path.stat().st_mtime_ns)


def test_a_folder_removed_under_the_engine_is_a_miss(tmp_path: Path):
    [prompt] = random_prompts([20])
    engine_on(tmp_path).generate([prompt], GREEDY)
    gc.collect()
    engine = engine_on(tmp_path)
    for path in records(tmp_path):
        path.unlink()
    engine.generate([prompt], GREEDY)
    engine.close()
    assert engine.prefix_stats.n_found == 0 and engine.disk_stats.fault is None
    assert len(records(tmp_path)) == 4  # those of the prompt; that the answer's are gone comes out when they are wanted


def test_the_room_is_bounded_and_the_beginning_of_a_prompt_stays(tmp_path: Path):
    [prompt] = random_prompts([50])
    engine = engine_on(tmp_path, max_bytes=8 * block_files.PAGE)
    engine.generate([prompt], GREEDY)
    engine.close()
    assert engine.disk_stats.n_bytes <= 8 * block_files.PAGE and engine.disk_stats.n_evicted > 0
    assert sum(path.stat().st_size for path in records(tmp_path)) <= 8 * block_files.PAGE
    again = engine_on(tmp_path, max_bytes=8 * block_files.PAGE)
    again.generate([prompt], GREEDY)
    assert again.prefix_stats.n_found_on_disk >= 4 * 5


def test_a_disk_slower_than_the_engine_costs_blocks_and_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("abyssal.engine.disk_cache.PENDING_BYTES", 1)  # one block may wait
    engine = engine_on(tmp_path)
    gate = threading.Event()
    engine._tier._writer.queue.put(gate.wait)
    [prompt] = random_prompts([20])
    engine.generate([prompt], GREEDY)
    stats = engine.disk_stats
    assert stats.n_dropped == 3 + 6 and stats.n_written == 0  # of four in the prompt, and seven when the answer ends
    gate.set()
    engine._tier.flush()
    assert engine.disk_stats.n_written == 1
    for _ in range(4):  # each use brings what is still missing of the prompt's five, one at least
        engine.generate([prompt], SamplingParams(max_tokens=1))
        engine._tier.flush()
    assert engine.disk_stats.n_written == 5
    engine.close()


def test_what_is_offered_is_a_copy(tmp_path: Path):
    engine = engine_on(tmp_path)
    gate = threading.Event()
    engine._tier._writer.queue.put(gate.wait)
    [prompt] = random_prompts([20])
    engine.generate([prompt], GREEDY)
    for store in engine._runner.stores:
        store.fill_(7)  # as if others had these blocks by now
    gate.set()
    engine.close()
    again = engine_on(tmp_path)
    same(again.generate([prompt], GREEDY), [wanted(prompt)])
    assert again.prefix_stats.n_found_on_disk == 16


def failing(code: int):
    def fail(*args: object, **settings: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_takes_no_more_is_said_once_and_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
):
    model = small_model()
    prompts = random_prompts([20, 21, 22])
    engine_on(tmp_path, model).generate(prompts[:1], GREEDY)
    gc.collect()
    engine = engine_on(tmp_path, model)
    monkeypatch.setattr(block_files.os, "rename", failing(code))
    with pytest.warns(UserWarning, match=f"{os.strerror(code)}; nothing more is written to it") as said:
        for prompt in prompts:
            same(engine.generate([prompt], GREEDY), [wanted(prompt)])
            engine._tier.flush()
        engine.generate(prompts, GREEDY)
    assert len(said) == 1 and os.strerror(code) in engine.disk_stats.fault
    assert engine.prefix_stats.n_found_on_disk == 16 and engine.disk_stats.n_written == 0


def test_a_disk_that_can_not_be_read_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = small_model()
    prompts = random_prompts([20, 21])
    engine_on(tmp_path, model).generate(prompts, GREEDY)
    gc.collect()
    engine = engine_on(tmp_path, model)
    reads = []
    monkeypatch.setattr(block_files.os, "preadv", lambda *_: reads.append(1) or failing(errno.EIO)())
    with pytest.warns(UserWarning, match="Input/output error; going on without it") as said:
        for prompt in prompts:
            same(engine.generate([prompt], GREEDY), [wanted(prompt)])
    assert len(said) == len(reads) == 1 and engine.prefix_stats.n_found == 0


@pytest.mark.parametrize("how", ["a file in the way", "no locks", "no room for a folder"])
def test_a_folder_that_can_not_be_had_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str):
    if how == "a file in the way":
        (tmp_path / "cache").write_text("mine")
    elif how == "no locks":
        monkeypatch.setattr(block_files.fcntl, "flock", failing(errno.ENOLCK))
    else:
        monkeypatch.setattr(block_files.Path, "mkdir", failing(errno.ENOSPC))
    with pytest.warns(UserWarning, match="going on without it") as said:
        engine = engine_on(tmp_path / "cache")
        for _ in range(2):
            engine.generate(random_prompts([20]), GREEDY)
    assert len(said) == 1 and engine.disk_stats.n_written == 0
    engine.close()


def test_a_second_engine_says_so_reads_and_does_not_write(tmp_path: Path):
    model = small_model()
    prompts = random_prompts([20, 21])
    owner = engine_on(tmp_path, model)
    with pytest.warns(UserWarning, match="another process owns it; it is read, not written") as said:
        other = engine_on(tmp_path, model)
    same(owner.generate(prompts[:1], GREEDY), [wanted(prompts[0])])
    owner._tier.flush()
    n_written = len(records(tmp_path))
    for prompt in prompts:
        same(other.generate([prompt], GREEDY), [wanted(prompt)])
    other.close()
    assert other.prefix_stats.n_found_on_disk == 16 and len(records(tmp_path)) == n_written and len(said) == 1
    owner.close()


def test_an_engine_that_goes_lets_go(tmp_path: Path):
    """Dropped without a word, and at once made again: nothing is lost and nobody is in the way."""
    [prompt] = random_prompts([20])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for found in (0, 16, 16):
            engine = engine_on(tmp_path)
            engine.generate([prompt], GREEDY)
            assert engine.prefix_stats.n_found_on_disk == found
            del engine
            gc.collect()


def test_a_closed_engine_answers_on_without_the_disk(tmp_path: Path):
    model = small_model()
    engine = engine_on(tmp_path, model)
    engine.close()
    engine.close()
    for prompt in random_prompts([20, 21]):
        same(engine.generate([prompt], GREEDY), [wanted(prompt)])
    assert records(tmp_path) == [] and engine.disk_stats.fault is None


def test_what_users_get_wrong(tmp_path: Path):
    with pytest.raises(ValueError, match="max_bytes=0 leaves no room"):
        DiskCache(folder=tmp_path, max_bytes=0)
    with pytest.raises(ValueError, match="give prefix_cache=True with it"):
        engine_on(tmp_path, prefix_cache=False)


def killed(home: Path, n_attempts: int) -> list[dict[str, Any]]:
    """What disk_kill_lab.py tells, one line an attempt."""
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("disk_kill_lab.py")), str(home), str(n_attempts)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == n_attempts
    for attempt in told:
        assert attempt["found"] >= 0.95 and attempt["wrong"] == 0 and attempt["left"] == [], attempt
    return told


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_sigkill_in_mid_write_costs_hardly_a_block_and_no_truth(tmp_path: Path):
    told = killed(tmp_path, 3)
    assert [attempt["where"] for attempt in told] == ["midst", "any time", "rename"]
    assert told[1]["second"] == "another process owns it; it is read, not written"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_many_more_sigkills_cost_hardly_a_block_and_no_truth(tmp_path: Path):
    killed(tmp_path, 40)
