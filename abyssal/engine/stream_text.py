"""Ids -> text, as they come: whatever is handed out stays, and all of it together is the text of the whole.

What cannot be known yet is held back: half a character, and what may be the beginning of a stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from abyssal.engine.stop_strings import StopSearch
from abyssal.engine.vocabulary import Vocabulary


class StreamText:
    """Text of an answer to `prompt_ids`, control tokens left out.

    `stop` is the stop string that ended it; it and all behind it are in no text.
    """

    def __init__(self, vocabulary: Vocabulary, *, stop: Sequence[str] = (), prompt_ids: Sequence[int] = ()) -> None:
        self._vocabulary = vocabulary
        self._search = StopSearch(stop, vocabulary, prompt_ids=prompt_ids) if stop else None
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = b""
        self.stop: str | None = None

    def feed(self, token: int) -> str:
        """What is certain now. A control token ends a text: all that was held back comes out before it."""
        if self.stop is not None:
            return ""
        if token in self._vocabulary.control_ids:
            if self._search is not None:
                self._search.read(token)
            return self.end()
        written = self._vocabulary.bytes_of[token]
        if self._search is None:
            return self._decoder.decode(written)
        match = self._search.read(token)
        self._held += written
        if match is not None:
            self.stop = match.string
            before = self._held[: len(self._held) - len(written) + match.n_before]
            self._held = b""
            return self._decoder.decode(before, final=True)
        n_certain = len(self._held) - self._search.n_pending
        certain, self._held = self._held[:n_certain], self._held[n_certain:]
        return self._decoder.decode(certain)

    def end(self) -> str:
        """Nothing more comes: what was held back. Half a character becomes \ufffd."""
        held, self._held = self._held, b""
        return self._decoder.decode(held, final=True)


def text_of(
    ids: Iterable[int], vocabulary: Vocabulary, *, stop: Sequence[str] = (), prompt_ids: Sequence[int] = ()
) -> str:
    """The text of a whole answer."""
    stream = StreamText(vocabulary, stop=stop, prompt_ids=prompt_ids)
    return "".join([*map(stream.feed, ids), stream.end()])
