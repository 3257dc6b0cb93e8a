import pytest

from abyssal.data.documents import Document
from abyssal.data.normal_form import grams, words
from abyssal.data.quality import QualityLimits, broken_share, fault_of, repeated_share

PROSE = "The sea is deep, and the light of the sun does not reach the ground that lies below. Fish make their own."


def fault(text: str, kind: str = "prose", **limits: object) -> str | None:
    found = words(text)
    document = Document(text=text, name="a", kind=kind)
    return fault_of(document, found, list(grams(found, 5)), QualityLimits(**limits))


def test_a_page_of_prose_is_fit_in_any_script():
    assert fault(PROSE) is None
    assert fault("深い海の底には太陽の光が届かないので、魚たちは自分で光を作ります。") is None
    assert fault("Das Licht der Sonne reicht nicht bis zum Grund, und die Fische machen ihr eigenes Licht.") is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("one two three four five six seven eight nine", "too short"),
        (PROSE + "\ufffd", "broken characters"),  # 1 of 84 characters, more than 0.2 %
        (PROSE.replace(" the ", "\x00the\x01"), "broken characters"),
        ("12 375 4 19 2004 33 8 71 5 90 total of all", "mostly not letters"),
        ("a-(b) => c: {d}; e += [f]; g <> h! i, j? k. l", "mostly not letters"),
        ("all of those other words here ---------- ---------- stand apart for ever", None),  # 20 marks to 10 words
        ("all of those other words here ---------- ---------- - stand apart for ever", "too many symbols"),
        ("ab-" * 12, "repeated words"),
        ("x y z a b c d e f g h i j k", "word length"),
        ("internationalisation " * 2 + "characteristically incomprehensibility " * 4, "word length"),
        ("Copyright, all rights reserved\n" * 3 + PROSE, None),  # 54 of 165 characters were there before: 0.33
        ("Copyright, all rights reserved\n" * 6 + PROSE, "repeated lines"),  # 135 of 246: 0.55
        ("go on and on and " * 20, "repeated words"),
    ],
)
def test_what_spoils_prose_is_named(text: str, reason: str | None):
    assert fault(text) == reason


def test_code_is_judged_apart():
    code = "def f(x):\n    return {k: v for k, v in x.items() if v}\n\nprint(f({1: 2}), f({}), f({3: 0}))\n"
    assert fault(code, "code") is None
    assert fault("x=1;" * 60, "code") == "packed code"  # one line of 240 characters
    assert fault("x = {+-*/ %^& <<>> || ## !! ~~ ?? :: ;; @@ $$ ()[]}\n" * 12, "code") == "code without words"
    assert fault(code.replace("print", "\ufffd"), "code") == "broken characters"
    assert fault("x = 1\n", "code") == "too short"


def test_shares_by_hand():
    assert repeated_share(["ab", "c", "ab"]) == pytest.approx(2 / 5)
    assert repeated_share([]) == 0
    assert broken_share("ab\x00\ufffd\t\n", 4) == 0.5


def test_limits_are_the_users():
    assert fault(PROSE, least_words=30) == "too short"
    assert fault("one two", least_words=2) is None
    with pytest.raises(ValueError, match="limits.broken=-1 is negative"):
        QualityLimits(broken=-1)
    with pytest.raises(ValueError, match=r"limits.word_length=\(5, 2\)"):
        QualityLimits(word_length=(5, 2))
