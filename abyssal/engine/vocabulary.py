"""What those parts of the engine that look at text know of a tokenizer: bytes and marks, no rules of cutting."""

from __future__ import annotations

from dataclasses import dataclass

from abyssal.tokens.bpe import END_THINK, THINK
from abyssal.tokens.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """`bytes_of` has an entry for each id, b"" where it is a control token or none; ids beyond it do not exist.

    `end_ids` end an answer; `think_id` and `end_think_id` are None where the vocabulary cannot mark thinking.
    """

    bytes_of: list[bytes]
    end_ids: frozenset[int]
    control_ids: frozenset[int]
    think_id: int | None = None
    end_think_id: int | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """The tokenizer works the bytes out once and keeps them."""
        return cls(
            bytes_of=tokenizer.bytes_of,
            end_ids=tokenizer.end_ids,
            control_ids=tokenizer.control_ids,
            think_id=tokenizer.find(THINK),
            end_think_id=tokenizer.find(END_THINK),
        )

    def bytes_from(self, ids: list[int]) -> bytes:
        return b"".join(map(self.bytes_of.__getitem__, ids))
