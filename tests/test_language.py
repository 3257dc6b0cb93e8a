import sys

import pytest

from abyssal.data.language import Languages


@pytest.fixture(scope="module")
def languages() -> Languages:
    return Languages()


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The sea is deep and the light is far away, so we go down slowly.", "en"),
        ("Das Meer ist tief und das Licht ist fern, also gehen wir langsam hinunter.", "de"),
        ("海很深，光很远，所以我们慢慢地往下走。", "zh"),
        ("海は深く、光は遠いので、ゆっくり降りていきます。", "ja"),
        ("", "und"),
        ("12 34", "und"),
    ],
)
def test_languages_are_told_apart(languages: Languages, text: str, language: str):
    assert languages.of(text) == language


def test_a_long_text_is_sampled_at_three_places(languages: Languages):
    english, german = "The sea is deep and the light is far away. ", "Das Meer ist tief und das Licht ist fern. "
    assert languages.of(english * 1000) == "en"
    assert languages.of(english + german * 1000) == "de"  # the middle and the end outweigh the beginning


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(
        ValueError, match=r"needs the package py3langid; pip install 'abyssal\[data\]', or set it to fa"
    ):
        Languages()
