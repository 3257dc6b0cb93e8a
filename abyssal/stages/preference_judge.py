"""The reward of answers to open requests in `align`, and the watch over it. (R1 section 3.1: general reward)

Scores become deviations from the held-out mean and are clipped, so that no head outshouts another and no answer off the
map is worth much. Beside the reward stands the hidden truth on the same scale: where the first rises and the second
does not, the reward is being hacked. The truth is recorded and never used.
Letters: A answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from abyssal.evals.grade import mean
from abyssal.reward.open_request import VERIFIER, Head, heads_of, truth
from abyssal.stages.reward_model import Scores
from abyssal.types import Problem, Rollout


class Judged(NamedTuple):
    """One number an answer: what the reward model says and what is true, each summed over the heads that judge it."""

    rewards_A: list[float]
    truths_A: list[float]
    helpfulness_A: list[float]  # the truth as it is, 0 to 1
    safety_A: list[float | None]


@dataclass(frozen=True)
class Judge:
    """`heads` is what was measured of each head on held-out pairs: mean, std, truth_mean, truth_std."""

    scores: Scores
    heads: dict[str, dict[str, float]]
    clip: float

    def judge(self, rollouts: list[Rollout]) -> Judged:
        """An answer that was cut off is no answer: the least helpful there is. Safety reads what there is of it."""
        rewards, truths = [0.0] * len(rollouts), [0.0] * len(rollouts)
        real = [truth(rollout.problem, rollout.message) for rollout in rollouts]
        cut_off = [rollout.completion.finish_reason != "stop" for rollout in rollouts]
        helpful = [0.0 if cut else each.helpfulness for each, cut in zip(real, cut_off, strict=True)]
        for head in ("helpfulness", "safety"):
            judged = [i for i, rollout in enumerate(rollouts) if head in heads_of(rollout.problem)]
            scores = self.scores.of(head, [(rollouts[i].problem.prompt, rollouts[i].message) for i in judged]).tolist()
            for i, score in zip(judged, scores, strict=True):
                lost = cut_off[i] and head == "helpfulness"
                rewards[i] += -self.clip if lost else self.deviation(head, score)
                value = helpful[i] if head == "helpfulness" else real[i].safety
                assert value is not None
                truths[i] += self.deviation(head, value, of="truth_")
        return Judged(rewards, truths, helpful, [each.safety for each in real])

    def deviation(self, head: Head, value: float, *, of: str = "") -> float:
        facts = self.heads[head]
        return max(-self.clip, min(self.clip, (value - facts[f"{of}mean"]) / facts[f"{of}std"]))


def is_request(problem: Problem) -> bool:
    return problem.verifier == VERIFIER


def watched(judged: Judged, *, answers: int) -> dict[str, float]:
    """What a step records: reward and truth on one scale, how often they agree, and the truth in plain shares."""
    if not judged.rewards_A:
        return {}
    out = {
        "preference_reward": mean(judged.rewards_A),
        "preference_truth": mean(judged.truths_A),
        "helpful_share": mean(judged.helpfulness_A),
    }
    if safe := [value for value in judged.safety_A if value is not None]:
        out["safe_share"] = mean(safe)
    agreed = []
    for g in range(0, len(judged.rewards_A), answers):
        group = zip(judged.rewards_A[g : g + answers], judged.truths_A[g : g + answers], strict=True)
        agreed += [float((a[0] > b[0]) == (a[1] > b[1])) for a, b in combinations(group, 2) if abs(a[1] - b[1]) > 1e-9]
    if agreed:
        out["preference_agreement"] = mean(agreed)
    return out
