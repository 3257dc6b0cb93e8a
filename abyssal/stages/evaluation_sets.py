"""The evaluation sets that a recipe uses, as texts: what no training document may hold a part of.

Owns which problems are asked where, as the stages that ask them do. Does not own the search (data/decontaminate.py).
"""

from __future__ import annotations

from abyssal.stages.measure import FIRST_MEASURED, never_trained
from abyssal.stages.run import Run


def evaluation_sets(run: Run, *, eval_seed: int) -> dict[str, list[str]]:
    """The questions by the name of their set: a user's own held-out file, or the generators' problems.

    `eval_seed` is the seed of the stage `eval`.
    """
    recipe, stream = run.recipe, run.stream()
    if stream.own_held_out:
        return {recipe.rl_data.held_out: [problem.prompt for problem in stream.own_held_out]}
    sets = {
        "eval": [stream.at(FIRST_MEASURED + i, "held_out").prompt for i in range(recipe.eval.problems)],
        "never trained": [p.prompt for p in never_trained(recipe.data.problems, recipe.eval, eval_seed)],
    }
    for name, config in (("zero", recipe.zero), ("reason", recipe.reason), ("align", recipe.align)):
        asked = run.stream(config.instruction_share)
        sets[f"{name} held-out"] = [asked.at(i, "held_out").prompt for i in range(config.eval_problems)]
    return sets
