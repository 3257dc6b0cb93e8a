"""The mix: its shares at every moment, its epochs, and that a stopped one goes on as if it had not been stopped."""

import json
import random
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import pytest

from abyssal.data.document_store import DocumentFile, as_line, path_of
from abyssal.data.documents import Document
from abyssal.data.mix import Mixture

SIZES = {"a": range(5, 400), "b": range(50, 90), "c": range(900, 2000)}  # bytes of a document
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[DocumentFile]:
    """Three sources of 40, 300 and 7 documents."""
    folder = tmp_path_factory.mktemp("documents")
    rng = random.Random(0)
    for k, (name, n) in enumerate({"a": 40, "b": 300, "c": 7}.items()):
        texts = [f"{name}{i}".ljust(rng.choice(SIZES[name]), "é"[:1] if i % 2 else ".") for i in range(n)]
        path_of(folder, k, "train").write_bytes(b"".join(as_line(Document(text=t, name=name)) for t in texts))
    return [DocumentFile(folder, source=name, number=k, side="train") for k, name in enumerate(SIZES)]


def test_every_source_has_its_share_of_bytes_at_every_moment(files: list[DocumentFile]):
    """To within one document of each source: at most 798 + 178 + 3998 bytes, counting é as two."""
    taken = Counter({0: 0, 1: 0, 2: 0})
    for drawn in islice(Mixture(files, WEIGHTS, seed=0), 3000):
        taken[drawn.source] += len(drawn.text.encode())
        for k, weight in enumerate(WEIGHTS.values()):
            assert abs(taken[k] - weight * taken.total()) <= 798 + 178 + 3998
    assert taken.total() > 500_000
    assert [taken[k] / taken.total() for k in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.01)


def test_a_source_gives_every_document_once_an_epoch_each_in_another_order(files: list[DocumentFile]):
    drawn = [d.text for d in islice(Mixture(files, WEIGHTS, seed=0), 3000) if d.source == 2]
    assert len(drawn) > 35
    epochs = [drawn[i : i + 7] for i in range(0, 35, 7)]
    assert all(sorted(epoch) == sorted(files[2].text(i) for i in range(7)) for epoch in epochs)
    assert all(one != other for one, other in pairwise(epochs))


def test_a_stopped_mix_goes_on_with_the_same_documents(files: list[DocumentFile]):
    whole = list(islice(Mixture(files, WEIGHTS, seed=3), 500))
    for stop in (0, 1, 137, 499):
        before = Mixture(files, WEIGHTS, seed=3)
        first = list(islice(before, stop))
        saved = json.dumps(before.state_dict())  # as a checkpoint would keep it
        after = Mixture(files, WEIGHTS, seed=3)
        after.load_state_dict(json.loads(saved))
        assert first + list(islice(after, 500 - stop)) == whole
    assert list(islice(Mixture(files, WEIGHTS, seed=4), 500)) != whole


def test_another_mix_is_not_taken_up(files: list[DocumentFile]):
    state = Mixture(files, WEIGHTS, seed=0).state_dict()
    with pytest.raises(ValueError, match="cannot take up the mix: its seed was 0 and is 1"):
        Mixture(files, WEIGHTS, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="cannot take up the mix: its weights was"):
        Mixture(files, WEIGHTS | {"a": 0.4}, seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match="cannot take up the mix: its "):
        Mixture(files[:2], WEIGHTS, seed=0).load_state_dict(state)


def test_a_source_without_documents_on_this_side_gives_its_share_away(files: list[DocumentFile], tmp_path: Path):
    path_of(tmp_path, 0, "held_out").write_bytes(b"")
    empty = DocumentFile(tmp_path, source="c", number=0, side="held_out")
    mixture = Mixture([*files[:2], empty], WEIGHTS, seed=0)
    taken: Counter[int] = Counter()
    for drawn in islice(mixture, 2000):
        taken[drawn.source] += len(drawn.text.encode())
    assert taken[0] / taken.total() == pytest.approx(0.5 / 0.8, abs=0.01)
    with pytest.raises(ValueError, match="none of the sources has a document"):
        Mixture([empty], WEIGHTS, seed=0)
