"""What nobody could decide is written down before it is used, and not decided again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from abyssal.reward.verdicts import Verdicts
from abyssal.reward.verifiers import Verifiers
from abyssal.types import Message, Problem, Score

PROBLEM = Problem(prompt="1+1?", answer="2", key="1+1", verifier="fickle:first_fails")
FICKLE = '''
from pathlib import Path

def first_fails(problem, message):
    """Fails on the first time it sees an answer, wherever it runs."""
    seen = Path(__file__).with_name("seen_" + message.content)
    if not seen.exists():
        seen.touch()
        raise RuntimeError("too busy")
    return 1.0
'''


def says(content: str, thinking: str | None = None) -> Message:
    return Message(role="assistant", content=content, thinking=thinking)


@pytest.fixture
def fickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fickle.py").write_text(FICKLE)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_an_undecided_answer_stays_undecided_in_the_next_process(fickle, tmp_path: Path):
    path = tmp_path / "verdicts.jsonl"
    too_busy = Score(None, "raised: fickle:first_fails: RuntimeError: too busy")
    for _ in range(2):  # the second as a killed stage that does its step again
        with Verifiers() as verifiers, verifiers.recorded_in(path):
            assert verifiers.accuracies([(PROBLEM, says("a")), (PROBLEM, says("a"))]) == [too_busy] * 2
    [line] = path.read_text().splitlines()
    assert json.loads(line)["problem"] == "1+1" and json.loads(line)["reason"] == too_busy.error
    with Verifiers() as verifiers:  # without the file it would have been decided
        assert verifiers.accuracy(PROBLEM, says("a")) == Score(1.0)


def test_what_was_forgotten_is_decided_anew(fickle, tmp_path: Path):
    path = tmp_path / "verdicts.jsonl"
    with Verifiers() as verifiers, verifiers.recorded_in(path):
        verifiers.accuracies([(PROBLEM, says("a")), (PROBLEM, says("b"))])
        verifiers.forget([(PROBLEM, says("a"))])
        assert verifiers.accuracy(PROBLEM, says("a")) == Score(1.0)
        assert verifiers.accuracy(PROBLEM, says("b")).value is None
    assert len(path.read_text().splitlines()) == 1
    assert not list(tmp_path.glob("*.partial"))


def test_another_answer_thinking_reference_or_verifier_is_another_verdict(tmp_path: Path):
    verdicts = Verdicts(tmp_path / "verdicts.jsonl")
    verdicts.add(PROBLEM, says("a", "so"), "timeout: x")
    assert verdicts.reason(PROBLEM, says("a", "so")) == "timeout: x"
    for problem, message in (
        (PROBLEM, says("a")), (PROBLEM, says("b", "so")), (PROBLEM, says("aso")),
        (Problem(prompt="1+1?", answer="3", key="1+1", verifier="fickle:first_fails"), says("a", "so")),
        (Problem(prompt="1+1?", answer="2", key="1+1", verifier="exact"), says("a", "so")),
    ):  # fmt: skip
        assert verdicts.reason(problem, message) is None


def test_half_a_line_is_dropped_and_what_follows_is_whole(tmp_path: Path):
    path = tmp_path / "verdicts.jsonl"
    Verdicts(path).add(PROBLEM, says("答案 \ud800"), "timeout: x")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    verdicts = Verdicts(path)
    assert path.read_bytes() == whole and verdicts.reason(PROBLEM, says("答案 \ud800")) == "timeout: x"
    verdicts.add(PROBLEM, says("b"), "died: y")
    assert Verdicts(path).reason(PROBLEM, says("b")) == "died: y"


def test_a_damaged_line_is_named(tmp_path: Path):
    path = tmp_path / "verdicts.jsonl"
    path.write_text('{"problem": "a", "answer": "b", "reason": "c"}\n{"problem": 1}\n')
    with pytest.raises(ValueError, match=r"verdicts.jsonl:2 is no verdict; delete that line"):
        Verdicts(path)
