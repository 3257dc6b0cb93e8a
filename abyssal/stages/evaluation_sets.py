"""The evaluation sets that a recipe uses, as texts: what no training document may hold a part of.

Owns which problems are asked where, as the stages that ask them do. Does not own the search (data/decontaminate.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from abyssal.data.preferences import request_at
from abyssal.stages.measure import FIRST_MEASURED, never_trained
from abyssal.stages.run import Run


def evaluation_sets(run: Run, *, seeds: Mapping[str, int], first_pair: int) -> dict[str, list[str]]:
    """The questions by the name of their set: a user's own held-out file, or the generators' problems.

    `seeds` are those of the stages `eval` and `align`, `first_pair` the place of the reward model's first request.
    """
    recipe, stream = run.recipe, run.stream()
    sets: dict[str, list[str]] = {}
    if stream.own_held_out:
        sets[recipe.rl_data.held_out] = [problem.prompt for problem in stream.own_held_out]
    else:
        sets["eval"] = [stream.at(FIRST_MEASURED + i, "held_out").prompt for i in range(recipe.eval.problems)]
        strangers = never_trained(recipe.data.problems, recipe.eval, seeds["eval"])
        sets["never trained"] = [problem.prompt for problem in strangers]
        for name in ("zero", "reason", "align", "student_rl"):
            config = getattr(recipe, name)
            asked = run.stream(config.instruction_share)
            sets[f"{name} held-out"] = [asked.at(i, "held_out").prompt for i in range(config.eval_problems)]
        n_asked = recipe.on_policy.eval_problems
        sets["on_policy held-out"] = [stream.at(i, "held_out").prompt for i in range(n_asked)]
    if recipe.align.preference_share:
        places = range(first_pair, first_pair + recipe.reward_model.held_out_requests)
        pairs = (request_at(recipe.data.problems, seeds["align"], place, "held_out") for place in places)
        sets["reward model"] = [problem.prompt for problem in pairs]
        watched = (stream.request(i, "held_out") for i in range(recipe.align.eval_problems))
        sets["align requests"] = [problem.prompt for problem in watched]
    return sets
