import random
from collections import Counter

import pytest

from abyssal.data.held_out import is_held_out
from abyssal.data.problems import FAMILIES, ProblemSource, make_problem, problem_at

TRAINED = {"chain": 1.0, "swaps": 2.0, "nested": 1.0, "ab": 1.0}


def test_a_problem_reads_as_its_phrase_and_its_state():
    problem = make_problem("chain", 2, "en", random.Random(0))
    state = problem.key.removeprefix("chain|")
    assert problem.prompt == f"Left to right modulo 5: {state}"
    assert (problem.verifier, problem.level, problem.family, problem.language) == ("exact", 2, "chain", "en")
    assert make_problem("chain", 2, "zh", random.Random(0)).prompt == f"从左到右模5：{state}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_changes_the_wording_and_nothing_else(family):
    english = make_problem(family, 4, "en", random.Random(5))
    chinese = make_problem(family, 4, "zh", random.Random(5))
    assert english.prompt != chinese.prompt
    assert (english.key, english.steps, english.answer) == (chinese.key, chinese.steps, chinese.answer)


def test_problem_at_depends_on_seed_index_and_split_alone():
    source = ProblemSource(families=TRAINED, instruction_share=0.3)
    forward = [problem_at(source, 7, index) for index in range(60)]
    random.seed(99)  # nothing global takes part
    assert [problem_at(source, 7, index) for index in reversed(range(60))] == forward[::-1]
    assert problem_at(source, 7, 0, "held_out") != forward[0] != problem_at(source, 8, 0)
    assert len({problem.key for problem in forward}) > 50


def test_train_and_held_out_share_no_instance():
    source = ProblemSource(families=TRAINED, levels=(2, 4), held_out=0.2)
    train = {problem_at(source, 0, index).key for index in range(1500)}
    held_out = {problem_at(source, 1, index, "held_out").key for index in range(300)}
    assert not train & held_out
    assert all(is_held_out(key, 0.2) for key in held_out) and not any(is_held_out(key, 0.2) for key in train)


def test_an_instance_held_out_stays_so_under_an_instruction():
    source = ProblemSource(instruction_share=1.0)
    for index in range(50):
        problem = problem_at(source, 0, index, "held_out")
        assert problem.verifier == "instruction" and is_held_out(problem.key, source.held_out)


def test_weights_levels_and_languages_are_as_asked():
    source = ProblemSource(
        families={"chain": 3.0, "swaps": 1.0, "nested": 0.0},
        levels=(3, 4),
        levels_of={"swaps": (6, 6)},
        languages={"en": 1.0, "zh": 3.0},
    )
    problems = [problem_at(source, 0, index) for index in range(2000)]
    families = Counter(problem.family for problem in problems)
    assert set(families) == {"chain", "swaps"} and 0.70 < families["chain"] / 2000 < 0.80
    assert {(p.family, p.level) for p in problems} == {("chain", 3), ("chain", 4), ("swaps", 6)}
    assert 0.70 < sum(problem.language == "zh" for problem in problems) / 2000 < 0.80


def test_backward_can_be_evaluated_and_never_trained_on():
    source = ProblemSource(families={"chain": 1.0, "backward": 1.0})
    assert "backward" in {problem_at(source, 0, index, "held_out").family for index in range(20)}
    for index in range(20):  # whichever family the index would draw
        with pytest.raises(ValueError, match="kept out of training"):
            problem_at(source, 0, index)


def test_reasoning_gym_tasks_stand_beside_ours():
    source = ProblemSource(families={"reasoning_gym:gcd": 1.0})
    problem = problem_at(source, 0, 0)
    assert problem.family == "reasoning_gym:gcd" and problem.prompt == problem.metadata["entry"]["question"]
    assert problem.language == "en" and problem == problem_at(source, 0, 0)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"families": {"chains": 1.0}}, "no family 'chains'; choose among chain"),
        ({"families": {}}, "cannot be drawn from"),
        ({"families": {"chain": 0.0}}, "cannot be drawn from"),
        ({"languages": {"en": 1.0, "fr": 1.0}}, "choose among en, zh"),
        ({"levels": (5, 3)}, "levels"),
        ({"levels_of": {"swaps": (3, 4)}, "families": {"chain": 1.0}}, "levels_of names"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"instruction_share": -0.1}, "instruction_share=-0.1"),
    ],
)
def test_a_source_that_cannot_work_says_so_at_once(settings, why):
    with pytest.raises(ValueError, match=why):
        ProblemSource(**settings)


def test_a_split_that_holds_nothing_says_so():
    with pytest.raises(ValueError, match="gave no held_out problem"):
        problem_at(ProblemSource(held_out=0.0), 0, 0, "held_out")
    with pytest.raises(ValueError, match="split='test'"):
        problem_at(ProblemSource(), 0, 0, "test")
