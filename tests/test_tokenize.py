"""Stage `tokenize` on a user's corpus: what is refused never becomes tokens, and the report says what happened."""

import json
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from abyssal.data.clean import CleanConfig
from abyssal.data.loader import TokenShards
from abyssal.data.problems import ProblemSource
from abyssal.evals.page import write_report
from abyssal.record import Recorder
from abyssal.stages.tokenize import DataConfig, TextStream, TokenizerConfig, tokenize
from abyssal.tokens.tokenizer import Tokenizer

QUESTION = "A ship leaves the port at nine with forty people; how many are on it at Mainz?"
LEAKED = f"Zanzibar said: {QUESTION.upper()} And nobody knew, for the ship had gone down long before that day."
WORDS = "sea deep light ground fish sand wave wind salt stone coral ship rope mast sail crew port tide".split()


def page(i: int) -> str:
    words = [WORDS[(i * j * j + j) % 17] for j in range(1, 40)]
    return f"Page {i} of the log. " + " ".join(
        f"The {word} was seen by {WORDS[(i + len(word)) % 17]}." for word in words
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A folder of eighty pages, three more that do not belong there, and a JSONL of forty."""
    home = tmp_path_factory.mktemp("home")
    (home / "log").mkdir()
    for i in range(80):
        (home / "log" / f"{i}.txt").write_text(page(i))
    (home / "log" / "leak.txt").write_text(LEAKED)
    (home / "log" / "copy.txt").write_text(page(5).upper())
    (home / "log" / "blank.txt").write_text(" ")
    (home / "more.jsonl").write_text("".join(json.dumps({"text": "More. " + page(i)}) + "\n" for i in range(100, 140)))
    return DataConfig(
        mix={str(home / "log"): 3.0, str(home / "more.jsonl"): 1.0},
        text_share=0.9,
        fim_rate=0.0,
        tokens=120_000,
        problems=ProblemSource(levels=(1, 2)),
        held_out_tokens=2_000,
        clean=CleanConfig(near_duplicates=0, limits=replace(CleanConfig().limits, repeated_grams=1.0)),
    )


def run_stage(directory: Path, data: DataConfig) -> Tokenizer:
    with Recorder(directory, "tokenize", 1, 10) as recorder:
        return tokenize(
            directory, config=TokenizerConfig(vocab_size=320, sample_bytes=8_000), data=data,
            evaluation={"ships": [QUESTION]}, row_len=128, seed=0, recorder=recorder,
        )  # fmt: skip


@pytest.fixture(scope="module")
def done(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "tokenize"
    run_stage(directory, data)
    return directory


@pytest.fixture(scope="module")
def report(done: Path) -> dict[str, Any]:
    return json.loads((done / "data_report.json").read_text(encoding="utf-8"))


def text_of(directory: Path, split: str) -> str:
    tokenizer = Tokenizer.load(directory / "tokenizer")
    return "".join(tokenizer.decode(tokens.tolist()) for tokens in TokenShards(directory / split).tokens)


def test_what_is_refused_never_becomes_tokens(done: Path):
    train = text_of(done, "train")
    pages = set(re.findall(r"(More. )?Page (\d+) of the log", train))
    assert 70 <= sum(more == "" for more, _ in pages) <= 80 and 30 <= sum(more != "" for more, _ in pages) <= 40
    assert "Zanzibar" not in train + text_of(done, "held_out") and "PAGE 5" not in train


def test_the_report_counts_by_source_and_reason(data: DataConfig, report: dict[str, Any]):
    log, more = data.mix
    assert report["weights"] == {log: 0.75, more: 0.25}
    assert report["total"]["read"] == 123 and report["total"]["kept"] == 120
    assert report["sources"][log]["refused"] == {"empty": 1, "exact duplicate": 1, "evaluation item": 1}
    assert report["sources"][more]["refused"] == {}
    assert report["languages"] == {"en": 121}  # the leaked page is English too; blank and copy are not asked
    assert [hit["item"] for hit in report["evaluation"]["hits"]] == [QUESTION]


def test_the_report_says_how_often_each_source_was_read_over(data: DataConfig, report: dict[str, Any]):
    """Three quarters of the text are from the log, in bytes, however often its pages must come again for it."""
    used = report["train_text"]
    log, more = (used[name] for name in data.mix)
    assert log["bytes"] / (log["bytes"] + more["bytes"]) == pytest.approx(0.75, abs=0.03)
    assert log["epochs"] == pytest.approx(log["documents"] / 80, rel=0.1)  # a few of the 80 are held out
    assert log["epochs"] > 1.5 and more["epochs"] > 1


def test_the_step_line_counts_documents(done: Path):
    entries = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    reading = [entry for entry in entries if entry["part"] == "documents"]
    assert reading[-1]["step"] == 19 and [entry["step"] for entry in entries[-3:]] == [20, 21, 22]
    assert reading[-1]["kept"] + reading[-1]["refused"] == 123 and reading[-1]["documents_per_s"] > 0


def test_the_page_shows_it(done: Path, report: dict[str, Any]):
    html = write_report(done.parent).read_text(encoding="utf-8")
    section = html[html.index('<section id="data">') :]
    section = section[: section.index("</section>")]
    for seen in ("75.0\xa0%", "evaluation item", "exact duplicate", "1 of 1 evaluation items", "10 words", "en 121"):
        assert seen in section, seen


def test_the_same_data_gives_the_same_rows(done: Path, data: DataConfig, tmp_path: Path):
    run_stage(tmp_path / "tokenize", data)
    for name in ("train/tokens-00000.bin", "held_out/tokens-00000.bin", "documents/00-train.jsonl"):
        assert (tmp_path / "tokenize" / name).read_bytes() == (done / name).read_bytes()


def test_text_is_taken_in_pieces_and_ends_with_the_end_token(done: Path, data: DataConfig):
    tokenizer = Tokenizer.load(done / "tokenizer")
    streams = [TextStream(done / "documents", data, tokenizer, split="train", seed=0) for _ in range(2)]
    whole = streams[0].take(5000)
    assert [id for n in (1, 999, 4000) for id in streams[1].take(n)] == whole
    assert streams[0].used() == streams[1].used()
    ends = [i for i, id in enumerate(whole) if id == tokenizer.eos_id]
    n_documents = sum(used["documents"] for used in streams[0].used().values())
    assert len(ends) in (n_documents, n_documents - 1)  # the last one may be cut


def test_a_wrong_mix_is_named():
    with pytest.raises(ValueError, match="data.mix gives docs the weight 0; give a positive one or drop it"):
        DataConfig(mix={"python": 1.0, "docs": 0})
    with pytest.raises(ValueError, match="text_share=1.5 is outside"):
        DataConfig(text_share=1.5)


def test_no_text_wanted_none_read(data: DataConfig, tmp_path: Path):
    run_stage(tmp_path / "tokenize", replace(data, mix={}, corpus="nowhere", text_share=0.0))
    assert not (tmp_path / "tokenize" / "documents").exists()
    assert list(islice(TokenShards(tmp_path / "tokenize" / "train").tokens, 1))
