"""What a stage leaves behind while it runs: metrics.jsonl, samples.jsonl, log.txt, and one line on the console.

Owns these three files of a stage's directory and the line on the screen. Does not own checkpoints (checkpoint/), nor
what the numbers mean (stages/), nor the page drawn from them (evals/page.py).

Every entry is on disk before the next step begins, so a killed run has lost nothing; a resumed one cuts the files back
to the step it resumes from, so nothing stands there twice.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

# What the progress line shows, most telling first: as many as fit between the step and the time left.
KEY_METRICS = {
    "verifier_errors": "undecided", "reward": "reward", "loss": "loss", "think_share": "think", "length": "len",
    "held_out_accuracy": "held-out", "held_out_loss": "held-out", "mtp_loss": "mtp", "grad_norm": "grad",
    "zero_variance_share": "zero-var", "truncated_share": "cut", "entropy": "entropy", "kl": "kl",
    "mismatch_max": "mismatch", "clip_share": "clip", "max_violation": "maxvio", "lr": "lr", "tokens_per_s": "tok/s",
    "memory_gb": "GB", "rollout_s": "rollout s", "reward_s": "reward s", "update_s": "update s",
    "documents_per_s": "docs/s", "kept": "kept", "refused": "refused",
}  # fmt: skip
ONLY_ABOVE_0 = ("verifier_errors",)  # no word of trouble while there is none
PLAIN_LINE_EVERY_S = 10.0  # a pipe or a log file gets a line now and then, not a line a step
REDRAW_EVERY_S = 0.1


class Recorder:
    """The record of one stage, number `k` of `n`. A context manager; steps count from 0.

    `resume_from_step=s` keeps what was recorded for steps below s and drops the rest; the default, 0, starts afresh.
    """

    def __init__(
        self,
        stage_dir: Path | str,
        stage: str,
        k: int,
        n: int,
        *,
        resume_from_step: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage_dir = Path(stage_dir)
        self.stage_dir.mkdir(parents=True, exist_ok=True)
        self.title = f"{k}/{n} {stage}"
        dropped = [cut_to_step(self.stage_dir / name, resume_from_step) for name in ("metrics.jsonl", "samples.jsonl")]
        self._files = {
            name: (self.stage_dir / name).open("ab", buffering=0)
            for name in ("metrics.jsonl", "samples.jsonl", "log.txt")
        }
        self._console = console or Console()
        self._clock = clock
        self._started = self._step_began = clock()
        self._durations_s: deque[float] = deque(maxlen=50)  # the running mean behind the ETA
        self._last: tuple[int, int, dict[str, Any]] | None = None
        self._step = resume_from_step
        self._drawn_at = -math.inf
        self._live: Live | None = None
        self._closed = False
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            # No refresh thread: a stage may fork worker processes, and a fork must not catch the console's lock held.
            self._live = Live(self._line(), console=self._console, auto_refresh=False)
            self._live.start(refresh=True)
        if resume_from_step:
            self.log(f"{self.title}: resuming from step {resume_from_step}")
        if unreadable := sum(count.unreadable for count in dropped):
            self.log(f"{self.title}: dropped {unreadable} unreadable line(s) that an interrupted write left")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(failed=error[0] is not None)

    def step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        """Record one finished step. `time_s`, the seconds of this step, is added when the stage did not measure it."""
        now = self._clock()
        self._durations_s.append(now - self._step_began)
        entry = {"step": step, **{name: plain(value) for name, value in metrics.items()}}
        entry.setdefault("time_s", round(now - self._step_began, 4))
        self._step_began = now
        self._append("metrics.jsonl", as_json_line(entry))
        self._step = step
        self._last = (step, total, entry)
        self._draw(now, force=step + 1 >= total)

    def sample(self, entry: Mapping[str, Any]) -> None:
        """Record one readable trace. Without a `step` of its own it belongs to the step recorded last."""
        self._append("samples.jsonl", as_json_line({"step": self._step, **{k: plain(v) for k, v in entry.items()}}))

    def log(self, text: str, *, aloud: bool = False) -> None:
        """A remark for log.txt; `aloud` on the console too, above the progress line."""
        if aloud:
            self._console.print(f"[{self.title}] {text}", markup=False, highlight=False, soft_wrap=True)
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._append("log.txt", f"{stamp}  {text}\n")

    def close(self, *, failed: bool = False) -> None:
        """Leave the last state of the line on the screen and close the files. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        done = not failed and self._last is not None and self._last[0] + 1 >= self._last[1]
        if self._live is not None:
            self._live.update(self._line(done=done), refresh=True)
            self._live.stop()
        elif self._last is not None:
            self._console.print(self._line(done=done), soft_wrap=True)
        for file in self._files.values():
            file.close()

    def _append(self, name: str, line: str) -> None:
        # A lone surrogate in a model's text becomes \udxxx, which inside a JSON string is its proper escape.
        append(self._files[name], line.encode("utf-8", errors="backslashreplace"), path=self.stage_dir / name)

    def _draw(self, now: float, *, force: bool) -> None:
        every_s = PLAIN_LINE_EVERY_S if self._live is None else REDRAW_EVERY_S
        if now - self._drawn_at < every_s and not (force and self._live is not None):
            return
        self._drawn_at = now
        if self._live is not None:
            self._live.update(self._line(), refresh=True)
        else:
            self._console.print(self._line(), soft_wrap=True)

    def _line(self, *, done: bool = False) -> Text:
        """`[2/9 pretrain] 120/400  loss 1.42  grad 0.31  ...  1 min 20 s left`, cut to the width of the terminal."""
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(f"[{self.title}]", style="bold cyan")
        if self._last is None:
            return line.append(" starting", style="dim")
        step, total, entry = self._last
        line.append(f" {step + 1}/{total}")
        if done:
            tail = f"  done in {human_time(self._clock() - self._started)}"
        else:
            left_s = (total - step - 1) * sum(self._durations_s) / max(1, len(self._durations_s))
            tail = f"  {human_time(left_s)} left"
        room = self._console.width - len(line) - len(tail) - 1 if self._live is not None else 120
        for name, label in KEY_METRICS.items():
            value = entry.get(name)
            if not isinstance(value, int | float) or (name in ONLY_ABOVE_0 and not value > 0):
                continue
            part = f"  {label} {short(value)}"
            if len(part) <= room:
                room -= len(part)
                line.append(part)
        return line.append(tail, style="dim")


