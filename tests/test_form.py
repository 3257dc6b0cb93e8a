import pytest

from abyssal.reward.form import is_mixed, language_consistency, language_of, thinking_tags_ok, well_formed
from abyssal.types import Message, Problem, Score

ENGLISH = Problem(prompt="Left to right modulo 10: 7+5*3", answer="6", language="en", steps=("2*3", "6"))
CHINESE = Problem(prompt="从左到右模10：7+5*3", answer="6", language="zh", steps=("2*3", "6"))


def says(content, thinking=None):
    return Message(role="assistant", content=content, thinking=thinking)


@pytest.mark.parametrize(
    ("message", "value"),
    [
        (says("6"), 1.0),
        (says("6", "then 6"), 1.0),  # thinking earns nothing by itself
        (says(""), 0.0),
        (says(" \n"), 0.0),
        (says("6", ""), 0.0),
        (says("6", "\n"), 0.0),
        (says("", "then 6"), 0.0),  # never closed, or nothing after it
        (says("<think>6"), 0.0),
        (says("6</think>6"), 0.0),
        (says("6", "a <think> b"), 0.0),
    ],
)
def test_well_formed(message, value):
    assert well_formed(ENGLISH, message) == Score(value)


def test_ids_can_show_what_parsing_hid():
    assert well_formed(ENGLISH, says("6", "then 6"), tags_ok=False) == Score(0.0)


@pytest.mark.parametrize(
    ("ids", "thinking_open", "ok"),
    [
        ([7, 8], False, True),
        ([3, 7, 4, 8], False, True),
        ([3, 7], False, False),
        ([7, 4, 8], False, False),
        ([4, 7, 3], False, False),
        ([7, 3, 7, 4, 8], False, False),  # something said before the block
        ([3, 7, 4, 3, 7, 4, 8], False, False),
        ([3, 3, 7, 4], False, False),
        ([7, 4, 8], True, True),
        ([7, 8], True, False),
        ([3, 7, 4, 8], True, False),
        ([], False, True),
    ],
)
def test_thinking_tags(ids, thinking_open, ok):
    assert thinking_tags_ok(ids, think_id=3, end_think_id=4, thinking_open=thinking_open) is ok


@pytest.mark.parametrize(
    ("problem", "thinking", "share", "mixed"),
    [
        (ENGLISH, "then 2*3\nso 6", 1.0, False),
        (CHINESE, "然后2*3\n所以6", 1.0, False),
        (ENGLISH, "then 2*3\n所以6", 0.5, True),
        (CHINESE, "then 2*3\nso 6-4\nnow 2\n所以6", 0.25, True),
        (CHINESE, "then 2*3\nso 6", 0.0, True),
        (ENGLISH, "2*3\n6", 1.0, False),  # figures are of no language
        (ENGLISH, "so x = \\frac{1}{2} 6", 1.0, False),
        (CHINESE, "所以 x = \\frac{1}{2}", 1.0, False),
        (ENGLISH, "we add 然后继续往下算", 1 / 3, True),  # 2 words against 7 characters, which are about 4
        (ENGLISH, None, 1.0, False),
        (ENGLISH, "", 1.0, False),
    ],
)
def test_language_of_the_thinking(problem, thinking, share, mixed):
    assert language_consistency(problem, says("6", thinking)).value == pytest.approx(share)
    assert is_mixed(problem, says("6", thinking)) is mixed


def test_notation_is_of_no_language():
    steps = ("add max345", "add45", "9")
    chinese = Problem(prompt="计算模10： add max3 min475", answer="9", language="zh", steps=steps)
    english = Problem(prompt="Work out modulo 10: add max3 min475", answer="9", language="en", steps=steps)
    thinking = "然后 add max345\n所以 add45\n接着9"
    answer = says("9", thinking)
    assert language_consistency(chinese, answer) == Score(1.0) and not is_mixed(chinese, answer)
    assert language_consistency(english, answer) == Score(0.0) and is_mixed(english, answer)


def test_letters_of_a_state_are_no_words():
    problem = Problem(prompt="依次交换相邻字母： b a:1", answer="a b", language="zh", steps=("a b",))
    assert language_consistency(problem, says("a b", "然后 a b")) == Score(1.0)


def test_to_quote_the_question_is_not_to_mix():
    problem = Problem(prompt="Say hello in Chinese: 你好", answer="你好", language="en")
    assert not is_mixed(problem, says("你好", "the word is 你好"))
    assert is_mixed(problem, says("你好", "the word 就是 你好"))


def test_what_stands_outside_the_thinking_is_not_judged():
    assert language_consistency(ENGLISH, says("答案是6。", "so 6")) == Score(1.0)


def test_language_of_a_text():
    assert language_of("What is 7+5?") == "en" and language_of("7+5等于多少？") == "zh" and language_of("7+5") == "en"
