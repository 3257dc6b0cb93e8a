from abyssal.data.normal_form import canonical, grams, words


def test_words_forget_case_and_marks_and_keep_chinese_characters_apart():
    assert words("Don't 从左 X=3") == ["don", "t", "从", "左", "x", "3"]
    assert words("４＋３ Ｌｅｆｔ") == ["4", "3", "left"]  # full-width forms
    assert words("cafe\u0301") == words("café") == ["café"]  # a letter and its accent, apart and as one
    assert words("...\n--") == []


def test_the_canonical_form_keeps_marks():
    assert canonical("A  b\n C.") == "a b c."
    assert canonical("a+b") != canonical("a-b")
    assert canonical(" \n\t") == ""


def test_grams_are_runs_of_words():
    assert list(grams(["a", "b", "c", "d"], 3)) == ["a b c", "b c d"]
    assert list(grams(["a", "b"], 3)) == []
