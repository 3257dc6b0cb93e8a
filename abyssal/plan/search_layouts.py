"""The cheapest layout that fits: pp, ep, tp, what ZeRO shares, recomputation, schedule and micro-batch. dp is the rest.

First every way to cut the model, at one setting of the rest; then, from the fastest few of those, single changes as
long as one helps. So the best is no worse than any layout one change away, which are told with why they fall out. It is
not proved to be the best of all: a test compares it with trying everything where that can be done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from abyssal.model.config import ModelConfig
from abyssal.plan.in_words import bytes_text, percent_text, seconds_text
from abyssal.plan.layout import NUMBER_BYTES, Layout, Schedule
from abyssal.plan.machine_file import MachineSpec
from abyssal.plan.parameters import weights
from abyssal.plan.training import TrainingPlan, plan_training
from abyssal.plan.weight_updates import Optimizer

SCHEDULES: tuple[Schedule, ...] = ("1f1b", "zb1p", "zbv", "dualpipe", "dualpipev")
FROM = 3  # of the ways to cut the model, the fastest that are changed further
ROUNDS = 4  # of single changes, at most
ABOUT = 70  # layouts that are tried behind the ways to cut, for a bar


@dataclass(frozen=True, kw_only=True)
class Tried:
    """`plan` None: the sizes do not divide; `why_not` says it."""

    layout: Layout
    plan: TrainingPlan | None
    why_not: str = ""

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.fits

    @property
    def key(self) -> tuple[int, float]:
        """What fits first, the fastest of it; of what does not, the one that needs the least memory."""
        if self.plan is None:
            return 2, 0.0
        return (0, self.plan.step_seconds) if self.plan.fits else (1, self.plan.peak_memory_bytes)


@dataclass(frozen=True, kw_only=True)
class FellOut:
    """A layout one change away from the best."""

    change: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Search:
    best: tuple[Tried, ...]  # the best few, each cut differently
    fell_out: tuple[FellOut, ...]
    n_tried: int
    n_fitting: int

    @property
    def fits(self) -> bool:
        return bool(self.best) and self.best[0].fits


def search_layouts(
    config: ModelConfig,
    *,
    machine: MachineSpec,
    base: Layout,
    row_len: int,
    batch_rows: int,
    optimizer: Optimizer = "adamw",
    on_tried: Callable[[int, int], object] = lambda n_tried, n_about: None,
) -> Search:
    """`base` says what is not searched: types of numbers, kernels, cp, the node limit."""
    tried: dict[Layout, Tried] = {}
    cuts = list(ways_to_cut(config, machine, base))

    def at(layout: Layout) -> Tried:
        if layout not in tried:
            try:
                plan = plan_training(
                    config,
                    machine=machine,
                    layout=layout,
                    row_len=row_len,
                    batch_rows=batch_rows,
                    optimizer=optimizer,
                    advise=False,
                )
                tried[layout] = Tried(layout=layout, plan=plan)
            except ValueError as error:
                tried[layout] = Tried(layout=layout, plan=None, why_not=str(error))
            on_tried(len(tried), max(len(tried), len(cuts) + ABOUT))
        return tried[layout]

    ways = [at(layout) for layout in cuts]
    ways = sorted((one for one in ways if one.plan is not None), key=lambda one: one.key)
    if not ways:
        raise ValueError(f"no layout of {base.cp} cp ranks divides {machine.n_devices} devices and {batch_rows} rows")
    best = sorted((climbed(one, at, config, machine) for one in ways[:FROM]), key=lambda one: one.key)
    best = list({(one.layout.pp, one.layout.ep, one.layout.tp): one for one in reversed(best)}.values())[::-1]
    fell_out = [fallen(best[0], at(layout)) for layout in one_change(best[0].layout, config, machine)]
    return Search(
        best=tuple(best),
        fell_out=tuple(one for one in fell_out if one is not None),
        n_tried=len(tried),
        n_fitting=sum(one.fits for one in tried.values()),
    )


def ways_to_cut(config: ModelConfig, machine: MachineSpec, base: Layout) -> Iterator[Layout]:
    """Every pp, ep and tp whose weights and gradients alone leave any room, one row at a time, so that all divides."""
    total, routed = (sum(w.n for w in weights(config) if w.is_routed in kinds) for kinds in ((True, False), (True,)))
    each = NUMBER_BYTES[base.weights] + NUMBER_BYTES[base.gradients]
    limit = machine.memory_bytes * machine.usable_memory_share.value
    least = float("inf")
    found = []
    for pp in powers(min(machine.n_devices, config.num_hidden_layers + 2)):
        for tp in powers(min(machine.devices_per_node, machine.n_devices // pp, config.num_attention_heads)):
            for ep in powers(min(config.n_routed_experts or 1, machine.n_devices // pp)):
                held = each * (routed / (pp * ep) + (total - routed) / (pp * tp))
                least = min(least, held)
                schedule: Schedule = "none" if pp == 1 else "zb1p"
                found.append((held, dict(pp=pp, tp=tp, ep=ep, schedule=schedule)))
    for held, sizes in found:
        if held <= max(limit, least):  # where nothing fits, the emptiest is planned all the same
            yield from valid(base, **sizes, dp=0, chunks=1, zero=max(1, base.zero), micro_rows=1)


def climbed(start: Tried, at: Callable[[Layout], Tried], config: ModelConfig, machine: MachineSpec) -> Tried:
    """Single changes, the best one at a time, until none helps; schedules last, which take the longest to plan. What
    cuts the model stays."""
    best = start
    for kinds in (("memory",), ("memory", "schedule")):
        for _ in range(ROUNDS):
            around = [at(layout) for layout in one_change(best.layout, config, machine, kinds=kinds)]
            better = min(around, key=lambda one: one.key, default=best)
            if better.key >= best.key:
                break
            best = better
    return best


def one_change(
    layout: Layout, config: ModelConfig, machine: MachineSpec, *, kinds: tuple[str, ...] = ("memory", "schedule", "cut")
) -> Iterator[Layout]:
    changes: list[dict[str, Any]] = []
    if "memory" in kinds:
        changes += [{"zero": zero} for zero in (0, 1, 2, 3)]
        changes += [{"recompute": recompute} for recompute in ("none", "selective", "full")]
        changes += [{"micro_rows": rows} for rows in (layout.micro_rows * 2, layout.micro_rows // 2) if rows]
    if "schedule" in kinds and layout.pp > 1:
        changes += [{"schedule": schedule} for schedule in SCHEDULES]
    if "cut" in kinds:
        pairs = (("pp", machine.n_devices), ("ep", config.n_routed_experts or 1), ("tp", machine.devices_per_node))
        for name, most in pairs:
            for size in (getattr(layout, name) * 2, getattr(layout, name) // 2):
                if 1 <= size <= most:
                    changes.append({name: size})
    for change in changes:
        pp = change.get("pp", layout.pp)
        if (pp > 1) != (layout.schedule != "none"):
            change["schedule"] = "zb1p" if pp > 1 else "none"
        for changed in valid(layout, **change):
            if changed != layout:
                yield changed


def valid(layout: Layout, **change: Any) -> Iterator[Layout]:
    """The changed layout, if there can be such a one."""
    try:
        yield replace(layout, **change)
    except ValueError:
        return


def fallen(best: Tried, other: Tried) -> FellOut | None:
    """Why one that was tried is not the best."""
    change = said(other.layout, best.layout)
    assert best.plan is not None
    if other.plan is None:
        return FellOut(change=change, why=other.why_not)
    if not other.plan.fits:
        peak, limit = bytes_text(other.plan.peak_memory_bytes), bytes_text(other.plan.memory_limit_bytes)
        return FellOut(change=change, why=f"does not fit: {peak} of {limit}")
    slower = other.plan.step_seconds / best.plan.step_seconds - 1
    if slower <= 0:
        return FellOut(change=change, why="as good")
    grown = {
        f.name.removesuffix("_seconds").replace("_", " "): getattr(other.plan.step, f.name)
        - getattr(best.plan.step, f.name)
        for f in fields(best.plan.step)
    }
    part, more = max(grown.items(), key=lambda one: one[1])
    return FellOut(change=change, why=f"{percent_text(slower)} slower: {seconds_text(more)} more of {part}")


def said(layout: Layout, beside: Layout | None = None) -> str:
    """Sizes and choices, or those that differ: pp=8 ep=32 zb1p zero=1 recompute=selective micro_rows=1."""
    names = ("pp", "ep", "tp", "dp", "schedule", "zero", "recompute", "micro_rows")
    shown = [name for name in names if beside is None or getattr(layout, name) != getattr(beside, name)]
    return " ".join(
        f"{name}={getattr(layout, name)}" for name in shown if getattr(layout, name) not in ("none", 0) or beside
    )


def powers(most: int) -> list[int]:
    return [1 << k for k in range(most.bit_length())]
