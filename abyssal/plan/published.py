"""A published figure beside what the plan makes of the same case. Owns the comparison, no figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Published:
    """`arithmetic` must come out exactly; `measured` was measured by its publisher, and its miss is shown."""

    name: str
    unit: str
    published: float
    planned: float
    kind: Literal["arithmetic", "measured"]
    source: str  # paper and section or table, or repository, file and date
    inputs: str = ""  # what the plan was told that is no shape and no machine figure
    digits: int = 0  # decimals that the source gives, and so that an arithmetic line is held to

    @property
    def deviation(self) -> float:
        """(planned - published) / published."""
        return self.planned / self.published - 1

    @property
    def is_exact(self) -> bool:
        """Equal once rounded as the source rounds."""
        return round(self.planned, self.digits) == self.published
