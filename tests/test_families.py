"""Every step of every family is checked against an evaluation written here, by another way than the generator's."""

import random
import re
from collections import Counter

import pytest

from abyssal.data.families.backward import draw_backward
from abyssal.data.families.chain import draw_chain
from abyssal.data.families.gym import AB_SPELLING, draw_ab, draw_gym
from abyssal.data.families.instance import joined
from abyssal.data.families.nested import draw_nested
from abyssal.data.families.swaps import draw_swaps

OURS = {"chain": draw_chain, "swaps": draw_swaps, "nested": draw_nested, "ab": draw_ab, "backward": draw_backward}


def value_left_to_right(state):
    """Python's own arithmetic, one operation at a time, reduced modulo 5 at the end only."""
    first, *pairs = re.findall(r"[+*-]?\d", state)
    value = int(first)
    for pair in pairs:
        value = eval(f"({value}){pair}")
    return str(value % 5)


def value_right_to_left(state):
    """Brackets from the right: 4+3*2 -> 4+(3*(2))."""
    return str(eval(re.sub(r"([+*-])", r"\1(", state) + ")" * len(re.findall(r"[+*-]", state))) % 5)


def value_of_swaps(state):
    letters, _, places = state.partition(":")
    order = letters.split()
    for place in map(int, places):
        order[place - 1 : place + 1] = reversed(order[place - 1 : place + 1])
    return " ".join(order)


def value_of_nested(state):
    """Recursive descent, where the generator rewrites."""
    tokens = re.findall(r"[a-z]+|\d", state)

    def take():
        token = tokens.pop(0)
        if token.isdigit():
            return int(token)
        a, b = take(), take()
        return {"add": (a + b) % 5, "sub": (a - b) % 5, "max": max(a, b), "min": min(a, b)}[token]

    value = take()
    assert not tokens, f"{state} says more than one expression"
    return str(value)


def value_of_ab(state):
    """The order of rewriting does not matter, so take the last pair where the generator takes the first."""
    text = state.replace(" ", "")
    while pairs := list(re.finditer("[AB][ab]", text)):
        pair = pairs[-1][0]
        text = text[: pairs[-1].start()] + ("" if pair[0].lower() == pair[1] else pair[::-1]) + text[pairs[-1].end() :]
    return " ".join(text)


VALUE = {
    "chain": value_left_to_right,
    "swaps": value_of_swaps,
    "nested": value_of_nested,
    "ab": value_of_ab,
    "backward": value_right_to_left,
}


def test_the_evaluations_here_are_right():
    assert value_left_to_right("7+5*3-4+8") == "0"  # 12*3-4+8 = 40
    assert value_right_to_left("7+5*3") == "2" and value_right_to_left("3*1-4") == "1"  # 3*(1-4) = -9
    assert value_of_swaps("b a d c e:31") == "a b c d e"
    assert value_of_nested("add max3 min421") == "4"  # max(3, min(4, 2)) + 1
    assert value_of_ab("B a b B") == "a B"  # B a -> a B, then B b -> nothing


@pytest.mark.parametrize("family", OURS)
@pytest.mark.parametrize("level", [2, 3, 5, 7])
def test_no_step_changes_the_value_and_the_last_is_the_answer(family, level):
    rng = random.Random(level)
    for _ in range(300):
        instance = OURS[family](rng, level)
        assert {VALUE[family](state) for state in (instance.state, *instance.steps)} == {instance.answer}
        assert instance.steps[-1] == instance.answer
        assert instance.key == f"{family}|{instance.state}"


@pytest.mark.parametrize("family", ["chain", "swaps", "nested", "backward"])
@pytest.mark.parametrize("level", [2, 3, 5, 7])
def test_each_step_does_one_operation(family, level):
    rng = random.Random(level)
    for _ in range(100):
        instance = OURS[family](rng, level)
        states = (instance.state, *instance.steps)
        if family == "swaps":
            n_left = [len(state.partition(":")[2]) for state in states]
        else:
            n_left = [len(re.findall(r"[+*-]|[a-z]{3}", state)) for state in states]
        assert n_left == list(range(level, -1, -1))


def test_chain_steps_as_in_its_description():
    rng = random.Random(0)
    while True:  # the description's example is one that can be drawn
        instance = draw_chain(rng, 2)
        if instance.state == "4+3*2":
            assert instance.steps == ("2*2", "4")
            break


def test_chain_multiplies_only_by_what_permutes_the_digits_and_never_only_adds_or_only_multiplies():
    rng = random.Random(1)
    for level in (2, 3, 5, 7):
        for _ in range(300):
            operations = re.findall(r"[+*-]\d", draw_chain(rng, level).state)
            times = [operation[1] for operation in operations if operation[0] == "*"]
            assert set(times) <= set("23")
            assert level // 2 <= len(times) < level


def test_backward_has_the_multiplier_on_the_left():
    rng = random.Random(1)
    for _ in range(300):
        assert set(re.findall(r"(\d)\*", draw_backward(rng, 5).state)) <= set("23")


def test_swaps_never_repeat_at_once_and_nested_has_max_or_min():
    rng = random.Random(2)
    for level in (3, 4, 6):
        for _ in range(300):
            assert not re.search(r"(\d)\1", draw_swaps(rng, level).state)
            state = draw_nested(rng, level).state
            assert re.match("add|sub", state) and re.search("max|min", state)


@pytest.mark.parametrize("family", ["chain", "swaps", "nested", "backward"])
@pytest.mark.parametrize("level", [3, 6])
def test_answers_are_near_uniform(family, level):
    """So that a guess is worth no more than one in five (one in 120 for swaps)."""
    rng, n = random.Random(3), 20_000
    counts = Counter(OURS[family](rng, level).answer for _ in range(n))
    n_answers = 120 if family == "swaps" else 5
    assert len(counts) == n_answers
    assert max(counts.values()) < 1.35 * n / n_answers and min(counts.values()) > 0.65 * n / n_answers


def test_ab_is_reasoning_gyms_problem_in_other_letters():
    rng = random.Random(4)
    for _ in range(50):
        instance = draw_ab(rng, 6)
        entry = instance.metadata["entry"]
        assert " ".join(AB_SPELLING[token] for token in instance.state.split()) in entry["question"]
        assert " ".join(AB_SPELLING[token] for token in instance.answer.split()) == entry["answer"]
        assert instance.answer and instance.state != instance.answer


def test_any_reasoning_gym_task_is_a_problem_as_it_is_asked():
    instance = draw_gym("gcd", random.Random(0))
    assert instance.state == instance.metadata["entry"]["question"] and not instance.steps
    assert instance.verifier == "reasoning_gym:gcd" and instance.answer == instance.metadata["entry"]["answer"]
    assert instance == draw_gym("gcd", random.Random(0))


@pytest.mark.parametrize(
    ("task", "why"),
    [("graph_color", "states no answer"), ("chian_sum", "did you mean chain_sum"), ("composite", "does not start")],
)
def test_a_task_that_cannot_be_used_says_why(task, why):
    with pytest.raises(ValueError, match=why):
        draw_gym(task, random.Random(0))


def test_words_and_state_are_joined_so_that_letters_always_follow_a_space():
    assert joined("then", "7+5", "en") == "then 7+5" and joined("然后", "7+5", "zh") == "然后7+5"
    assert joined("然后", "b a", "zh") == "然后 b a"