class Dropped(NamedTuple):
    """How many lines a cut took away."""

    later: int  # than the step it resumes from
    unreadable: int


def cut_to_step(path: Path, step: int) -> Dropped:
    """Keep the JSON lines of `path` whose step is below `step`; replace the file in one move, or leave it untouched."""
    if not path.exists():
        return Dropped(0, 0)
    kept, later, unreadable = [], 0, 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:  # what a killed process wrote half
            unreadable += 1
            continue
        if isinstance(entry, dict) and entry.get("step", 0) < step:
            kept.append(line if line.endswith(b"\n") else line + b"\n")
        else:
            later += 1
    if later or unreadable:
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb", buffering=0) as file:
            append(file, b"".join(kept), path=path)
            os.fsync(file.fileno())
        os.replace(partial, path)
    return Dropped(later, unreadable)


def amend_last(path: Path, extra: Mapping[str, Any]) -> None:
    """Add to the last entry what is known only once the stage is over; the file is replaced in one move."""
    *before, last = path.read_bytes().splitlines(keepends=True)
    entry = json.loads(last) | {name: plain(value) for name, value in extra.items()}
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb", buffering=0) as file:
        append(file, b"".join(before) + as_json_line(entry).encode(), path=path)
        os.fsync(file.fileno())
    os.replace(partial, path)


def seconds_of_work(entries: Iterable[Mapping[str, Any]]) -> float:
    """What the steps of a metrics.jsonl took, all sessions together, without the measuring that teaches nothing."""
    return sum(float(entry["time_s"]) - float(entry.get("measure_s", 0.0)) for entry in entries)


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl; none when it is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def append(file: FileIO, data: bytes, *, path: Path) -> None:
    """Write all of `data`, past Python's buffers; a disk that cannot take it is a one-line error."""
    view = memoryview(data)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "free some space and start again, the run continues from its last checkpoint"
        raise OSError(f"cannot write {path}: {reason}; {remedy}") from error


def as_json_line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """A value as JSON has it: tensors and numpy scalars become numbers, what is not finite becomes null."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def short(value: float) -> str:
    """A number in about four characters: 0.0312 -> 0.031, 12480 -> 12k, 3e-7 -> 3e-07."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.1f}M"
    if size >= 1e4:
        return f"{value / 1e3:.0f}k"
    if size >= 100 or value == int(value):
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2g}" if size < 0.1 else f"{value:.2f}"


def human_time(seconds: float) -> str:
    """42 -> '42 s', 200 -> '3 min 20 s', 3900 -> '1 h 05 min', 180000 -> '2 d 02 h'."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def memory_gb() -> float:
    """Memory of this process in GB: the peak on the GPU once one is in use, else what is resident now."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9  # macOS counts bytes, and only macOS comes here
