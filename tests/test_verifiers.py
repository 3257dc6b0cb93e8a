import ast
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from abyssal.data.problems import ProblemSource, make_problem, problem_at
from abyssal.data.worked import right_content
from abyssal.reward.verifiers import Verifiers
from abyssal.reward.verifiers import __file__ as verifiers_file
from abyssal.reward.worker_process import kind_of
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
        "def text(problem, message): return '1'\n"
        "def nothing(problem, message): pass\n"
        "def hangs(problem, message):\n    while True: pass\n"
        "def exits(problem, message):\n    import sys; sys.exit(0)\n"
        "def vanishes(problem, message):\n    import os; os._exit(3)\n"
        "def imports(problem, message):\n    import no_such_package\n"
        "def unsure(problem, message):\n    from abyssal.types import Score; return Score(None, 'no idea')\n"
        "def as_asked(problem, message):\n    return hangs(0, 0) if message.content == 'hang' else vanishes(0, 0) "
        "if message.content == 'die' else message.content == problem.answer\n"
        "def chatters(problem, message):\n    import sys, os; print('x' * 100_000); sys.stdout.flush(); "
        "os.write(1, b'y' * 100_000); return not sys.stdin.read()\n"
        "def counts(problem, message, calls=[]):\n    calls.append(1); return len(calls) / 10\n"
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


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("breaks", "raised: my_rewards:breaks: ZeroDivisionError: division by zero"),
        ("nan", "returned: my_rewards:nan: returned nan, not a number from 0 to 1"),
        ("too_much", "returned: my_rewards:too_much: returned 7, not a number from 0 to 1"),
        ("text", "returned: my_rewards:text: returned '1', not a number from 0 to 1"),
        ("nothing", "returned: my_rewards:nothing: returned None, not a number from 0 to 1"),
        ("exits", "raised: my_rewards:exits: SystemExit: 0"),
        ("vanishes", "died: my_rewards:vanishes: its process died (exit status 3)"),
        ("imports", "raised: my_rewards:imports: ModuleNotFoundError: No module named 'no_such_package'"),
        ("unsure", "unsure: my_rewards:unsure: no idea"),
    ],
)
def test_a_function_that_fails_is_reported_and_never_a_zero(verifiers, own_rewards, name, why):
    score = verifiers.accuracy(Problem(prompt="?", answer="", verifier=f"my_rewards:{name}"), says("a"))
    assert score == Score(None, why)
    assert kind_of(why) == why.partition(":")[0]


def test_of_many_answers_those_that_hang_or_kill_are_named_and_none_of_the_others_is_lost(own_rewards):
    problem = Problem(prompt="?", answer="a", verifier="my_rewards:as_asked")
    contents = ["a", "b", "hang", "a ", "die", "c"]
    with Verifiers(own_limit_s=2.0) as verifiers:
        scores = verifiers.accuracies([(problem, says(content)) for content in contents])
        assert verifiers.n_restarts == 2
    assert [score.value for score in scores] == [1.0, 0.0, None, 0.0, None, 0.0]
    assert scores[2].error == "timeout: my_rewards:as_asked: took more than 2 s"
    assert scores[4].error == "died: my_rewards:as_asked: its process died (exit status 3)"


def test_what_a_function_prints_or_reads_does_not_reach_our_pipes(verifiers, own_rewards):
    problem = Problem(prompt="?", answer="", verifier="my_rewards:chatters")
    assert verifiers.accuracies([(problem, says(f"{i}")) for i in range(3)]) == [Score(1.0)] * 3


def test_one_process_answers_all_and_keeps_what_it_keeps_and_equal_answers_are_asked_once(own_rewards):
    problem = Problem(prompt="?", answer="", verifier="my_rewards:counts")
    with Verifiers() as verifiers:
        scores = verifiers.accuracies([(problem, says(content)) for content in "abab"])
        assert scores == [Score(0.1), Score(0.2), Score(0.1), Score(0.2)]
        assert verifiers.accuracy(problem, says("c")) == Score(0.3)
        assert verifiers.n_restarts == 0


def test_ours_and_the_users_own_may_be_mixed(verifiers, own_rewards):
    own = Problem(prompt="?", answer="", verifier="my_rewards:short")
    ours = Problem(prompt="?", answer="6", verifier="exact")
    asked = [(own, says("a")), (ours, says("6")), (own, says("long")), (ours, says("7"))]
    assert verifiers.accuracies(asked) == [Score(1.0), Score(1.0), Score(0.0), Score(0.0)]


def test_a_module_that_cannot_be_imported_is_refused_before_the_first_step(verifiers, own_rewards, tmp_path):
    (tmp_path / "needs_more.py").write_text("import no_such_package\ndef f(problem, message): return 1\n")
    with pytest.raises(ValueError, match="No module named 'no_such_package'; put its folder on PYTHONPATH and install"):
        verifiers.check("needs_more:f")


def test_a_process_that_is_gone_leaves_no_worker(own_rewards):
    """Killed while its reward hangs: the worker notices by itself, though nobody is left to end it."""
    script = (
        "import os, signal, sys, threading\n"
        "from abyssal.reward.verifiers import Verifiers\n"
        "from abyssal.types import Message, Problem\n"
        "verifiers = Verifiers(own_limit_s=0.5)\n"
        "verifiers.check('my_rewards:hangs')\n"
        "print(verifiers._own.worker.process.pid, flush=True)\n"
        "verifiers._own.time_limit_s = 3.0\n"
        "threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()\n"
        "verifiers.accuracy(Problem(prompt='?', answer='', verifier='my_rewards:hangs'), "
        "Message(role='assistant', content='a'))\n"
    )
    path = os.pathsep.join([sys.path[0], str(Path(verifiers_file).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    worker = int(done.stdout)
    for _ in range(300):
        if not alive(worker):
            return
        time.sleep(0.1)
    raise AssertionError(f"worker {worker} goes on")


def alive(pid: int) -> bool:
    """A zombie waits only for whoever must read its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


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
