"""A plan for programs: every number with its unit in its name, what is worked out included."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from abyssal.plan.simulate import Timeline

DRAWN = ("schedule", "times", "slot_seconds", "sends", "jobs")  # of a timeline, what only a picture needs


def as_json(value: Any) -> Any:
    """Dataclasses become objects of their fields and properties; mappings, tuples and numbers what JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        names += [name for name, kind in vars(type(value)).items() if isinstance(kind, property)]
        names = [name for name in names if not (isinstance(value, Timeline) and name in DRAWN)]
        return {name: as_json(getattr(value, name)) for name in names}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return as_json(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): as_json(inner) for key, inner in value.items()}
    if isinstance(value, range):
        return [value.start, value.stop]
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
