import json
import random
from collections import Counter

import pytest

from abyssal.data.corpus import document_ids, documentation, encode_documents, fill_in_the_middle, read_corpus
from abyssal.data.held_out import is_held_out
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe(["the quick brown fox, 深い海\n"] * 9, vocab_size=320))


@pytest.fixture
def folder(tmp_path):
    """Two hundred small texts, one of them in a subfolder, and a file that is no text."""
    (tmp_path / "sub").mkdir()
    for i in range(200):
        (tmp_path / ("sub" if i == 7 else ".") / f"{i}.txt").write_text(f"text {i}\n")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    return tmp_path


def texts(source, **options):
    return [document.text for document in read_corpus(str(source), **{"max_bytes": 10**6, "seed": 0} | options)]


def test_the_two_sides_of_the_split_make_the_whole_and_share_nothing(folder):
    train, held_out = texts(folder), texts(folder, split="held_out")
    assert sorted(train + held_out) == sorted(f"text {i}\n" for i in range(200))
    assert all(is_held_out(text) for text in held_out) and not any(is_held_out(text) for text in train)
    assert 2 <= len(held_out) <= 20  # five in a hundred, of two hundred


def test_the_order_is_the_seeds(folder):
    assert texts(folder) == texts(folder)
    assert texts(folder) != texts(folder, seed=1)
    assert sorted(texts(folder)) == sorted(texts(folder, seed=1))


def test_a_new_file_moves_no_other(folder):
    before = texts(folder)
    (folder / "new.md").write_text("one more")
    assert [text for text in texts(folder) if text != "one more"] == before


def test_reading_stops_with_the_document_that_reaches_the_limit(folder):
    read = texts(folder, max_bytes=20)  # documents of 7 to 9 bytes
    assert read == texts(folder)[:3]


def test_reading_is_a_stream(folder):
    first = next(read_corpus(str(folder), max_bytes=10**6, seed=0))
    for path in folder.rglob("*.txt"):
        path.unlink()  # nothing beyond the first document has been opened yet
    assert first.text.startswith("text ")


def test_the_same_text_is_read_once(folder):
    (folder / "copy.txt").write_text("text 3\n")
    assert Counter(texts(folder))["text 3\n"] == 1


def test_a_long_file_becomes_several_documents_cut_between_lines(tmp_path):
    lines = [f"line {i}\n" for i in range(300_000)]
    (tmp_path / "long.txt").write_text("".join(lines))
    pieces = texts(tmp_path, max_bytes=10**9, held_out_share=0)
    assert len(pieces) > 2 and "".join(pieces) == "".join(lines)
    assert all(piece.endswith("\n") and len(piece) <= 1 << 20 for piece in pieces)


