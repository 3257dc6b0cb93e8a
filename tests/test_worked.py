import random
from collections import Counter

import pytest

from abyssal.data.problems import ProblemSource, make_problem, problem_at
from abyssal.data.worked import (
    CONNECTIVES,
    WebMix,
    in_one_language,
    right_content,
    web_document,
    write_thinking,
    wrong_answer,
)
from abyssal.types import Problem

CHAIN = Problem(prompt="?", answer="0", steps=("2*3-4+8", "6-4+8", "2+8", "0"))


def states_of(thinking):
    """The lines without their connectives, and the languages of those."""
    states, languages = [], []
    for line in thinking.split("\n"):
        language, word = next((k, w) for k, words in CONNECTIVES.items() for w in words if line.startswith(w))
        states.append(line.removeprefix(word).strip())
        languages.append(language)
    return states, languages


@pytest.mark.parametrize("words", ["en", "zh"])
def test_full_writes_every_state_on_a_line_of_its_own(words):
    thinking = write_thinking(CHAIN, words=words, brevity="full", rng=random.Random(0))
    assert states_of(thinking) == (list(CHAIN.steps), [words] * 4)


def test_brief_leaves_out_every_second_state_and_keeps_the_last():
    thinking = write_thinking(CHAIN, words="en", brevity="brief", rng=random.Random(0))
    assert states_of(thinking)[0] == ["6-4+8", "0"]
    odd = Problem(prompt="?", answer="0", steps=CHAIN.steps[1:])
    assert states_of(write_thinking(odd, words="en", brevity="brief", rng=random.Random(0)))[0] == ["6-4+8", "0"]
    one = Problem(prompt="?", answer="0", steps=("0",))
    assert states_of(write_thinking(one, words="en", brevity="brief", rng=random.Random(0)))[0] == ["0"]


def test_mixed_has_both_languages_in_every_solution_of_two_lines_or_more():
    for seed in range(100):
        for brevity in ("full", "brief"):
            thinking = write_thinking(CHAIN, words="mixed", brevity=brevity, rng=random.Random(seed))
            assert set(states_of(thinking)[1]) == {"en", "zh"}


def test_the_web_mix_has_the_shares_it_was_asked_for():
    mix = WebMix(worked_share=0.4, brief_share=0.3, mixed_share=0.2, zh_words_share=0.5)
    rng, source, n = random.Random(0), ProblemSource(), 3000
    seen = Counter()
    for index in range(n):
        problem = problem_at(source, 0, index)
        question, answer = web_document(problem, rng, mix)
        assert (question.role, question.content, answer.role) == ("user", problem.prompt, "assistant")
        assert answer.content == problem.answer
        if answer.thinking is None:
            continue
        states, languages = states_of(answer.thinking)
        assert states[-1] == problem.answer
        seen["worked"] += 1
        seen["brief"] += len(states) < len(problem.steps)
        seen["mixed"] += len(set(languages)) == 2
        seen["zh"] += set(languages) == {"zh"}
        seen["same"] += set(languages) == {problem.language}
    assert 0.36 < seen["worked"] / n < 0.44
    assert 0.25 < seen["brief"] / seen["worked"] < 0.35
    assert 0.16 < seen["mixed"] / seen["worked"] < 0.24
    for share in ("zh", "same"):  # language of the words does not follow the question's
        assert 0.35 < seen[share] / seen["worked"] < 0.45


def test_wrong_direct_answers_only_where_asked_for_and_never_by_chance_right():
    rng = random.Random(0)
    mix = WebMix(worked_share=0.0, wrong_share=1.0)
    for index in range(300):
        problem = problem_at(ProblemSource(families={"chain": 1.0, "swaps": 1.0, "ab": 1.0}), 0, index)
        _, answer = web_document(problem, rng, mix)
        assert answer.content != problem.answer and answer.content.strip() and answer.thinking is None
    assert wrong_answer(Problem(prompt="?", answer="a a"), rng) != "a a"


def test_a_problem_without_steps_is_answered_at_once():
    problem = make_problem("reasoning_gym:gcd", 0, "en", random.Random(0))
    _, answer = web_document(problem, random.Random(0), WebMix(worked_share=1.0))
    assert answer.thinking is None and answer.content == problem.answer
    with pytest.raises(ValueError, match="no steps"):
        write_thinking(problem, words="en", brevity="full", rng=random.Random(0))


def test_an_instruction_is_followed_after_the_thinking():
    problem = problem_at(ProblemSource(instruction_share=1.0), 0, 3)
    _, answer = web_document(problem, random.Random(0), WebMix(worked_share=1.0))
    assert states_of(answer.thinking)[0][-1] == problem.answer
    assert answer.content == right_content(problem) != problem.answer


def test_shares_outside_zero_and_one_are_refused():
    with pytest.raises(ValueError, match="worked_share=1.5"):
        WebMix(worked_share=1.5)


def test_a_mixed_trace_is_put_into_the_language_of_the_question():
    mixed = "so 2*2-1\n然后4-1\nnext 3"
    assert in_one_language(mixed, "en") == "so 2*2-1\nthen 4-1\nnext 3"
    assert in_one_language(mixed, "zh") == "所以2*2-1\n然后4-1\n接着3"
    assert in_one_language("so a b c\nsorry 3", "zh") == "所以 a b c\nsorry 3"  # letters keep their space
