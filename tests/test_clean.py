"""The cleaner over a planted corpus: what is found, what is kept, and the account of both."""

import random

import pytest

from abyssal.data.clean import CleanConfig, Cleaner
from abyssal.data.documents import Document

WORDS = "sea deep light ground fish sand wave wind salt stone coral ship rope mast sail crew port tide".split()
QUESTION = "A ship leaves the port at nine with forty people; how many are on it at Mainz?"


def prose(seed: int, n_words: int = 120) -> str:
    """English enough, and another text for each seed."""
    rng = random.Random(seed)
    return " ".join(f"the {rng.choice(WORDS)} is {rng.choice('abcdefgh')}{rng.randrange(999)}," for _ in range(n_words))


def cleaned(documents: list[Document], *, source: str = "here", **config: object) -> tuple[Cleaner, list[str]]:
    cleaner = Cleaner(CleanConfig(**config), {"ships": [QUESTION]})
    return cleaner, [document.name for document in documents if cleaner.keeps(document, source)]


def planted() -> list[Document]:
    """A hundred texts that are fit, and ten that are not."""
    texts = {f"fit {i}": prose(i) for i in range(100)}
    plants = {
        "empty": " \n\t",
        "copy of 3": prose(3),
        "copy of 4": prose(4).upper().replace(" ", "\n  "),
        "near 5": prose(5) + " and that is all there is to say of it",
        "near 6": prose(6)[40:],
        "quoted": prose(200) + " " + QUESTION.lower() + " " + prose(201),
        "part": f"{prose(202)} with FORTY people: how many are on it at mainz {prose(203)}",
        "short": "only a few words",
        "same line": "the same line again\n" * 30,
        "numbers": "12 15 90 " * 30,
    }
    documents = [Document(text=text, name=name) for name, text in (texts | plants).items()]
    return documents


def test_what_is_planted_is_found_and_the_clean_is_kept():
    cleaner, kept = cleaned(planted())
    assert kept == [f"fit {i}" for i in range(100)]
    total = cleaner.total
    assert (total.read, total.kept) == (110, 100)
    assert total.refused == {
        "empty": 1, "exact duplicate": 2, "near duplicate": 2, "evaluation item": 2, "too short": 1,
        "repeated lines": 1, "mostly not letters": 1,
    }  # fmt: skip
    assert total.kept_bytes == sum(len(prose(i).encode()) for i in range(100))


def test_the_report_says_what_was_hit_and_by_which_words():
    cleaner, _ = cleaned(planted())
    report = cleaner.report()
    assert report["total"]["read"] == sum(report["total"]["refused"].values()) + report["total"]["kept"]
    assert report["sources"] == {"here": report["total"]}
    assert report["languages"]["en"] >= 100
    assert report["evaluation"] == {
        "words_in_a_row": 10,
        "sets": {"ships": 1},
        "items_too_short": 0,
        "runs_too_common": 0,
        "items_hit": 1,
        "hits": [
            {"document": "quoted", "evaluation": "ships", "item": QUESTION,
             "words": "a ship leaves the port at nine with forty people"},
            {"document": "part", "evaluation": "ships", "item": QUESTION,
             "words": "with forty people how many are on it at mainz"},
        ],
    }  # fmt: skip
    examples = report["examples"]
    assert examples["exact duplicate"] == [
        {"document": "copy of 3", "of": "fit 3"}, {"document": "copy of 4", "of": "fit 4"},
    ]  # fmt: skip
    assert [(e["document"], e["of"]) for e in examples["near duplicate"]] == [("near 5", "fit 5"), ("near 6", "fit 6")]
    assert all(0.8 <= e["overlap"] < 1 for e in examples["near duplicate"])


def test_each_part_can_be_switched_off():
    off = {"near_duplicates": 0, "decontaminate": 0, "quality": False, "identify_languages": False}
    cleaner, kept = cleaned(planted(), **off)
    assert cleaner.total.refused == {"empty": 1, "exact duplicate": 2} and len(kept) == 107
    assert cleaner.report()["languages"] == {} and cleaner.report()["evaluation"]["sets"] == {}


def test_only_the_languages_asked_for_are_kept_and_code_in_any_case():
    texts = {
        "en": "The sea is deep and the light is far away, so we go down slowly.",
        "de": "Das Meer ist tief und das Licht ist fern, also gehen wir langsam hinunter.",
        "zh": "海很深，光很远，所以我们慢慢地往下走。",
    }
    documents = [Document(text=text, name=name) for name, text in texts.items()]
    documents.append(
        Document(text="def f(x):\n    return [y for y in x if y]\n\nprint(f([0, 1, 2]))\n", name="py", kind="code")
    )
    cleaner, kept = cleaned(documents, languages=("en", "zh"))
    assert kept == ["en", "zh", "py"]
    assert cleaner.languages == {"en": 1, "de": 1, "zh": 1, "code": 1}
    assert cleaner.report()["examples"]["language"] == [{"document": "de", "language": "de"}]


def test_duplicates_are_looked_for_across_sources():
    cleaner = Cleaner(CleanConfig(), {})
    assert cleaner.keeps(Document(text=prose(1), name="a"), "first")
    assert not cleaner.keeps(Document(text=prose(1), name="b"), "second")
    assert not cleaner.keeps(Document(text=prose(1) + " the end", name="c"), "third")
    refused = {name: dict(counts.refused) for name, counts in cleaner.counts.items()}
    assert refused == {"first": {}, "second": {"exact duplicate": 1}, "third": {"near duplicate": 1}}


def test_examples_and_hits_are_not_listed_without_end():
    documents = [Document(text=f"{QUESTION} {prose(i)}", name=f"q{i}") for i in range(300)]
    documents += [Document(text=f"too {i}", name=f"s{i}") for i in range(300)]
    cleaner, kept = cleaned(documents)
    report = cleaner.report()
    assert kept == [] and report["total"]["refused"] == {"evaluation item": 300, "too short": 300}
    assert len(report["evaluation"]["hits"]) == 200 and report["evaluation"]["items_hit"] == 1
    assert len(report["examples"]["too short"]) == 20


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"near_duplicates": 8}, "near_duplicates=8 is a share; give a number from 0 to 1"),
        ({"decontaminate": -1}, "decontaminate=-1 is negative; use 0 to switch it off"),
        ({"languages": ("en",), "identify_languages": False}, "needs identify_languages=true"),
    ],
)
def test_a_wrong_setting_is_named(config: dict, message: str):
    with pytest.raises(ValueError, match=message):
        CleanConfig(**config)


def test_an_unknown_language_is_named():
    with pytest.raises(ValueError, match=r"data.clean.languages: \['english'\] are not known"):
        Cleaner(CleanConfig(languages=("english",)), {})
