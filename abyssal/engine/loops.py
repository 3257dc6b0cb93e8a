"""Does a stream of ids repeat itself? One array operation an id, whatever the length of the stream.

The end of a stream is periodic with period p where each of its ids equals the one p places before. For every p the
detector keeps how long that has been so: the next id adds one to it, or makes it 0.
Letters: P periods, the first entry of an array over them belongs to period 1.
"""

from __future__ import annotations

import numpy as np

LONGEST = 256  # ids: a paragraph. What repeats at a greater distance is not seen
REPEATS = 4  # text that is meant says a thing three times at most
AT_LEAST = 64  # ids: rulers, runs of blanks and zeros are no loops


class Loops:
    """`push` each id; `period` is that of a loop at the end of the stream, or None.

    A loop is the same thing at least `repeats` times in a row, and at least `at_least` ids.
    """

    def __init__(self, *, longest: int = LONGEST, repeats: int = REPEATS, at_least: int = AT_LEAST) -> None:
        if longest < 1 or repeats < 2 or at_least < 1:
            raise ValueError(f"longest={longest}, repeats={repeats}, at_least={at_least}: give 1, 2 and 1 or more")
        period_P = np.arange(1, longest + 1)
        self._need_P = np.maximum(repeats * period_P, at_least) - period_P  # the first time round equals nothing yet
        self._run_P = np.zeros(longest, np.int64)
        self._ids = np.zeros(4 * longest, np.int64)
        self._n = 0

    def push(self, token: int) -> None:
        if self._n == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
        before_P = self._ids[max(0, self._n - len(self._run_P)) : self._n][::-1]
        run_P = self._run_P[: len(before_P)]
        run_P += 1
        run_P *= before_P == token
        self._ids[self._n] = token
        self._n += 1

    @property
    def period(self) -> int | None:
        """The shortest one: of aaaa... 1, though 2 and 3 fit as well."""
        found_P = self._run_P >= self._need_P
        first = int(found_P.argmax())
        return first + 1 if found_P[first] else None
