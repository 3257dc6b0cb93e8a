"""A number without its unit in its name is a mistake that waits to happen: SI units, and counts that say of what."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re

import pytest

import abyssal.plan

NEEDS_TORCH = {"measure_machine", "rank_shards"}
MODULES = [
    importlib.import_module(f"abyssal.plan.{module.name}")
    for module in pkgutil.iter_modules(abyssal.plan.__path__)
    if module.name not in NEEDS_TORCH
]
TYPES = sorted(
    {
        (value.__module__, value.__qualname__, value)
        for module in MODULES
        for value in vars(module).values()
        if dataclasses.is_dataclass(value) and isinstance(value, type) and value.__module__ == module.__name__
    },
    key=lambda entry: entry[:2],
)
UNIT = r"(bytes|seconds|usd|flops|tokens|hours|share)"
HAS_UNIT = re.compile(rf"(^|_){UNIT}($|_per_)|_per_{UNIT}$|_share$|^n_")
MEASURES = ("float", "float | None")
PURE = {  # ratios, and numbers whose unit stands beside them
    "value",  # Sourced: its field's name has the unit
    "published", "planned", "deviation",  # Published: `unit`
    "expert_imbalance", "draft_acceptance", "acceptance", "step_times",
    "steps", "nodes",  # counts of what they are named after
}  # fmt: skip


@pytest.mark.parametrize("kind", [entry[2] for entry in TYPES], ids=lambda kind: kind.__qualname__)
def test_every_measure_has_its_unit_in_its_name(kind: type):
    nameless = [
        field.name
        for field in dataclasses.fields(kind)
        if field.type in MEASURES and field.name not in PURE and not HAS_UNIT.search(field.name)
    ]
    assert not nameless, f"{kind.__module__}.{kind.__qualname__}: {nameless} are in which unit?"


def test_the_walk_finds_the_plans_own_types():
    names = {entry[1] for entry in TYPES}
    assert {"TrainingPlan", "StepSeconds", "RankMemory", "Operation", "MachineSpec", "Layout"} <= names
    assert not HAS_UNIT.search("speed") and not HAS_UNIT.search("time") and not HAS_UNIT.search("memory_gb")
