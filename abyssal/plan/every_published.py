"""Every published figure beside the plan's, in the order of the README's table."""

from __future__ import annotations

from abyssal.plan.published import Published
from abyssal.plan.published_rl import published_rl
from abyssal.plan.published_schedules import published_schedules
from abyssal.plan.published_serving import published_serving
from abyssal.plan.published_training import published_training


def every_published() -> list[Published]:
    return [*published_training(), *published_schedules(), *published_rl(), *published_serving()]
