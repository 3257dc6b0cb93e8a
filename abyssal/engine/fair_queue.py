"""Who of the waiting goes next: by priority, then by how much each namespace has been served, then by arrival.

Within a priority the namespace that was served the fewest tokens goes first, so that a thousand requests of one user do
not stand before another's one (Virtual Token Counter, Sheng et al. 2024). Who comes back after a pause begins where the
least served of the busy ones stands: nobody saves up turns. Priorities are strict but for ageing: where `ageing_steps`
steps pass in which nobody of a priority that waits was admitted, its next one goes before everybody, once.
Owns the order and the counters. Does not own room: `scheduler.py` says whether the next one fits.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from abyssal.engine.sequence import Sequence

AGEING_STEPS = 512


@dataclass(eq=False)
class Space:
    """What one namespace has been served, in tokens computed and drawn, and how many of its requests are under way."""

    served: int = 0
    n_unfinished: int = 0


@dataclass(eq=False)
class Line:
    """The waiting of one priority: by namespace in the order of arrival, and those that lost their turn in front."""

    since: int  # the step of its last admission, or in which it began
    turned_back: list[Sequence] = field(default_factory=list)
    by_root: dict[bytes, list[Sequence]] = field(default_factory=dict)


def arrival(sequence: Sequence) -> int:
    return sequence.request_id


class FairQueue:
    def __init__(self, *, ageing_steps: int = AGEING_STEPS) -> None:
        self.ageing_steps = ageing_steps
        self._lines: dict[int, Line] = {}
        self._aged: list[Sequence] = []
        self._spaces: dict[bytes, Space] = {}
        self._n_waiting = 0
        self._n_steps = 0

    def __len__(self) -> int:
        return self._n_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """All that wait, each namespace's in its order."""
        yield from self._aged
        for priority in sorted(self._lines, reverse=True):
            line = self._lines[priority]
            yield from line.turned_back
            for sequences in line.by_root.values():
                yield from sequences

    def is_busy(self, root: bytes) -> bool:
        """Has a namespace requests under way?"""
        return root in self._spaces and self._spaces[root].n_unfinished > 0

    def join(self, sequence: Sequence) -> None:
        """A new request; from now on its namespace's share counts."""
        busy = [space.served for space in self._spaces.values() if space.n_unfinished]
        if not busy:
            self._spaces.clear()  # nobody waits for anybody: old debts mean nothing
        space = self._spaces.setdefault(sequence.root, Space())
        space.n_unfinished += 1
        if busy and space.n_unfinished == 1:
            least = min(busy)
            space.served = max(space.served, least)
            self._forget_idle(least)
        self.push(sequence)

    def _forget_idle(self, least: int) -> None:
        """Who has no debt left is as good as new. Looked for seldom: when idle ones are most of all."""
        n_busy = sum(space.n_unfinished > 0 for space in self._spaces.values())
        if len(self._spaces) > 64 + 2 * n_busy:
            self._spaces = {r: s for r, s in self._spaces.items() if s.n_unfinished or s.served > least}

    def leave(self, sequence: Sequence) -> None:
        """A request has ended."""
        self._spaces[sequence.root].n_unfinished -= 1

    def charge(self, sequence: Sequence, n_ids: int) -> None:
        """It has been served so many of its ids; what is computed again is not paid for again."""
        self._spaces[sequence.root].served += max(0, n_ids - sequence.n_charged)
        sequence.n_charged = max(sequence.n_charged, n_ids)

    def push(self, sequence: Sequence, *, turned_back: bool = False) -> None:
        """It waits (again). `turned_back`: it goes before all others of its priority."""
        self._n_waiting += 1
        if sequence.is_aged:
            insort(self._aged, sequence, key=arrival)
            return
        line = self._lines.get(sequence.priority)
        if line is None:
            line = self._lines[sequence.priority] = Line(self._n_steps)
        at = line.turned_back if turned_back else line.by_root.setdefault(sequence.root, [])
        insort(at, sequence, key=arrival)

    def admitted(self, sequence: Sequence) -> None:
        """It waits no more, because its turn came."""
        if sequence.priority in self._lines:
            self._lines[sequence.priority].since = self._n_steps
        self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        self._n_waiting -= 1
        if sequence.is_aged:
            self._aged.remove(sequence)
            return
        line = self._lines[sequence.priority]
        if sequence in line.turned_back:
            line.turned_back.remove(sequence)
        else:
            line.by_root[sequence.root].remove(sequence)
            if not line.by_root[sequence.root]:
                del line.by_root[sequence.root]
        if not line.turned_back and not line.by_root:
            del self._lines[sequence.priority]

    def turn_back(self, sequence: Sequence) -> None:
        """What was computed for a waiting one had to go: next time nobody of its priority comes between."""
        if not sequence.is_aged:
            self.remove(sequence)
            self.push(sequence, turned_back=True)

    def tick(self) -> None:
        """A step begins: who has been passed over for too long goes first from now on."""
        self._n_steps += 1
        if len(self._lines) < 2:
            return
        for priority in sorted(self._lines)[:-1]:
            is_due = self._n_steps - self._lines[priority].since >= self.ageing_steps
            if is_due and not any(aged.priority == priority for aged in self._aged):
                sequence = self._first(self._lines[priority])
                self.remove(sequence)
                sequence.is_aged = True
                self.push(sequence)

    def head(self) -> Sequence | None:
        if self._aged:
            return self._aged[0]
        return self._first(self._lines[max(self._lines)]) if self._lines else None

    def rank(self, sequence: Sequence) -> tuple[bool, int, int, int]:
        """Of those that need no room any more the smallest goes first."""
        return not sequence.is_aged, -sequence.priority, self._spaces[sequence.root].served, sequence.request_id

    def _first(self, line: Line) -> Sequence:
        if line.turned_back:
            return line.turned_back[0]
        firsts = (sequences[0] for sequences in line.by_root.values())
        return min(firsts, key=lambda sequence: (self._spaces[sequence.root].served, sequence.request_id))
