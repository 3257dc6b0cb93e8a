"""Ablations that are really run: what each part of DeepSeek's way is worth at this size, three seeds each.

    python bench/ablations.py run [--only NAME ...] [--core K] [--reverse]   runs what has no log yet
    python bench/ablations.py table                                         writes README's tables from the logs
    python bench/ablations.py list                                          arms, and which are finished

The first two recipes are runs/ablations.toml (pretraining) and runs/ablations_rl.toml; arms are changes to them
(ablation_arms.py). Each arm and seed is a process of one thread, about a minute; stopped anywhere, the next `run` goes
on with the arm that was cut off. Two at once share the work: give the second `--reverse` and another core. Logs lie in
results/ablations/<arm>/<seed>.jsonl.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from ablation_arms import (
    SCAN_SEED,
    SEEDS,
    Arm,
    Rates,
    chosen_rates,
    pretrain_arms,
    rl_arms,
    scan_arms,
    shortened,
)
from ablation_run import is_finished, log_path, prepare, read_log, run_arm

RESULTS = Path(__file__).parent / "results" / "ablations"


@dataclass(frozen=True, kw_only=True)
class Where:
    """`base` is another checkpoint for the RL arms to start from; `steps` shortens every arm, for a first try."""

    out: Path = Path("out")
    results: Path = RESULTS
    base: Path | None = None
    steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run what has no log yet. `only` takes names of arms, or: scan pretrain zero."""

    only: tuple[str, ...] = ()
    seeds: tuple[int, ...] = SEEDS
    core: int = -1  # CPU core to stay on; -1: wherever the system puts it
    reverse: bool = False  # last arms first
    where: tyro.conf.OmitArgPrefixes[Where] = Where()


@dataclass(frozen=True, kw_only=True)
class One:
    """One arm with one seed, here and now."""

    arm: tyro.conf.Positional[str]
    seed: tyro.conf.Positional[int]
    where: tyro.conf.OmitArgPrefixes[Where] = Where()


@dataclass(frozen=True, kw_only=True)
class Table:
    """Write README's tables from the logs."""


@dataclass(frozen=True, kw_only=True)
class List:
    """Arms, and which seeds are finished."""

    where: tyro.conf.OmitArgPrefixes[Where] = Where()


def rates_from(results: Path) -> Rates:
    paths = {arm.name: log_path(results, arm, SCAN_SEED) for arm in scan_arms()}
    return chosen_rates({name: read_log(path)[1] for name, path in paths.items() if path.is_file()})


def all_arms(results: Path) -> list[Arm]:
    return [*pretrain_arms(rates_from(results)), *rl_arms()]


def run(options: Run) -> None:
    if options.core >= 0:
        os.sched_setaffinity(0, {options.core})
    groups = {"scan": scan_arms(), "zero": rl_arms()}
    names = {arm.name for group in (*groups.values(), pretrain_arms(Rates(muon=1, adamw=1, bias_speed=1)))
             for arm in group} | {*groups, "pretrain"}  # fmt: skip
    if unknown := set(options.only) - names:
        raise ValueError(f"no arm {sorted(unknown)[0]!r}; choose among {', '.join(sorted(names))}")
    order = ("scan", "pretrain", "zero")
    for group in reversed(order) if options.reverse else order:
        if group == "pretrain":
            if not wanted(options, group, pretrain_arms(Rates(muon=1, adamw=1, bias_speed=1))):
                continue
            for arm in scan_arms():  # whoever comes first runs it, the other waits
                run_missing(arm, SCAN_SEED, options, wait=True)
            arms = pretrain_arms(rates_from(options.where.results))
        else:
            arms = groups[group]
        arms = wanted(options, group, arms)
        seeds = (SCAN_SEED,) if group == "scan" else options.seeds
        jobs = [(arm, seed) for seed in seeds for arm in arms]  # a whole comparison before the next seed
        for arm, seed in reversed(jobs) if options.reverse else jobs:
            run_missing(arm, seed, options, wait=False)


def wanted(options: Run, group: str, arms: list[Arm]) -> list[Arm]:
    return [arm for arm in arms if not options.only or {group, arm.name} & set(options.only)]


def run_missing(arm: Arm, seed: int, options: Run, *, wait: bool) -> None:
    """In a process of its own, unless its log is there or another process is at it."""
    where, arm = options.where, shortened(arm, options.where.steps)
    if is_finished(where.results, arm, seed):
        return
    lock = where.out / "ablation_arms" / f"{arm.name}.{seed}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return
        if is_finished(where.results, arm, seed):
            return
        if where.base is None or arm.stage == "pretrain":
            prepare(arm.stage, out=where.out)
        began = time.perf_counter()
        flags = ["--out", str(where.out), "--results", str(where.results), "--steps", str(where.steps)]
        flags += [] if where.base is None else ["--base", str(where.base)]
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "one", arm.name, str(seed), *flags]
        subprocess.run(command, check=True, env=os.environ | threads)
        print(f"{arm.name} {seed}: {time.perf_counter() - began:.0f} s", flush=True)


def one(options: One) -> None:
    where = options.where
    known = [*scan_arms(), *rl_arms()]
    if options.arm not in {arm.name for arm in known}:
        known = pretrain_arms(rates_from(where.results))
    found = [arm for arm in known if arm.name == options.arm]
    if not found:
        raise ValueError(f"no arm {options.arm!r}; `python bench/ablations.py list` names them")
    run_arm(shortened(found[0], where.steps), options.seed, out=where.out, results=where.results, base=where.base)


def show(options: List) -> None:
    results = options.where.results
    for arm in scan_arms():
        print(f"{arm.name:20} {'finished' if is_finished(results, arm, SCAN_SEED) else '-'}")
    for arm in all_arms(results):
        done = [seed for seed in SEEDS if is_finished(results, arm, seed)]
        print(f"{arm.name:20} {' '.join(map(str, done)) or '-':8} {arm.says}")


def table() -> None:
    from tables import write_tables  # reads every other result too, which running an arm has no need of

    write_tables(["ablations"])


def main(options: Run | One | Table | List) -> None:
    if isinstance(options, Run):
        run(options)
    elif isinstance(options, One):
        one(options)
    elif isinstance(options, Table):
        table()
    else:
        show(options)


if __name__ == "__main__":
    main(tyro.cli(Run | One | Table | List, description=__doc__))
