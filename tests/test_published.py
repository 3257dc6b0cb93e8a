"""The README's table of published figures: every line is planned again, and says what it says there.

Arithmetic must come out exactly. Of what was measured the README holds the deviation: a change of the plan shows as a
change of the README (`python bench/tables.py`), never in silence.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from abyssal.commands.plan_tables import published_rows
from abyssal.plan.every_published import every_published
from abyssal.plan.published import Published

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
TABLE = README.split("<!-- table: published -->\n")[1].split("<!-- end -->")[0].splitlines()[2:]
NAMES = [line.split(" | ")[0].removeprefix("| ") for line in TABLE]


@pytest.fixture(scope="module")
def lines() -> dict[str, Published]:
    return {line.name: line for line in every_published()}


def test_the_readme_has_every_line_once(lines: dict[str, Published]):
    assert NAMES == list(lines) and len(set(NAMES)) == len(every_published())


@pytest.mark.parametrize("name", NAMES)
def test_a_line_comes_out_as_the_readme_has_it(name: str, lines: dict[str, Published]):
    line = lines[name]
    assert line.source
    if line.kind == "arithmetic":
        assert line.is_exact, f"{name}: {line.planned} is not {line.published}"
    [row] = published_rows([line])
    assert f"| {' | '.join(row)} |" == TABLE[NAMES.index(name)], "python bench/tables.py writes it anew"
