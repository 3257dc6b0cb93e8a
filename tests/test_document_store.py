"""Sources through the cleaner onto disk: budgets, the held-out split, streaming, nothing half done."""

import random
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase

import pytest

from abyssal.data.clean import CleanConfig, Cleaner
from abyssal.data.document_store import open_documents, write_documents
from abyssal.data.documents import Document, Source
from abyssal.data.held_out import is_held_out

OFF = CleanConfig(near_duplicates=0, decontaminate=0, quality=False, identify_languages=False)


def source(texts: list[str], name: str = "here") -> Source:
    def documents() -> Iterator[Document]:
        for i, text in enumerate(texts):
            yield Document(text=text, name=f"{name}/{i}")

    return Source(name=name, n_bytes=sum(len(text.encode()) for text in texts), documents=documents)


def written(directory: Path, *sources: Source, config: CleanConfig = OFF, max_bytes: int = 10**9) -> Cleaner:
    cleaner = Cleaner(config, {})
    write_documents(directory, sources, cleaner, max_bytes={s.name: max_bytes for s in sources})
    return cleaner


def texts_of(directory: Path, side) -> list[list[str]]:
    return [[file.text(i) for i in range(len(file))] for file in open_documents(directory, side)]


def test_the_two_sides_of_the_split_make_the_whole_and_share_nothing(tmp_path: Path):
    texts = [f"text {i}\n深い\u2028" for i in range(200)]
    written(tmp_path / "documents", source(texts[:150], "a"), source(texts[150:], "b"))
    train, held_out = (texts_of(tmp_path / "documents", side) for side in ("train", "held_out"))
    assert [sorted(a + b) for a, b in zip(train, held_out, strict=True)] == [sorted(texts[:150]), sorted(texts[150:])]
    assert all(is_held_out(text) for text in sum(held_out, [])) and not any(is_held_out(t) for t in sum(train, []))
    assert 2 <= len(sum(held_out, [])) <= 20  # five in a hundred, of two hundred
    assert [file.source for file in open_documents(tmp_path / "documents", "train")] == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["documents"]


def test_a_source_is_read_to_its_budget_and_on_to_its_first_held_out_document(tmp_path: Path):
    texts = [f"text {i:03d}" for i in range(400)]  # of 8 bytes
    first_held_out = next(i for i, text in enumerate(texts) if is_held_out(text))
    assert first_held_out > 5
    cleaner = written(tmp_path / "documents", source(texts), max_bytes=20)
    assert texts_of(tmp_path / "documents", "train") == [texts[:3]]
    assert texts_of(tmp_path / "documents", "held_out") == [[texts[first_held_out]]]
    assert cleaner.total.read == 4  # those between were passed over


def test_documents_are_streamed(tmp_path: Path):
    """When a document is asked for, the ones before it are on disk or forgotten: nothing gathers in memory."""
    alive: list[int] = []
    rng = random.Random(0)

    class Text(str):
        def __del__(self) -> None:
            alive.remove(id(self))

    def documents() -> Iterator[Document]:
        for i in range(300):
            text = Text(" ".join("".join(rng.choices(ascii_lowercase, k=6)) for _ in range(50)))
            alive.append(id(text))
            assert len(alive) <= 3, "documents pile up"
            yield Document(text=text, name=str(i))
            del text

    written(tmp_path / "documents", Source(name="here", n_bytes=10**6, documents=documents), config=CleanConfig())
    assert not alive


def test_what_is_done_is_told_as_a_share(tmp_path: Path):
    told: list[float] = []
    texts = [f"text {i:03d}" for i in range(100)]
    sources = [source(texts, "a"), source([f"other {text}" for text in texts], "b")]
    write_documents(
        tmp_path / "documents", sources, Cleaner(OFF, {}), max_bytes={"a": 10**6, "b": 10**6}, on_document=told.append
    )
    assert told == sorted(told) and told[-1] == 1.0 and len(told) == 202
    assert told[100] == pytest.approx(800 / (800 + 1400))  # a is through


def test_a_corpus_wholly_refused_says_why_and_leaves_nothing(tmp_path: Path):
    texts = ["", "", "a few words", "a FEW  words", "few"]
    with pytest.raises(ValueError) as error:
        written(tmp_path / "documents", source(texts), config=CleanConfig(identify_languages=False))
    assert str(error.value) == (
        "all 5 documents of corpus here were refused: 2 empty, 2 too short, 1 exact duplicate; "
        "see data.clean, or add documents"
    )
    assert not list(tmp_path.iterdir())


def test_a_source_that_gives_nothing_is_named_though_another_does(tmp_path: Path):
    fine = [f"text {i}" for i in range(100)]
    with pytest.raises(ValueError, match="corpus nothing holds no text; add documents to it"):
        written(tmp_path / "documents", source(fine), source([], "nothing"))
    with pytest.raises(ValueError, match="all 100 documents of corpus twin were refused: 100 exact duplicate"):
        written(tmp_path / "documents", source(fine), source(fine, "twin"))


def test_too_few_documents_for_both_sides_say_so(tmp_path: Path):
    unlucky = next(f"text {i}" for i in range(1000) if is_held_out(f"text {i}"))
    with pytest.raises(ValueError, match="keeps no document for training: of 1, 1 are held out; add documents"):
        written(tmp_path / "documents", source([unlucky]))
    with pytest.raises(ValueError, match="keeps no document for training: of 2, 1 are held out and the others refused"):
        written(tmp_path / "documents", source([unlucky, " "]))
    with pytest.raises(ValueError, match="corpus here has no held_out document; add documents to it"):
        written(tmp_path / "documents", source(["text 1"]))


def test_writing_again_takes_the_place_of_what_was_there(tmp_path: Path):
    texts = [f"text {i}" for i in range(100)]
    written(tmp_path / "documents", source(texts))
    (tmp_path / "documents.partial").mkdir()
    (tmp_path / "documents.partial" / "rest").write_text("of a killed process")
    written(tmp_path / "documents", source([f"new {text}" for text in texts]))
    assert all(text.startswith("new ") for text in texts_of(tmp_path / "documents", "train")[0])
    assert [path.name for path in tmp_path.iterdir()] == ["documents"]
