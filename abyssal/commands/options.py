"""Options of a command: a frozen dataclass read by tyro, an error of one line."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import tyro


def parsed(kind: type[Any], *, prog: str, **options: Any) -> Any:
    """Options read by tyro; what it says of a wrong one, a box of many lines, becomes one."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=prog, **options)
    except SystemExit as end:
        if not end.code:  # --help
            raise
    lines = [line.strip("│ ") for line in said.getvalue().splitlines() if not line.startswith(("╭", "╰"))]
    rule = next((i for i, line in enumerate(lines) if line.startswith("──")), len(lines))
    raise ValueError(f"{' '.join(lines[:rule])}; {prog} --help lists what there is")