def test_jsonl_is_read_line_by_line_alone_or_in_a_folder(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text("\ufeff" + "\n".join(json.dumps({"text": f"doc {i}", "id": i}) for i in range(9)) + "\n\n")
    want = [f"doc {i}" for i in range(9)]
    assert texts(path, held_out_share=0) == texts(tmp_path, held_out_share=0) == want


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut of', r"docs.jsonl:3: not JSON .*; write one object on each line"),
        ('["a"]', r"docs.jsonl:3: list instead of an object"),
        ('{"body": "a"}', r'docs.jsonl:3: no "text" string'),
        ('{"text": 4}', r'docs.jsonl:3: no "text" string'),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = tmp_path / "docs.jsonl"
    path.write_text(f'{{"text": "a"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=message):
        texts(path)


def test_bytes_that_are_not_text_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt is not UTF-8; convert it"):
        texts(tmp_path)
    (tmp_path / "docs.jsonl").write_bytes(b'{"text": "caf\xe9"}')
    with pytest.raises(ValueError, match="docs.jsonl:1: not UTF-8"):
        texts(tmp_path / "docs.jsonl")


def test_half_a_character_in_jsonl_does_not_stop_the_corpus(tmp_path):
    (tmp_path / "docs.jsonl").write_text('{"text": "ab\\ud83d"}')
    assert texts(tmp_path / "docs.jsonl", held_out_share=0) == ["ab?"]


def test_a_source_without_text_is_an_error_before_any_work(tmp_path):
    with pytest.raises(FileNotFoundError, match='does not exist; name a folder, a .jsonl file, or "python"'):
        read_corpus(str(tmp_path / "nowhere"), max_bytes=1, seed=0)
    with pytest.raises(ValueError, match="has no text file"):
        read_corpus(str(tmp_path), max_bytes=1, seed=0)
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match="holds no text; add documents"):
        texts(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor a .jsonl file"):
        read_corpus(str(tmp_path / "blank.txt"), max_bytes=1, seed=0)
    with pytest.raises(ValueError, match="max_bytes=0 leaves no text"):
        read_corpus(str(tmp_path), max_bytes=0, seed=0)


def test_a_corpus_that_is_all_held_out_says_so(tmp_path):
    unlucky = next(f"text {i}" for i in range(1000) if is_held_out(f"text {i}"))
    (tmp_path / "a.txt").write_text(unlucky)
    with pytest.raises(ValueError, match="all 1 documents .* are held out"):
        texts(tmp_path)


def test_this_python_is_a_corpus():
    documents = list(read_corpus("python", max_bytes=300_000, seed=0))
    assert sum(len(document.text.encode()) for document in documents) >= 300_000
    assert len({document.name for document in documents}) == len(documents)  # a file is read in one form only
    assert not any("/tests/" in document.name for document in documents)
    assert {document.name.partition("/")[0] for document in documents} <= {"stdlib", "site"}
    again = [document.name for document in read_corpus("python", max_bytes=300_000, seed=0)]
    assert again == [document.name for document in documents]


def test_documentation_strings_make_a_page():
    source = (
        f'"""Sums."""\nclass Adder:\n    """Adds {"numbers " * 60}."""\n    def add(self):\n        """Add one."""\n'
    )
    page = documentation(source)
    assert page.startswith("Sums.\n\nAdder: Adds numbers") and page.endswith("\n\nadd: Add one.\n")
    assert documentation("def f():\n    return 1\n") == ""
    assert documentation("print 'python 2'") == ""


def test_the_split_is_a_hash_and_nothing_else():
    keys = [f"chain:{i}" for i in range(4000)]
    held_out = [key for key in keys if is_held_out(key)]
    assert 150 <= len(held_out) <= 250
    assert [key for key in keys if is_held_out(key)] == held_out
    assert set(held_out) <= {key for key in keys if is_held_out(key, share=0.2)}  # a larger share only adds
    assert not any(is_held_out(key, share=0) for key in keys)
    # sha256("abyssal") begins 0x707135, which is 0.4392 of the whole range
    assert is_held_out("abyssal", share=0.4393) and not is_held_out("abyssal", share=0.4392)


def test_a_document_ends_with_the_end_token(tokenizer):
    assert document_ids("the fox", tokenizer, random.Random(0), 0.0) == [*tokenizer.encode("the fox"), tokenizer.eos_id]


def test_fill_in_the_middle_is_prefix_suffix_middle(tokenizer):
    text = "the quick brown fox, 深い海"
    prefix, middle, suffix = fill_in_the_middle(text, random.Random(5))
    assert prefix + middle + suffix == text
    rng = random.Random(5)
    ids = next(encode_documents([text], tokenizer, ConstantFirst(rng), 1.0))
    assert tokenizer.decode(ids) == (
        f"<｜fim▁begin｜>{prefix}<｜fim▁hole｜>{suffix}<｜fim▁end｜>{middle}<｜end▁of▁sentence｜>"
    )


class ConstantFirst(random.Random):
    """Says 0.0 to "is it cut?" and draws the cuts from another generator."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng

    def random(self) -> float:
        return 0.0

    def randint(self, a: int, b: int) -> int:
        return self.rng.randint(a, b)


def test_one_document_in_ten_is_cut_and_no_text_is_lost(tokenizer):
    documents = [f"document number {i} about foxes" for i in range(1000)]
    encoded = list(encode_documents(documents, tokenizer, random.Random(0), 0.1))
    cut = [ids for ids in encoded if tokenizer.fim_begin_id in ids]
    assert 70 <= len(cut) <= 130
    for ids, text in zip(encoded, documents, strict=True):
        written = tokenizer.decode(ids, skip_special=True)
        assert sorted(written) == sorted(text) and ids[-1] == tokenizer.eos_id


def test_many_at_once_equal_one_by_one(tokenizer):
    documents = [f"document {i}" for i in range(600)]
    rng = random.Random(3)
    one_by_one = [document_ids(text, tokenizer, rng, 0.5) for text in documents]
    assert list(encode_documents(documents, tokenizer, random.Random(3), 0.5)) == one_by_one


def test_a_rate_that_is_no_share_is_refused(tokenizer):
    with pytest.raises(ValueError, match="fim_rate=10"):
        document_ids("a", tokenizer, random.Random(0), 10)
