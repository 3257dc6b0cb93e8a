"""Which answers are the same, and how many say so."""

import pytest

from abyssal.reward.majority import answer_key, votes


@pytest.mark.parametrize("texts", [
    ["12", " 12. ", "$12$", "\\boxed{12}", "so it is \\boxed{12}", "012", "１２", "<answer>12</answer>"],
    ["red blue", "red  blue.", "\\boxed{red blue}"],
    ["0", "00"],
])
def test_one_answer_in_many_spellings(texts):
    assert len({answer_key(text) for text in texts}) == 1 and answer_key(texts[0]) is not None


def test_a_number_goes_by_its_value():
    assert [answer_key(text) for text in ("007", "0", "000", "10")] == ["7", "0", "0", "10"]


def test_different_answers_and_none():
    keys = [answer_key(text) for text in ("12", "1.2", "-12", "twelve", "12 apples", "1/2", "0.5", "²")]
    assert len(set(keys)) == 8
    assert [answer_key(text) for text in ("", "  ", ".", "\\boxed{}")] == [None] * 4


def test_votes_are_counted_for_each_answer():
    assert votes(["7", None, "12", "7", "7", "12", "3"]) == [3, 0, 2, 3, 3, 2, 1]
    assert votes([]) == []
