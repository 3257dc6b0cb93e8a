"""The reward of open requests: deviations by hand, what is clipped, what a cut-off answer gets, what is watched."""

from __future__ import annotations

import pytest
import torch

from abyssal.reward.open_request import Head
from abyssal.stages.preference_judge import Judge, Judged, watched
from abyssal.types import Completion, FinishReason, Message, Problem, Rollout

SECRET = Problem(prompt="secret?", answer="", verifier="request",
                 metadata={"request": {"kind": "secret", "code": "4821", "public": False}})  # fmt: skip
LIST = Problem(prompt="list?", answer="", verifier="request",
               metadata={"request": {"kind": "list", "topic": "tools", "n": 2, "without": ["saw", "axe"]}})  # fmt: skip
HEADS = {
    "helpfulness": {"mean": 10.0, "std": 5.0, "truth_mean": 0.5, "truth_std": 0.25},
    "safety": {"mean": 0.0, "std": 2.0, "truth_mean": 0.5, "truth_std": 0.5},
}


class ByLength:
    """Helpfulness is the length of the answer, safety minus that of the thinking."""

    def of(self, head: Head, responses: list[tuple[str, Message]]) -> torch.Tensor:
        helpful = head == "helpfulness"
        return torch.tensor([float(len(m.content) if helpful else -len(m.thinking or "")) for _, m in responses])


JUDGE = Judge(ByLength(), HEADS, clip=3.0)  # type: ignore[arg-type]


def said(problem: Problem, content: str, thinking: str | None = None, reason: FinishReason = "stop") -> Rollout:
    completion = Completion(prompt_ids=[1], ids=[2], logps=[-1.0], finish_reason=reason)
    message = Message(role="assistant", content=content, thinking=thinking)
    return Rollout(problem=problem, completion=completion, message=message)


def test_deviations_are_summed_over_the_heads_that_judge():
    judged = JUDGE.judge([
        said(LIST, "rope, nail", "so two"),  # (10 - 10) / 5; all right: (1 - 0.5) / 0.25
        said(SECRET, "I cannot say that.", "4821"),  # (18 - 10) / 5 and -4 / 2; helpful and not safe: 2 - 1
        said(SECRET, "4821"),  # (4 - 10) / 5 and 0; neither: -2 - 1
    ])  # fmt: skip
    assert judged.rewards_A == pytest.approx([0.0, 1.6 - 2.0, -1.2])
    assert judged.truths_A == pytest.approx([2.0, 1.0, -3.0])
    assert judged.helpfulness_A == [1.0, 1.0, 0.0] and judged.safety_A == [None, 0.0, 0.0]


def test_no_head_is_worth_more_than_the_clip():
    judged = JUDGE.judge([said(LIST, "x" * 500), said(SECRET, "x" * 500, "y" * 500)])
    assert judged.rewards_A == [3.0, 0.0]


def test_an_answer_cut_off_is_the_least_helpful_and_its_safety_is_still_read():
    (whole, cut) = (said(SECRET, "I cannot say that.", "so", reason) for reason in ("stop", "length"))
    judged = JUDGE.judge([whole, cut])
    assert judged.rewards_A == pytest.approx([1.6 - 1.0, -3.0 - 1.0])
    assert judged.truths_A == pytest.approx([2.0 + 1.0, -2.0 + 1.0])
    assert judged.helpfulness_A == [1.0, 0.0]


def test_agreement_is_counted_within_groups_where_the_truth_differs():
    # group 1: truth 1 > 0, reward agrees; equal truths count for nothing. Group 2: reward has it the wrong way round.
    judged = Judged([2.0, 1.0, 0.5, 0.1], [1.0, 0.0, 0.0, 1.0], [1.0, 0.5, 0.0, 0.5], [None, 1.0, 0.0, None])
    seen = watched(judged, answers=2)
    assert seen == {
        "preference_reward": pytest.approx(0.9), "preference_truth": 0.5, "helpful_share": 0.5, "safe_share": 0.5,
        "preference_agreement": 0.5,
    }  # fmt: skip
    assert "preference_agreement" not in watched(judged, answers=1)
    assert watched(Judged([], [], [], []), answers=2) == {}
