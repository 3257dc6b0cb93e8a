"""Walk each stage of a tiny run whole, then again with a SIGKILL somewhere and once more to its end; compare the files.

A script of its own, run by test_exact_resume.py: it imports everything once and forks a child for each attempt, in
which the n-th call of some function ends the process. Nothing in the package knows of it. One JSON line an attempt.

    python tests/kill_lab.py HOME POINTS [STAGE ...]
"""

from __future__ import annotations

import ctypes
import dataclasses
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console

import abyssal.checkpoint.resume
import abyssal.checkpoint.shards
import abyssal.record
from abyssal.engine.engine import Engine
from abyssal.record import Recorder
from abyssal.stages.recipe import Recipe
from abyssal.stages.run import STAGES
from abyssal.stages.way import open_run, walk
from abyssal.typed_toml import from_dict

KILLED = STAGES[:-1]  # the report is drawn from what is there
SET_CHILD_SUBREAPER = 36  # prctl: whoever a killed child leaves behind becomes ours
WALL_CLOCK = re.compile(r"time_s|tokens_per_s|.*_s|memory_gb|(planned|measured)_.*")
SMALLER: dict[str, dict[str, Any]] = {
    "tokenizer": {"vocab_size": 300, "sample_bytes": 4_000},
    "data": {"tokens": 3_000, "held_out_tokens": 300},
    "pretrain": {"steps": 6, "rows": 2, "micro_rows": 1, "eval_every": 3, "eval_rows": 1, "save_every": 2},
    "student_pretrain": {"steps": 3, "rows": 2, "eval_rows": 1, "save_every": 1},
    "zero": {"steps": 4, "answers": 12, "max_tokens": 12, "save_every": 2, "eval_every": 2, "reference_every": 3,
             "grpo": {"minibatches": 2}},
    "reason": {"steps": 3, "answers": 12, "max_tokens": 12, "save_every": 1},
    "align": {"steps": 3, "answers": 12, "max_tokens": 12, "save_every": 2},
    "eval": {"problems": 3, "max_tokens": 8},
}  # fmt: skip
REWARD = '''
def judge(problem, message):
    """Right if short; for some answers it does not know."""
    if len(message.content) % 5 == 3:
        raise RuntimeError("no idea")
    return float(len(message.content) < 30)
'''


def users_own(home: Path) -> None:
    words = "the sea is deep and the light is far away so we go down slowly".split()
    (home / "corpus").mkdir(parents=True)
    for i in range(40):
        text = " ".join(words[(i * j) % len(words)] for j in range(1, 60))
        (home / "corpus" / f"{i}.txt").write_text(f"{text} number {i}.\n")
    asked = [{"prompt": f"say {i}", "answer": str(i), "verifier": "own_judge:judge"} for i in range(12)]
    said = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}!"}]}
            for i in range(4)]  # fmt: skip
    for name, entries in (("train", asked[3:]), ("held_out", asked[:3]), ("sft", said)):
        (home / f"own_{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (home / "own_judge.py").write_text(REWARD)


def tiny_recipe(home: Path) -> Recipe:
    content = tomllib.loads(Path(__file__).with_name("micro.toml").read_text())
    for section, values in SMALLER.items():
        content[section] |= values
    for section in ("cold_start", "reject", "distil"):
        content[section]["traces"] |= {"problems": 70, "max_tokens": 12}  # two batches
        content[section]["sft"] |= {"save_every": 1}
    content["data"]["corpus"] = str(home / "corpus")
    content["cold_start"]["data"] = str(home / "own_sft.jsonl")
    content["rl_data"] = {split: str(home / f"own_{split}.jsonl") for split in ("train", "held_out")}
    return from_dict(Recipe, content, "")


@dataclasses.dataclass(frozen=True)
class Point:
    """The `n`-th call of a function, and when in it: before, in its midst (what it writes is cut in half), after."""

    call: str
    n: int
    when: str = "before"


class Calls:
    """Counts calls in this process, and ends it at a point."""

    def __init__(self, point: Point | None) -> None:
        self.point, self.counts = point, Counter[str]()
        self.wrap("rollout", Engine, "step")
        self.wrap("step", Recorder, "step")
        self.wrap("rename", os, "rename")
        self.wrap("replace", os, "replace")
        self.wrap("fsync", os, "fsync")
        self.wrap("rmtree", shutil, "rmtree", halve=lambda path, *_: next(Path(path).rglob("*.*")).unlink())
        self.wrap("weights", abyssal.checkpoint.shards, "save_file", halve=lambda _, path, *__: cut(Path(path)))
        self.wrap("trainer", abyssal.checkpoint.resume.dcp, "save", halve=lambda *_: None)
        self.wrap("line", abyssal.record, "append", halve=lambda file, *_: os.truncate(file.name, file.tell() - 9))

    def wrap(self, call: str, owner: Any, name: str, halve: Callable[..., None] | None = None) -> None:
        function = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            n, self.counts[call] = self.counts[call], self.counts[call] + 1
            when = self.point.when if self.point is not None and (self.point.call, self.point.n) == (call, n) else None
            if when == "before":
                die()
            if when == "midst" and call == "rmtree" and halve is not None:
                halve(*arguments)
                die()
            result = function(*arguments, **options)
            if when == "midst" and halve is not None:
                halve(*arguments)
            if when is not None:
                die()
            return result

        setattr(owner, name, counted)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def in_child(recipe: Recipe, out: Path, stage: str, point: Point | None) -> tuple[int, Counter[str], str]:
    """Walk one stage in a fork. (exit status or minus the signal, calls if it was not killed, what went wrong)"""
    told = out / "told.json"
    told.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            calls = Calls(point)
            run = open_run(dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, out=str(out))), quiet())
            walk(run, (stage,))
            told.write_text(json.dumps({"counts": calls.counts}))
            status = 0
        except BaseException:
            told.write_text(json.dumps({"error": traceback.format_exc()}))
        finally:
            os._exit(status)
    _, code = os.waitpid(child, 0)
    said = json.loads(told.read_text()) if told.is_file() else {}
    told.unlink(missing_ok=True)
    return os.waitstatus_to_exitcode(code), Counter(said.get("counts", {})), said.get("error", "")


