"""A machine in a few words, "rtx4090+128GB" or "24GB+128GB": a known card, or one of that much memory, and the RAM.

Owns the reading of the words. Figures are those of machines/: of the card of that name, or of the nearest in memory.
"""

from __future__ import annotations

import re
from dataclasses import replace

from abyssal.plan.in_words import bytes_text
from abyssal.plan.machine_file import MACHINES, MachineSpec, read_machine

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(G|T)i?B", re.IGNORECASE)
HOST = "gpu_and_ram"  # whose RAM a machine is given that has none of its own
SAME, NEAR = 1.1, 1.5  # times as much memory: the card itself; one whose rates may stand for it


def described_machine(words: str) -> MachineSpec:
    """A name in machines/, a path, or `card+RAM`, where a card is a name or a size and RAM is a size."""
    card, _, ram = (part.strip() for part in words.partition("+"))
    machine = _of_memory(card) if SIZE.fullmatch(card) else read_machine(card)
    if not ram:
        return machine
    if not SIZE.fullmatch(ram):
        raise ValueError(f"{ram!r} in machine={words!r} is no size of RAM; write 24GB+128GB or rtx4090+128GB")
    if machine.kind != "gpu":
        raise ValueError(f"{machine.name} has no RAM beside its own memory; leave +{ram} out")
    host = machine.host or read_machine(HOST).host
    assert host is not None, f"machines/{HOST}.toml has a host"
    return replace(
        machine,
        name=words,
        title=f"{machine.title} and {bytes_text(_size_bytes(ram))} of RAM",
        host=replace(host, memory_bytes=_size_bytes(ram)),
    )


def _of_memory(size: str) -> MachineSpec:
    """One device of the machine whose devices are nearest in memory; of equals the first by name."""
    wanted = _size_bytes(size)
    machines = [read_machine(path) for path in sorted(MACHINES.glob("*.toml")) if not path.stem.startswith("gpu_and")]
    cards = [machine for machine in machines if machine.kind == "gpu"]
    card = min(cards, key=lambda machine: _times(machine.memory_bytes, wanted))
    if (times := _times(card.memory_bytes, wanted)) > NEAR:
        known = ", ".join(sorted({bytes_text(machine.memory_bytes) for machine in cards}))
        raise ValueError(f"no card of about {size} is known, only of {known}; write a file as machines/ has them")
    one = replace(card, n_devices=1, devices_per_node=1, intra_node=None, inter_node=None)
    if card.n_devices > 1:
        one = replace(one, title=f"one of {card.title}")
    if times > SAME:
        one = replace(one, memory_bytes=wanted, title=f"one {size} card with the rates of {card.title}")
    return one


def _times(one: float, other: float) -> float:
    return max(one / other, other / one)


def _size_bytes(text: str) -> float:
    found = SIZE.fullmatch(text)
    assert found is not None, text
    return float(found[1]) * (1e12 if found[2].upper() == "T" else 1e9)
