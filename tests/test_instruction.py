import json
import random
from dataclasses import replace

import pytest

from abyssal.data.families.instructions import WORDING, instruct
from abyssal.data.problems import make_problem
from abyssal.reward.instruction import RULES, WORD_COUNTS, check, fits, follow, instruction_followed
from abyssal.types import Message, Problem, Score


def says(content):
    return Message(role="assistant", content=content)


def asked(rule, *, answer="7", language="en", **more):
    metadata = {"instruction": {"rule": rule} | more}
    return Problem(prompt="?", answer=answer, language=language, verifier="instruction", metadata=metadata)


@pytest.mark.parametrize(
    ("problem", "right", "unruly"),
    [
        (
            asked("json"),
            ['{"answer": "7"}', '{"answer": 7}', ' {"answer":"7"} '],
            [
                "7",
                '{"answer": "7"',
                '{"answer": "7"} ok',
                '{"answer": "7", "a": 1}',
                '["7"]',
                '{"Answer": "7"}',
                '{"answer": true}',
                '{"answer": null}',
                "{'answer': '7'}",
            ],
        ),
        (asked("english"), ["The answer is 7."], ["The answer is 7", "the answer is 7.", "So the answer is 7."]),
        (asked("chinese"), ["答案是7。", "答案是 7。"], ["答案是7", "The answer is 7.", "答案是7。7"]),
        (asked("twice"), ["7, 7", "7,7", "7，7"], ["7", "7 7", "7, 7, 7", "7, 8"]),
        (
            asked("words", n=3, unit="words"),
            ["It is 7", "That makes 7", "It is 7."],
            ["7", "The answer is 7", "is 7", "7 7 7", "3 is 7"],
        ),
        (
            asked("words", n=4, unit="characters", language="zh"),
            ["答案是7", "答案是7。", "答案 是 7"],
            ["答案7", "答案就是7", "7777", "7"],
        ),
    ],
)
def test_rules_are_read_strictly(problem, right, unruly):
    for content in right:
        assert check(problem, says(content)) == (True, True), content
        assert instruction_followed(problem, says(content)) == Score(1.0)
    for content in unruly:
        assert not check(problem, says(content)).rule_holds, content
        assert instruction_followed(problem, says(content)) == Score(0.0)


@pytest.mark.parametrize(
    ("rule", "content"),
    [("json", '{"answer": "8"}'), ("english", "The answer is 8."), ("chinese", "答案是8。"), ("twice", "8, 8")],
)
def test_the_rule_can_hold_around_a_wrong_answer(rule, content):
    assert check(asked(rule), says(content)) == (True, False)
    assert instruction_followed(asked(rule), says(content)) == Score(0.0)


def test_an_answer_that_ignores_the_rule_can_still_be_right():
    assert check(asked("json"), says("7")) == (False, True)
    assert check(asked("json"), says("8")) == (False, False)


def test_to_follow_is_to_pass_for_every_rule_language_family_and_count():
    rng = random.Random(0)
    seen = set()
    for family in ("chain", "swaps", "nested", "ab"):
        for language in ("en", "zh"):
            for _ in range(60):
                problem = instruct(make_problem(family, 4, language, rng), rng)
                seen.add((problem.metadata["instruction"]["rule"], language, problem.metadata["instruction"].get("n")))
                assert instruction_followed(problem, says(follow(problem))) == Score(1.0)
    assert {rule for rule, _, _ in seen} == set(RULES) == set(WORDING)
    assert {n for _, _, n in seen if n} == set(WORD_COUNTS)


def test_an_instruction_keeps_key_answer_and_steps_and_speaks_the_questions_language():
    base = make_problem("chain", 4, "zh", random.Random(1))
    problem = instruct(base, random.Random(1), rule="json")
    assert (problem.key, problem.answer, problem.steps) == (base.key, base.answer, base.steps)
    assert problem.prompt == base.prompt + "\n用JSON回答，键为answer。"
    assert (problem.verifier, problem.family) == ("instruction", "instructions")
    assert json.loads(follow(problem)) == {"answer": base.answer}


def test_a_form_is_only_asked_for_where_it_can_hold_the_answer():
    swaps = make_problem("swaps", 4, "en", random.Random(0))
    with pytest.raises(ValueError, match="does not fit the answer"):
        instruct(swaps, random.Random(0), rule="words")
    assert not fits("twice", "1,5") and not fits("english", "1.5") and fits("json", "1,5")
    decimal = replace(swaps, answer="1.5")
    for seed in range(30):
        problem = instruct(decimal, random.Random(seed))
        assert instruction_followed(problem, says(follow(problem))) == Score(1.0)


@pytest.mark.parametrize(
    "metadata",
    [{}, {"instruction": "json"}, {"instruction": {"rule": "rhyme"}}, {"instruction": {"rule": "words", "n": 99}}],
)
def test_a_rule_that_is_none_of_ours_is_an_error_with_the_choices(metadata):
    with pytest.raises(ValueError, match="must be one of"):
        check(Problem(prompt="?", answer="7", metadata=metadata), says("7"))
