"""Answers that no verifier could decide, remembered in verdicts.jsonl so that none is ever decided twice.

Whether a verifier is in time depends on what else the machine does. A stage that was killed does its last steps again,
and must meet the same undecided answers, or it would not end where it would have ended. Each line is written before the
verdict is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from abyssal.types import Message, Problem


class Verdicts:
    """Reasons by problem and answer; with a path, those of the file too. Only what is undecided is kept."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._reasons: dict[tuple[str, str], str] = {}
        if path is not None and path.is_file():
            self._read(path)

    def reason(self, problem: Problem, message: Message) -> str | None:
        return self._reasons.get(key_of(problem, message))

    def add(self, problem: Problem, message: Message, reason: str) -> None:
        key = key_of(problem, message)
        self._reasons[key] = reason
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(as_line(key, reason))

    def forget(self, asked: Iterable[tuple[Problem, Message]]) -> None:
        """These are to be decided anew."""
        for problem, message in asked:
            self._reasons.pop(key_of(problem, message), None)
        if self.path is not None:
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_bytes(b"".join(as_line(key, reason) for key, reason in self._reasons.items()))
            os.replace(partial, self.path)

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:  # a killed process wrote half a line; nobody has used it
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._reasons[entry["problem"], entry["answer"]] = entry["reason"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}:{number} is no verdict; delete that line") from None


def key_of(problem: Problem, message: Message) -> tuple[str, str]:
    """The problem's key, and a hash of all that a verifier may look at."""
    seen = [problem.prompt, problem.answer, problem.verifier, message.thinking, message.content]
    text = json.dumps(seen).encode()  # ASCII, so that half a character has a hash too
    return problem.key, hashlib.sha256(text).hexdigest()[:20]


def as_line(key: tuple[str, str], reason: str) -> bytes:
    entry = {"problem": key[0], "answer": key[1], "reason": reason}
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")
