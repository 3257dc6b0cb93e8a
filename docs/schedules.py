"""Draw docs/schedules.svg, stages of V3 under three schedules on one scale of time: python docs/schedules.py

The seconds of a stage are those of `abyssal plan runs/v3.toml`. Ranks and micro-batches are those of DeepSeek's own
figure of DualPipe, few enough for every number to be read.
"""

import re
from pathlib import Path

from abyssal.plan.draw_schedule import draw_schedule
from abyssal.plan.machine_file import read_machine
from abyssal.plan.schedules import ScheduleName
from abyssal.plan.simulate import simulate
from abyssal.plan.training import plan_training
from abyssal.stages.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[1]
SCHEDULES: tuple[ScheduleName, ...] = ("1f1b", "zb1p", "dualpipe")
N_RANKS, N_MICRO_BATCHES = 8, 20
WIDTH, GAP = 960, 10  # pixels


def main() -> None:
    recipe = read_recipe(ROOT / "runs" / "v3.toml")
    plan = plan_training(
        recipe.model,
        machine=read_machine(recipe.plan.machine),
        layout=recipe.parallel,
        row_len=recipe.pretrain.row_len,
        batch_rows=recipe.pretrain.rows,
    )
    stage = plan.timeline.times[recipe.parallel.pp // 2]  # four layers with experts, as most stages are
    lines = [simulate(name, n_stages=N_RANKS, n_micro_batches=N_MICRO_BATCHES, times=stage) for name in SCHEDULES]
    longest = max(line.step_seconds for line in lines)
    parts, y = [], 0.0
    for line in lines:
        picture = draw_schedule(line, width=WIDTH, until_seconds=longest)
        height = float(re.search(r'viewBox="0 0 \d+ ([\d.]+)"', picture)[1])
        parts.append(picture.replace("<svg ", f'<svg y="{y:g}" width="{WIDTH}" height="{height:g}" ', 1))
        y += height + GAP
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y - GAP:g}">'
    (ROOT / "docs" / "schedules.svg").write_text(f"{opening}{''.join(parts)}</svg>\n", encoding="utf-8")


if __name__ == "__main__":
    main()
