"""docs/life_of_a_request.md is true as far as a machine can tell: its files exist, and its names stand in them."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/life_of_a_request.md"
SECTIONS = [section for section in PAGE.read_text(encoding="utf-8").split("\n## ")]


@cache
def names_in(path: Path) -> frozenset[str]:
    """Classes, functions, constants, and methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return frozenset(names)


def told(section: str) -> tuple[list[Path], list[str]]:
    """The files that a section names, and the names that must stand in one of them."""
    files, names = [], []
    for word in re.findall(r"`([^`]+)`", section):
        if "/" in word or word.endswith(".py"):
            files.append(ROOT / word if word.startswith("tests/") else ROOT / "abyssal" / word)
        else:
            names.append(word)
    return files, names


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.splitlines()[0])
def test_files_and_names_exist(section: str):
    files, names = told(section)
    missing = [file for file in files if not file.exists()]
    assert files and not missing
    known = frozenset().union(*(names_in(file) for file in files if file.suffix == ".py"))
    assert [name for name in names if name not in known] == []


def test_a_name_that_is_not_there_is_missed():
    files, names = told("`Engine.step` in `engine/engine.py`, `Engine.leap`, `engine/gone.py`")
    assert [file.exists() for file in files] == [True, False]
    assert [name in names_in(files[0]) for name in names] == [True, False]


def test_every_file_of_the_engine_has_its_place_in_the_story():
    page = PAGE.read_text(encoding="utf-8")
    files = {path.name for path in (ROOT / "abyssal/engine").glob("*.py")} - {"__init__.py"}
    assert {name for name in files if name not in page} == set()
