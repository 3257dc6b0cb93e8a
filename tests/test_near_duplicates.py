import sys

import pytest

from abyssal.data.near_duplicates import NearDuplicates
from abyssal.data.normal_form import grams


def runs(first: int, last: int) -> list[str]:
    """Of five words each, from a text of numbers as words."""
    return list(grams([f"w{i}" for i in range(first, last)], 5))


def test_a_document_with_most_runs_in_common_is_found_and_named():
    near = NearDuplicates(0.8)
    assert near.find("a", runs(0, 404)) is None  # 400 runs
    found = near.find("b", runs(20, 424))  # 380 runs in common, 420 in all: 0.905
    assert found is not None and found.name == "a" and found.overlap == pytest.approx(380 / 420, abs=0.08)
    assert near.find("c", runs(200, 604)) is None  # 200 of 600
    again = near.find("d", runs(200, 604))
    assert again is not None and again.name == "c" and again.overlap == 1.0


def test_a_refused_document_is_not_remembered():
    """Else a chain of small steps could carry the text away from anything that was kept."""
    near = NearDuplicates(0.8)
    assert near.find("a", runs(0, 404)) is None
    assert near.find("b", runs(30, 434)) is not None  # 370 of 430 with a
    assert near.find("c", runs(200, 604)) is None
    found = near.find("d", runs(225, 629))
    assert found is not None and found.name == "c"


def test_order_and_repetition_of_runs_do_not_matter():
    near = NearDuplicates(0.9)
    assert near.find("a", runs(0, 200)) is None
    found = near.find("b", runs(0, 200)[::-1] * 3)
    assert found is not None and found.overlap == 1.0


def test_a_text_too_short_to_compare_is_no_duplicate():
    near = NearDuplicates(0.8)
    assert near.find("a", []) is None and near.find("b", []) is None


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ValueError, match=r"needs the package rensa; pip install 'abyssal\[data\]', or set it to 0"):
        NearDuplicates(0.8)
