"""The first of several strings in bytes that come piece by piece, wherever the pieces are cut.

An automaton (Aho and Corasick 1975) that reads each byte once. Its state is the longest end of what was read that is
the beginning of some string: what must not be shown to anybody yet. First is what ends first; of those that end
together, the longest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from abyssal.engine.thinking import phase_behind
from abyssal.engine.vocabulary import Vocabulary


class StopStrings:
    """States are numbered from 0, the empty one; `depth` is the number of bytes that a state stands for."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._shorter = [0]  # the state of the longest proper end of a state's bytes
        self.depth = [0]
        self.found: list[str | None] = [None]  # the longest string that a state ends with
        for string in strings:
            state = 0
            for byte in string.encode():
                state = self._next[state].get(byte) or self._new_state(state, byte)
            self.found[state] = string
        self._link()

    def _new_state(self, before: int, byte: int) -> int:
        self._next[before][byte] = len(self._next)
        self._next.append({})
        self._shorter.append(0)
        self.depth.append(self.depth[before] + 1)
        self.found.append(None)
        return len(self._next) - 1

    def _link(self) -> None:
        """By depth, so that shorter states are linked already."""
        todo = deque(self._next[0].values())
        while todo:
            state = todo.popleft()
            self.found[state] = self.found[state] or self.found[self._shorter[state]]
            for byte, after in self._next[state].items():
                self._shorter[after] = self.step(self._shorter[state], byte)
                todo.append(after)

    def step(self, state: int, byte: int) -> int:
        while (after := self._next[state].get(byte)) is None and state:
            state = self._shorter[state]
        return after or 0


class Match(NamedTuple):
    """`n_before` bytes of the piece, or fewer than none, come before the string: it may have begun in earlier ones."""

    string: str
    n_before: int


class StopSearch:
    """Reads the ids of an answer to `prompt_ids`. In the thinking, which comes before what is asked for, nothing is
    looked for; nor across a control token, because what stands on its two sides are two texts.
    """

    def __init__(self, strings: Sequence[str], vocabulary: Vocabulary, *, prompt_ids: Sequence[int]) -> None:
        self._strings, self._vocabulary = StopStrings(strings), vocabulary
        self._state, self._in_thought = 0, phase_behind(prompt_ids, vocabulary) == "open"
        self._n_read, self._found = 0, ""

    @property
    def n_pending(self) -> int:
        """So many of the last bytes may be the beginning of a string."""
        return self._strings.depth[self._state]

    def through(self, ids: np.ndarray) -> str | None:
        """The string that an answer with these ids has come to. What was read before is not read again."""
        for token in ids[self._n_read :].tolist():
            if not self._found and (match := self.read(token)):
                self._found = match.string
        return self._found or None

    def read(self, token: int) -> Match | None:
        self._n_read += 1
        vocabulary = self._vocabulary
        if token in vocabulary.control_ids:
            self._state = 0
            if token == vocabulary.end_think_id:
                self._in_thought = False
            elif token == vocabulary.think_id and self._n_read == 1:  # later it is no mark of thinking (thinking.py)
                self._in_thought = True
            return None
        if self._in_thought:
            return None
        for n, byte in enumerate(vocabulary.bytes_of[token], start=1):
            self._state = self._strings.step(self._state, byte)
            if string := self._strings.found[self._state]:
                return Match(string, n - len(string.encode()))
        return None
