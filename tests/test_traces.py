"""Rejection sampling: why a trace is refused, which of several is kept, and when there are too few."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from abyssal.data.problems import ProblemSource
from abyssal.data.user_examples import read_conversations
from abyssal.evals.grade import Grade
from abyssal.record import Recorder
from abyssal.reward.verifiers import Verifiers
from abyssal.stages.rl import ProblemStream
from abyssal.stages.traces import TracesConfig, distinct, refusal, sample_traces
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.chat import parse, render
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Completion, Conversation, FinishReason, Message, Problem, Rollout

GOOD = Grade(
    accuracy=1.0, error=None, well_formed=1.0, language=1.0, mixed=False, thinks=True, truncated=False, length=9
)
OWN = tuple(Problem(prompt=f"{n} + {n} = ?", answer=str(2 * n), key=str(n), verifier="exact") for n in (1, 2, 3))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe(["1 + 1 = 2, so 2; 所以 2"] * 20, vocab_size=320))


def says(content: str, thinking: str | None = None) -> Message:
    return Message(role="assistant", content=content, thinking=thinking)


def spoken(message: Message, tokenizer: Tokenizer) -> list[int]:
    """What the assistant itself writes."""
    rendered = render([message], tokenizer)
    return [i for i, learned in zip(rendered.ids, rendered.mask, strict=True) if learned]


def rollout(tokenizer: Tokenizer, message: Message, reason: FinishReason = "stop") -> Rollout:
    ids = spoken(message, tokenizer)
    completion = Completion(prompt_ids=[0], ids=ids, logps=[0.0] * len(ids), finish_reason=reason)
    return Rollout(problem=OWN[0], completion=completion, message=parse(ids, tokenizer))


class Scripted:
    """An engine that says what it is told, prompt by prompt."""

    def __init__(self, tokenizer: Tokenizer, answers: list[tuple[Message, FinishReason]]) -> None:
        self.tokenizer, self.answers, self.n_calls = tokenizer, list(answers), 0

    def generate(self, prompts: list[list[int]], params: list[Any]) -> list[Completion]:
        self.n_calls += 1
        said, self.answers = self.answers[: len(prompts)], self.answers[len(prompts) :]
        return [
            Completion(prompt_ids=prompt, ids=(ids := spoken(m, self.tokenizer)), logps=[0.0] * len(ids),
                       finish_reason=reason)
            for prompt, (m, reason) in zip(prompts, said, strict=True)
        ]  # fmt: skip


def sampled(directory: Path, engine: Scripted, tokenizer: Tokenizer, config: TracesConfig) -> list[Conversation]:
    console = Console(file=io.StringIO())
    with Verifiers() as verifiers, Recorder(directory / "traces", "traces", 1, 1, console=console) as recorder:
        return sample_traces(
            directory,
            config=config,
            engine=engine,  # type: ignore[arg-type]
            tokenizer=tokenizer,
            stream=ProblemStream(ProblemSource(), 0, own=OWN),
            first_problem=0,
            verifiers=verifiers,
            seed=0,
            recorder=recorder,
        )


def test_every_reason_and_its_place_in_the_order(tokenizer):
    """Each fault is added to those before it, and the first in the order is the one that is named."""
    one = rollout(tokenizer, says("2", "so 2"))
    faults: list[tuple[str, dict[str, Any]]] = [
        ("mixed languages", {"mixed": True}),
        ("no thinking", {"thinks": False}),
        ("malformed", {"well_formed": 0.0}),
        ("wrong", {"accuracy": 0.0}),
        ("undecided", {"accuracy": None}),
        ("cut off", {"truncated": True}),
    ]
    grade = GOOD
    assert refusal(one, grade, TracesConfig()) is None
    for reason, fault in faults:
        assert refusal(one, GOOD._replace(**fault), TracesConfig()) == reason
        grade = grade._replace(**fault)
        assert refusal(one, grade, TracesConfig()) == reason


def test_what_is_not_asked_for_is_no_reason(tokenizer):
    one = rollout(tokenizer, says("2"))
    assert refusal(one, GOOD._replace(thinks=False), TracesConfig(thinking=False)) is None
    assert refusal(one, GOOD._replace(mixed=True), TracesConfig(one_language=False)) is None


def test_a_partly_right_answer_is_wrong(tokenizer):
    assert refusal(rollout(tokenizer, says("2")), GOOD._replace(accuracy=0.5), TracesConfig()) == "wrong"


def test_the_most_worked_out_comes_first_and_the_same_text_once(tokenizer):
    short, long = says("2", "so 2"), says("2", "so 1 + 1 = 2, so 2")
    found = distinct([rollout(tokenizer, m) for m in (short, long, short)])
    assert [r.message for r in found] == [long, short]


def test_kept_traces_are_conversations_and_every_refusal_is_counted(tokenizer, tmp_path: Path):
    engine = Scripted(tokenizer, [
        (says("2", "so 2"), "stop"), (says("2", "so 1 + 1 = 2"), "stop"), (says("3", "so 3"), "stop"),
        (says("4"), "stop"), (says("4", "so 4"), "length"), (says("5"), "stop"),
        (says("6", "所以 6"), "stop"), (says("6", "so 6"), "stop"), (says("6", "so 6"), "stop"),
    ])  # fmt: skip
    config = TracesConfig(problems=3, answers=3, least=1)
    kept = sampled(tmp_path, engine, tokenizer, config)
    ask = [Message(role="user", content=p.prompt) for p in OWN]
    # of the first problem the longer of two, of the second none; English was asked, so the third's Chinese is refused
    assert kept == [[ask[0], says("2", "so 1 + 1 = 2")], [ask[2], says("6", "so 6")]]
    assert read_conversations(tmp_path / "traces.jsonl") == kept
    log = (tmp_path / "traces" / "log.txt").read_text(encoding="utf-8")
    assert "kept 2 of 9 traces" in log
    for counted in ("one of several 2", "wrong 2", "no thinking 1", "cut off 1", "mixed languages 1"):
        assert counted in log, log


def test_several_of_one_problem_may_be_kept(tokenizer, tmp_path: Path):
    answers: list[tuple[Message, FinishReason]] = [
        (says("2", "so 2"), "stop"), (says("2", "so 1 + 1 = 2"), "stop"), (says("2", "so 2"), "stop"),
    ]  # fmt: skip
    config = TracesConfig(problems=1, answers=3, keep_per_problem=5, least=1)
    kept = sampled(tmp_path, Scripted(tokenizer, answers), tokenizer, config)
    assert [c[1].thinking for c in kept] == ["so 1 + 1 = 2", "so 2"]


def test_too_few_traces_stop_the_stage_and_leave_no_file(tokenizer, tmp_path: Path):
    engine = Scripted(tokenizer, [(says("2", "so 2"), "stop"), (says("9"), "stop")] * 3)
    config = TracesConfig(problems=3, answers=2, least=2)
    with pytest.raises(ValueError, match=r"only 1 of 6 traces passed \(wrong 5\).*lower `least`=2"):
        sampled(tmp_path, engine, tokenizer, config)
    assert not (tmp_path / "traces.jsonl").exists()


def test_traces_written_whole_are_not_sampled_again(tokenizer, tmp_path: Path):
    config = TracesConfig(problems=1, answers=1, least=1)
    kept = sampled(tmp_path, Scripted(tokenizer, [(says("2", "so 2"), "stop")]), tokenizer, config)
    silent = Scripted(tokenizer, [])
    assert sampled(tmp_path, silent, tokenizer, replace(config, problems=5)) == kept
    assert silent.n_calls == 0
