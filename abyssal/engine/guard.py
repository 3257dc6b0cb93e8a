"""The runner for a batch in which some request may be broken: that one fails, and no other one's numbers change.

A request that makes the computation raise is found by halving the batch (`isolation.py`). One whose logits are not
finite may have company: padding writes to the trash block, everybody reads that behind their own end, and 0 x NaN is
NaN. So whoever's logits are not finite is computed once more, alone, from its first entry that is not finite on. Then
they are, or they are its own fault.
Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from abyssal.engine.blocks import TRASH_BLOCK
from abyssal.engine.isolation import isolate, said
from abyssal.engine.runner import Computed, Runner
from abyssal.engine.sequence import Chunk, Prefix

NOT_FINITE = "the model's logits are not finite for this request; if all others end so too, load other weights"


class Guard:
    """`longest`: tokens of one prompt to compute at once. Ids from `vocab_size` on do not matter."""

    def __init__(self, runner: Runner, *, longest: int, vocab_size: int) -> None:
        self._runner, self._longest, self._vocab_size = runner, longest, vocab_size

    def prefill(self, prefills: list[tuple[Prefix, Chunk]]) -> dict[int, str]:
        """Compute these chunks, with what comes after them; returns the errors of those that fail alone, by place."""
        suspects: list[int] = []

        def work(places: np.ndarray) -> None:
            computed = self._runner.prefill([prefills[place][1] for place in places.tolist()])
            is_good_B = self.is_finite(computed.logits_XV)
            for i, place in enumerate(places.tolist()):
                prefills[place][0].logits_V, prefills[place][0].hidden_D = computed.logits_XV[i], computed.hidden_XD[i]
            suspects.extend(places[~is_good_B].tolist())

        _, errors = isolate(len(prefills), work)
        for place in suspects:
            prefix, chunk = prefills[place]
            end = chunk.start + len(chunk.ids)
            try:
                computed = self.alone(prefix.ids[:end], chunk.blocks, following=prefix.ids[end:])
            except Exception as error:
                errors[place] = said(error)
                continue
            prefix.logits_V, prefix.hidden_D = computed.logits_XV[0], computed.hidden_XD[0]
            if not self.is_finite(computed.logits_XV).all():
                errors[place] = NOT_FINITE
        return errors

    def alone(self, ids: np.ndarray, blocks: np.ndarray, *, following: np.ndarray | None = None) -> Computed:
        """What comes after these ids, of which all but the last should be in these blocks, with nobody else around."""
        is_dirty_N = self.clean(blocks)
        size = self._runner.block_size
        start = min(int(is_dirty_N.argmax()) * size, len(ids) - 1) if is_dirty_N.any() else len(ids) - 1
        all_ids = ids if following is None else np.concatenate((ids, following))
        while True:
            end = min(start + self._longest, len(ids))
            computed = self._runner.prefill([Chunk(ids[start:end], start, blocks, all_ids[end:])])
            if end == len(ids):
                return computed
            start = end

    def clean(self, blocks: np.ndarray) -> np.ndarray:
        """What is not finite in these blocks and in the trash becomes zero; returns which of them had any of it."""
        is_dirty_N: np.ndarray = self._runner.clean(np.append(blocks, TRASH_BLOCK))[:-1]
        return is_dirty_N

    def is_finite(self, logits_BV: Tensor) -> np.ndarray:
        is_finite_B: np.ndarray = logits_BV[:, : self._vocab_size].isfinite().all(-1).cpu().numpy()
        return is_finite_B
