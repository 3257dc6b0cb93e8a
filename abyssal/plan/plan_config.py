"""What a plan is told beside the recipe: machine, lengths, prices, and whether what cannot fit is refused.

It is the recipe's section `[plan]`. Everything left out is worked out from the other sections.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from abyssal.plan.serving import ServingLayout
from abyssal.plan.weight_forms import weight_form


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Lengths are means, in tokens: a stage's `max_tokens` is a limit that few answers reach."""

    machine: str = ""  # a name in machines/ or a path; "": what --measure wrote on this machine, or else the laptop
    devices: int = 0  # so many of the machine's; 0: all of them
    stages: tuple[str, ...] = ()  # that are planned; (): every stage that trains or draws answers
    prompt_tokens: int = 64  # of a problem; ours take about that
    # stage -> of an answer, over equal parts of its steps: zero = [1500, 5000]; else half of its max_tokens
    answer_tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    conversations: dict[str, int] = field(default_factory=dict)  # stage -> that SFT has, where they come from a file
    conversation_tokens: int = 0  # of one of them, thinking included; 0: prompt and answer together
    rollout: ServingLayout = field(default_factory=ServingLayout)  # units that draw answers, on more than one device
    rollout_weights: str = "bfloat16"  # there; fp8 for V3 and R1
    draft_acceptance: float = 0.0  # of MTP's drafts there; 0: none are made
    price_usd_per_device_hour: float = 0.0  # instead of the machine's; 0: the machine's
    given_device_hours: float = 0.0  # an input, not planned: added to the whole as it is
    given_are: str = ""  # what those hours are of, and where the figure is from
    refuse: bool = True  # do not start a stage that cannot fit into memory

    def __post_init__(self) -> None:
        for name, least in (("devices", 0), ("prompt_tokens", 1), ("conversation_tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"plan.{name}={getattr(self, name)} must be {least} or more")
        for name in ("price_usd_per_device_hour", "given_device_hours"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"plan.{name}={getattr(self, name)} must be 0 or more")
        for stage, lengths in self.answer_tokens.items():
            if not lengths or min(lengths) < 1:
                raise ValueError(f"plan.answer_tokens.{stage}={lengths} must be means of at least 1 token: [1500]")
        if not 0 <= self.draft_acceptance <= 1:
            raise ValueError(f"plan.draft_acceptance={self.draft_acceptance} is a share; use 0 to 1")
        weight_form(self.rollout_weights)
        if bool(self.given_device_hours) != bool(self.given_are):
            raise ValueError(
                f"plan.given_device_hours={self.given_device_hours} and given_are={self.given_are!r}: hours that are "
                f"an input say what they are of; set both or neither"
            )
