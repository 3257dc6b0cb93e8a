import ast
import random
from pathlib import Path

import pytest

from abyssal.data.problems import ProblemSource, make_problem, problem_at
from abyssal.data.worked import right_content
from abyssal.reward.verifiers import Verifiers
from abyssal.reward.verifiers import __file__ as verifiers_file
from abyssal.types import Message, Problem, Score


def says(content, thinking=None):
    return Message(role="assistant", content=content, thinking=thinking)


@pytest.fixture(scope="module")
def verifiers():
    with Verifiers(time_limit_s=20.0) as verifiers:
        yield verifiers


@pytest.fixture
def own_rewards(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def short(problem, message): return len(message.content) < 3\n"
        "def breaks(problem, message): return 1 / 0\n"
        "def nan(problem, message): return float('nan')\n"
        "def too_much(problem, message): return 7\n"
        "constant = 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("family", ["chain", "swaps", "nested", "ab", "backward", "reasoning_gym:gcd"])
def test_every_family_scores_its_own_answer_1_and_another_less(verifiers, family):
    rng = random.Random(0)
    for _ in range(5):
        problem = make_problem(family, 4, "zh", rng)
        assert verifiers.accuracy(problem, says(problem.answer, "然后")) == Score(1.0)
        assert verifiers.accuracy(problem, says(problem.answer + " " + problem.answer)).value < 1.0


def test_a_step_in_place_of_the_answer_is_wrong_though_it_has_its_value(verifiers):
    problem = Problem(prompt="?", answer="6", verifier="exact", steps=("2*3", "6"))
    assert verifiers.accuracy(problem, says("2*3")) == Score(0.0)


def test_only_what_follows_the_thinking_counts(verifiers):
    problem = Problem(prompt="?", answer="6", verifier="exact")
    assert verifiers.accuracy(problem, says("", "then 6")) == Score(0.0)
    assert verifiers.accuracy(problem, says("6", "then 5")) == Score(1.0)


def test_answer_uses_mathematics_and_instruction_its_rule(verifiers):
    assert verifiers.accuracy(Problem(prompt="?", answer="1/2"), says("0.5")) == Score(1.0)
    problem = problem_at(ProblemSource(instruction_share=1.0), 0, 0)
    assert verifiers.accuracy(problem, says(right_content(problem))) == Score(1.0)
    assert verifiers.accuracy(problem, says(problem.answer)) == Score(0.0)


def test_a_function_of_the_users_own(verifiers, own_rewards):
    problem = Problem(prompt="?", answer="", verifier="my_rewards:short")
    assert verifiers.accuracy(problem, says("ab")) == Score(1.0)
    assert verifiers.accuracy(problem, says("abc")) == Score(0.0)


@pytest.mark.parametrize(("name", "why"), [("breaks", "ZeroDivisionError"), ("nan", "nan"), ("too_much", "7")])
def test_a_function_that_fails_is_reported_and_never_a_zero(verifiers, own_rewards, name, why):
    score = verifiers.accuracy(Problem(prompt="?", answer="", verifier=f"my_rewards:{name}"), says("a"))
    assert score.value is None and why in score.error


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("no_module_of_that_name:f", "PYTHONPATH"),
        ("my_rewards:absent", "has no function absent"),
        ("my_rewards:constant", "has no function constant"),
        ("answr", "choose exact, answer"),
        (":f", "choose exact, answer"),
    ],
)
def test_a_name_that_leads_nowhere_is_an_error_with_the_remedy(verifiers, own_rewards, name, why):
    with pytest.raises(ValueError, match=why):
        verifiers.check(name)
    with pytest.raises(ValueError, match=why):
        verifiers.accuracy(Problem(prompt="?", answer="", verifier=name), says("a"))


def test_names_that_work_pass_the_check(verifiers, own_rewards):
    for name in ("exact", "answer", "instruction", "reasoning_gym:gcd", "my_rewards:short"):
        verifiers.check(name)


def test_a_gym_problem_without_its_entry_says_what_is_missing(verifiers):
    with pytest.raises(ValueError, match="entry"):
        verifiers.accuracy(Problem(prompt="?", answer="1", verifier="reasoning_gym:gcd"), says("1"))


def test_the_room_does_not_import_torch():
    for path in Path(verifiers_file).parent.glob("*.py"):
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        names = [alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names]
        assert not [name for name in names if name.startswith("torch")], path
        assert "from torch" not in path.read_text(encoding="utf-8"), path
