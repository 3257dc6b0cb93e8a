"""What a plan is told beside the recipe: machine, lengths, prices, and whether what cannot fit is refused.

It is the recipe's section `[plan]`. Everything left out is worked out from the other sections.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Lengths are means, in tokens: a stage's `max_tokens` is a limit that few answers reach."""

    machine: str = ""  # a name in machines/ or a path; "": what --measure wrote on this machine, or else the laptop
    devices: int = 0  # so many of the machine's; 0: all of them
    stages: tuple[str, ...] = ()  # that are planned; (): every stage that trains or draws answers
    prompt_tokens: int = 0  # of a problem; 0: 64, about what our own problems take
    answer_tokens: dict[str, int] = field(default_factory=dict)  # stage -> of an answer; else half of its max_tokens
    conversation_tokens: int = 0  # of what SFT is trained on, thinking included; 0: prompt and answer together
    price_usd_per_device_hour: float = 0.0  # instead of the machine's; 0: the machine's
    given_device_hours: float = 0.0  # an input, not planned: added to the whole as it is
    given_are: str = ""  # what those hours are of, and where the figure is from
    refuse: bool = True  # do not start a stage that cannot fit into memory

    def __post_init__(self) -> None:
        for name in ("devices", "prompt_tokens", "conversation_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"plan.{name}={getattr(self, name)} is less than none; use 0 to have it worked out")
        for name in ("price_usd_per_device_hour", "given_device_hours"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"plan.{name}={getattr(self, name)} must be 0 or more")
        if bad := [stage for stage, length in self.answer_tokens.items() if length < 1]:
            raise ValueError(f"plan.answer_tokens.{bad[0]}={self.answer_tokens[bad[0]]} must be at least 1 token")
        if bool(self.given_device_hours) != bool(self.given_are):
            raise ValueError(
                f"plan.given_device_hours={self.given_device_hours} and given_are={self.given_are!r}: hours that are "
                f"an input say what they are of; set both or neither"
            )
