"""Every published figure beside the plan's, in the order of the README's table."""

from __future__ import annotations

from abyssal.plan.published import Published
from abyssal.plan.published_rl import published_rl
from abyssal.plan.published_schedules import published_schedules
from abyssal.plan.published_serving import published_serving


def every_published() -> list[Published]:
    return [*published_schedules(), *published_rl(), *published_serving()]
