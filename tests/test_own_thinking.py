"""What effort means: by what was measured of a model, or by its context where nobody measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from abyssal.checkpoint.own_thinking import (
    ThinkingLengths,
    effort_budget,
    measured_lengths,
    own_thinking,
    thinking_file,
    write_lengths,
)

KNOWN = ThinkingLengths(400, {"low": 30, "medium": 55, "high": 90}, "Done.")


def test_an_effort_leaves_its_share_of_the_right_answers_alone():
    right = [*range(1, 101)]  # one answer of each length
    known = measured_lengths(right[::-1], landing="Done.")
    assert known == (100, {"low": 51, "medium": 81, "high": 96}, "Done.")
    for effort, share in (("low", 0.5), ("medium", 0.8), ("high", 0.95)):
        budget = effort_budget(effort, known, landing=4, context=1000).budget
        # thinking of n ids closes by itself where the phrase need not begin before: n < budget - 4
        assert sum(n < budget - 4 for n in right) / 100 >= share
        assert sum(n <= effort_budget(effort, known, landing=0, context=1000).budget for n in right) / 100 >= share
    assert measured_lengths(right[:19]) is None and measured_lengths([7] * 20).lengths["high"] == 7


def test_a_budget_says_where_it_comes_from():
    assert effort_budget("medium", KNOWN, landing=3, context=4096) == (
        59, "80% of 400 right answers thought no longer than 55")
    assert effort_budget("high", KNOWN, landing=3, context=64).budget == 64
    unknown = effort_budget("low", None, landing=3, context=4096)
    assert unknown.budget == 256 and "1/16 of the context: nobody measured" in unknown.why
    with pytest.raises(ValueError, match="effort='most'; use one of low, medium, high"):
        effort_budget("most", KNOWN, landing=3, context=4096)


def test_what_was_measured_lies_beside_the_weights(tmp_path: Path):
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    assert own_thinking(directory) is None
    assert write_lengths(directory, KNOWN) == directory / "thinking.json"
    assert own_thinking(directory) == KNOWN
    assert [p.name for p in directory.iterdir()] == ["thinking.json"]
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    assert thinking_file(gguf) == tmp_path / "model.gguf.thinking.json"


@pytest.mark.parametrize(("content", "message"), [
    ({"n_answers": 3, "low": 1, "medium": -2, "high": 3}, "medium=-2 is no count"),
    ({"n_answers": True, "low": 1, "medium": 2, "high": 3}, "n_answers=True is no count"),
    ({"n_answers": 3, "low": 1, "medium": 2, "high": 3, "landing": 5}, "landing=5 is no text"),
    ({}, "low=None is no count"),
])
def test_a_file_that_says_something_else_is_refused(tmp_path: Path, content: dict, message: str):
    (tmp_path / "thinking.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        own_thinking(tmp_path)
