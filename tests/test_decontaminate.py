import pytest

from abyssal.data.decontaminate import EvaluationItems
from abyssal.data.normal_form import words

QUESTION = "A train leaves Bonn at nine with forty people; how many are on it at Mainz?"  # 15 words


def found(items: EvaluationItems, text: str) -> list[tuple[str, str, str]]:
    return [(hit.evaluation, hit.item, hit.words) for hit in items.find(words(text))]


def test_ten_words_in_a_row_are_found_whatever_their_spelling():
    items = EvaluationItems({"trains": [QUESTION]}, 10)
    quoted = "He asked: FORTY people -- how many are\non it at Mainz? Nobody knew."  # 9 of the question's words
    assert found(items, quoted) == []
    quoted = quoted.replace("FORTY", "with, forty,")  # and now ten
    assert found(items, quoted) == [("trains", QUESTION, "with forty people how many are on it at mainz")]
    assert found(items, quoted.replace("many", "few")) == []


def test_an_item_shorter_than_that_is_looked_for_whole_and_a_very_short_one_not_at_all():
    items = EvaluationItems({"a": ["How deep is the deep sea?", "Say 3."], "b": ["从左到右计算"]}, 10)
    assert items.n_items == {"a": 2, "b": 1} and items.n_too_short == 1
    assert found(items, "we wondered how deep is the deep sea really") == [
        ("a", "How deep is the deep sea?", "how deep is the deep sea")
    ]
    assert found(items, "how deep is the deep lake") == []
    assert found(items, "say 3 say 3") == []
    assert found(items, "请 从左到右 计算 它") == [("b", "从左到右计算", "从 左 到 右 计 算")]


def test_a_document_that_holds_several_items_names_each_once():
    other = "one two three four five six seven eight nine ten eleven"
    items = EvaluationItems({"trains": [QUESTION], "counts": [other], "again": [other]}, 10)
    hits = found(items, f"{other} {QUESTION} {other}")
    assert [(name, item) for name, item, _ in hits] == [("counts", other), ("again", other), ("trains", QUESTION)]
    assert hits[0][2] == "one two three four five six seven eight nine ten"


def test_the_sets_own_wording_is_no_item():
    asked = "please answer the following question with one number and nothing more"  # 11 words, 2 runs of ten
    few = EvaluationItems({"a": [f"{asked} {i}" for i in range(10)]}, 10)
    many = EvaluationItems({"a": [f"{asked} {i}" for i in range(11)]}, 10)
    assert few.n_common == 0 and len(found(few, asked)) == 10
    assert many.n_common == 2 and found(many, asked) == []
    assert len(found(many, f"{asked} 3")) == 1  # by the run that ends in its own number
    twice = EvaluationItems({"a": [asked] * 30, "b": [asked]}, 10)  # one item, however often it is asked
    assert twice.n_items == {"a": 1, "b": 1} and len(found(twice, asked)) == 2


def test_too_few_words_are_refused():
    with pytest.raises(ValueError, match="data.clean.decontaminate=3 words stand anywhere; use 6 or more, or 0"):
        EvaluationItems({}, 3)
