"""The import law and the budgets: rooms look down only, files stay small, names are addresses, nothing is global."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "abyssal"
FILES = sorted(ROOT.rglob("*.py"))

# a room may import strictly lower rooms; equal ones never know each other
LEVEL = {
    "types": 0, "record": 0, "progress": 0, "machine": 0, "kernels": 0, "typed_toml": 0,
    "tokens": 1, "model": 1, "loss": 1, "optim": 1, "reward": 1,
    "data": 2, "checkpoint": 2, "parallel": 2, "engine": 2,
    "rollout": 3, "plan": 3, "surgery": 3,
    "lm": 4, "evals": 4,
    "stages": 5, "serve": 5, "talk": 5,
    "commands": 6,
    "cli": 7, "__init__": 7, "__main__": 8,
}  # fmt: skip
MAX_LINES = 500


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def modules_used(source: str) -> set[str]:
    """Every module an import statement names, wherever it stands. `from a import b` counts as a and as a.b."""
    used = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"line {node.lineno}: write the full name, not a relative import")
            used |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return used


def rooms_used(source: str) -> set[str]:
    """The rooms that a source imports. A name that `abyssal` itself offers (`load`) lives in `__init__`."""
    rooms = set()
    for module in modules_used(source):
        package, _, rest = module.partition(".")
        if package == "abyssal" and rest:
            room = rest.partition(".")[0]
            rooms.add(room if room in LEVEL else "__init__")
        elif module == "abyssal" and "import abyssal\n" in source + "\n":
            rooms.add("__init__")
    return rooms


def packages_used(source: str) -> set[str]:
    return {module.partition(".")[0] for module in modules_used(source)}


def test_the_reader_of_imports_sees_every_form():
    source = (
        "from abyssal.types import Message\n"
        "import abyssal.data.pack as pack\n"
        "def f():\n"
        "    from abyssal.stages import rl\n"
        "    from abyssal import engine, load\n"
    )
    assert rooms_used(source) == {"types", "data", "stages", "engine", "__init__"}
    assert rooms_used("import abyssal\n") == {"__init__"}
    assert rooms_used("import torch\nfrom json import load\n") == set()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_only_look_down(path: Path):
    room = room_of(path)
    assert room in LEVEL, f"{path} is in no room of the law; give it a level"
    for other in rooms_used(path.read_text(encoding="utf-8")) - {room}:
        assert LEVEL[other] < LEVEL[room], f"{path}: {room} must not import {other}"


def test_files_stay_small_and_uniquely_named():
    paths = [path for path in FILES if path.name != "__init__.py"]
    long = {path.name: n for path in paths if (n := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES}
    assert not long, f"more than {MAX_LINES} lines: {long}"
    twice = [name for name, n in Counter(path.name for path in paths).items() if n > 1]
    assert not twice, f"a name is an address, these have two: {twice}"


def test_the_package_never_imports_transformers():
    users = [str(path) for path in FILES if "transformers" in packages_used(path.read_text(encoding="utf-8"))]
    assert not users


def test_reward_knows_no_torch():
    users = [
        str(path)
        for path in FILES
        if room_of(path) == "reward" and "torch" in packages_used(path.read_text(encoding="utf-8"))
    ]
    assert not users


def test_types_needs_torch_for_annotations_only():
    """Rewards import `types`; so there torch may be named under TYPE_CHECKING and nowhere else."""
    tree = ast.parse((ROOT / "types.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        assert "torch" not in packages_used(ast.unparse(node)), ast.unparse(node)


def test_nothing_is_global():
    """No function rebinds a module variable: state is handed over as arguments."""
    users = [
        f"{path}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Global)
    ]
    assert not users