def quiet() -> Console:
    return Console(file=io.StringIO())


def left_behind(limit_s: float = 20.0) -> int:
    """How many processes outlive the child that started them."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return 0
        if not ended:
            if time.monotonic() > deadline:
                return 1
            time.sleep(0.01)


def choose(counts: Counter[str], n_points: int, rng: random.Random) -> list[Point]:
    """At random, but one in a rollout and one in a save where there are such, both late enough to have saved before."""
    kinds = [kind for kind in sorted(counts) if counts[kind]]
    saves = [kind for kind in ("weights", "trainer", "rename") if counts[kind]]
    chosen = [["rollout"]] if counts["rollout"] else []
    chosen += [saves] if saves else []
    chosen += [kinds] * n_points
    points = []
    for among in chosen[:n_points]:
        kind = rng.choice(among)
        first = 0 if among is kinds else counts[kind] // 2
        when = rng.choice(["before", "midst", "after"]) if kind in ("weights", "trainer", "line", "rmtree") else (
            rng.choice(["before", "after"]))  # fmt: skip
        points.append(Point(kind, rng.randrange(first, counts[kind]), when))
    return points


def content_of(path: Path) -> Any:
    """What must be the same, bit for bit; None: need not be."""
    if path.name == "log.txt" or "trainer" in path.parts:
        return None
    if path.name == "metrics.jsonl":
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        return [{name: v for name, v in entry.items() if not WALL_CLOCK.fullmatch(name)} for entry in entries]
    if path.name == "done.json":
        return {name: v for name, v in json.loads(path.read_text()).items() if not WALL_CLOCK.fullmatch(name)}
    return path.read_bytes()


def trainer_of(directory: Path) -> dict[str, Any]:
    """Masters, optimizer states and all else that is resumed from, as bytes."""
    reader = dcp.FileSystemReader(directory)
    found = reader.read_metadata().state_dict_metadata
    tensors = {key: torch.empty(meta.size, dtype=meta.properties.dtype) for key, meta in found.items()}  # type: ignore[union-attr]
    dcp.load(tensors, storage_reader=reader)
    plain = repr(abyssal.checkpoint.resume._from_bytes(tensors.pop("plain")))
    return {key: tensor.view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.item()
            for key, tensor in tensors.items()} | {"plain": plain}  # fmt: skip


def differences(whole: Path, other: Path) -> list[str]:
    names = [{str(p.relative_to(d)) for p in d.rglob("*") if p.is_file()} for d in (whole, other)]
    wrong = [f"{name} is missing" for name in sorted(names[0] - names[1])]
    wrong += [f"{name} was left" for name in sorted(names[1] - names[0])]
    wrong += [name for name in sorted(names[0] & names[1]) if content_of(whole / name) != content_of(other / name)]
    for trainer in sorted(p for p in whole.rglob("trainer") if (other / p.relative_to(whole)).is_dir()):
        one, two = trainer_of(trainer), trainer_of(other / trainer.relative_to(whole))
        wrong += [f"trainer: {key}" for key in sorted(one.keys() | two.keys()) if one.get(key) != two.get(key)]
    return wrong


def attempt(recipe: Recipe, home: Path, stage: str, point: Point, *, kills: int) -> dict[str, Any]:
    whole, out = home / "whole" / "micro", home / "attempt"
    shutil.rmtree(out, ignore_errors=True)
    for before in STAGES[: STAGES.index(stage)]:
        shutil.copytree(whole / before, out / "micro" / before, copy_function=os.link)
    out.mkdir(exist_ok=True)
    wrong: list[str] = []
    ends: list[int] = []
    for _ in range(kills):  # the second time it may come to its end before that call
        killed, _, error = in_child(recipe, out, stage, point)
        ends.append(killed)
        wrong += [error] if error else []
        if left_behind():
            wrong.append("a process outlives the one that was killed")
    ended, _, error = in_child(recipe, out, stage, None)
    wrong += [error] if error else differences(whole / stage, out / "micro" / stage)
    for name in sorted(p.name for p in (out / "micro").iterdir() if p.name not in (*STAGES, "recipe.toml", ".lock")):
        wrong.append(f"{name} was left")
    return {"stage": stage, "point": str(point), "killed": ends[0], "ended": ended, "wrong": wrong}


def main(home: Path, n_points: int, stages: tuple[str, ...]) -> None:
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    torch.set_num_threads(1)
    users_own(home)
    sys.path.append(str(home))
    recipe = tiny_recipe(home)
    (home / "whole").mkdir()
    for stage in KILLED[: KILLED.index(stages[-1]) + 1]:
        began = time.monotonic()
        ended, counts, error = in_child(recipe, home / "whole", stage, None)
        print(json.dumps({"stage": stage, "point": "none", "ended": ended, "wrong": [error] if error else [],
                          "counts": counts, "s": round(time.monotonic() - began, 2)}), flush=True)  # fmt: skip
        if error:
            return
        if stage in stages:
            for i, point in enumerate(choose(counts, n_points, random.Random(f"{stage} {n_points}"))):
                began = time.monotonic()
                told = attempt(recipe, home, stage, point, kills=1 + i // 3 % 2)
                print(json.dumps(told | {"s": round(time.monotonic() - began, 2)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), tuple(sys.argv[3:]) or KILLED)
