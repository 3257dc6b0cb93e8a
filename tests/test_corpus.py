import json
import random

import pytest

from abyssal.data import corpus
from abyssal.data.corpus import document_ids, documentation, encode_documents, fill_in_the_middle, open_source
from abyssal.data.held_out import is_held_out
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe(["the quick brown fox, 深い海\n"] * 9, vocab_size=320))


@pytest.fixture
def folder(tmp_path):
    """Fifty small texts, one of them in a subfolder, one a program, and a file that is no text."""
    (tmp_path / "sub").mkdir()
    for i in range(50):
        (tmp_path / ("sub" if i == 7 else ".") / f"{i}.{'py' if i == 8 else 'txt'}").write_text(f"text {i}\n")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    return tmp_path


def texts(source, seed=0):
    return [document.text for document in open_source(str(source), seed=seed).documents()]


def test_the_order_is_the_seeds(folder):
    assert sorted(texts(folder)) == sorted(f"text {i}\n" for i in range(50))
    assert texts(folder) == texts(folder)
    assert texts(folder) != texts(folder, seed=1)
    assert sorted(texts(folder)) == sorted(texts(folder, seed=1))


def test_a_new_file_moves_no_other(folder):
    before = texts(folder)
    (folder / "new.md").write_text("one more")
    assert [text for text in texts(folder) if text != "one more"] == before


def test_a_program_is_code_and_the_rest_prose(folder):
    kinds = {document.name: document.kind for document in open_source(str(folder), seed=0).documents()}
    assert [name for name, kind in kinds.items() if kind == "code"] == [f"{folder.name}/8.py"]


def test_reading_is_a_stream(folder):
    source = open_source(str(folder), seed=0)
    assert source.n_bytes == sum(len(f"text {i}\n") for i in range(50))
    documents = source.documents()
    first = next(documents)
    for path in folder.rglob("*.*"):
        path.unlink()  # nothing beyond the first document has been opened yet
    assert first.text.startswith("text ")
    with pytest.raises(FileNotFoundError):
        next(documents)


def test_a_long_file_becomes_several_documents_cut_between_lines(tmp_path):
    lines = [f"line {i}\n" for i in range(300_000)]
    (tmp_path / "long.txt").write_text("".join(lines))
    pieces = texts(tmp_path)
    assert len(pieces) > 2 and "".join(pieces) == "".join(lines)
    assert all(piece.endswith("\n") and len(piece) <= 1 << 20 for piece in pieces)


def test_jsonl_is_read_line_by_line_alone_or_in_a_folder(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text("\ufeff" + "\n".join(json.dumps({"text": f"doc {i}", "id": i}) for i in range(9)) + "\n\n")
    want = [f"doc {i}" for i in range(9)]
    assert texts(path) == texts(tmp_path) == want


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
    path.write_text(f'{{"text": "a"}}\n\n{line}\n{{"text": "b"}}\n')
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
    assert texts(tmp_path / "docs.jsonl") == ["ab?"]


def test_a_source_without_text_is_an_error_before_any_work(tmp_path):
    with pytest.raises(FileNotFoundError, match='does not exist; name a folder, a .jsonl file, "python", "docs"'):
        open_source(str(tmp_path / "nowhere"), seed=0)
    with pytest.raises(ValueError, match="has no text file"):
        open_source(str(tmp_path), seed=0)
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match="neither a folder nor a .jsonl file"):
        open_source(str(tmp_path / "blank.txt"), seed=0)


def test_this_python_is_a_corpus():
    def some():
        n_bytes = 0
        for document in open_source("python", seed=0).documents():
            yield document
            n_bytes += len(document.text.encode())
            if n_bytes >= 300_000:
                return

    documents = list(some())
    assert len({document.name for document in documents}) == len(documents)  # a file is read in one form only
    assert not any("/tests/" in document.name for document in documents)
    assert {document.name.partition("/")[0] for document in documents} <= {"stdlib", "site"}
    assert {document.kind for document in documents} == {"prose", "code"}
    assert [document.name for document in some()] == [document.name for document in documents]


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


def test_texts_are_encoded_a_few_at_a_time(tokenizer, monkeypatch):
    """An encoded text takes a hundred times its memory: what is read ahead is bounded in characters, too."""
    monkeypatch.setattr(corpus, "BATCH_CHARS", 4_000)
    read = []

    def long_texts():
        for i in range(10):
            read.append(i)
            yield "the quick brown fox " * 60  # 1,200 characters

    next(encode_documents(long_texts(), tokenizer, random.Random(0), 0.0))
    assert read == [0, 1, 2, 3]  # 4,800 of them


def test_a_rate_that_is_no_share_is_refused(tokenizer):
    with pytest.raises(ValueError, match="fim_rate=10"):
        document_ids("a", tokenizer, random.Random(0), 10)
