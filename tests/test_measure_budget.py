"""`abyssal eval DIR --budget`: a table, numbers, a page, and what effort means from then on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_models import thinking_model

from abyssal import cli
from abyssal.checkpoint.own_thinking import own_thinking
from abyssal.checkpoint.save import save_checkpoint
from abyssal.evals.page_budget import budget_page
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that thinks until it is stopped, and problems whose answer is whatever it says then."""
    path = tmp_path_factory.mktemp("home")
    tokenizer = Tokenizer(train_bpe(["one plus two is three"] * 20, vocab_size=300))
    model = thinking_model(opens_behind=tokenizer.assistant_id, think=tokenizer.think_id,
                           never=[tokenizer.end_think_id], vocab_size=tokenizer.vocab_size)
    save_checkpoint(path / "r1", model, tokenizer)
    lines = [json.dumps({"prompt": f"one plus {i}", "answer": str(i)}) for i in range(4)]
    (path / "own.jsonl").write_text("\n".join(lines) + "\n")
    return path


def test_each_budget_and_vote_is_a_row_a_number_and_a_point(home: Path, capsys: pytest.CaptureFixture[str]):
    asked = [str(home / "r1"), "--budget", "8,0,3", "--best-of", "1,2", "--data", str(home / "own.jsonl"),
             "--problems", "3", "--answers", "2", "--max-tokens", "16", "--out", str(home / "out")]
    assert cli.dispatch(["eval", *asked]) == 0
    said = capsys.readouterr().out
    assert said.count("one answer") == 4 and said.count("majority of 2") == 4 and "no limit" in said
    assert "too few right answers thought" in said and own_thinking(home / "r1") is None
    results = json.loads((home / "out" / "budget.json").read_text())
    points = results["points"]
    assert [(p["best_of"], p["budget"]) for p in points] == [(n, b) for n in (1, 2) for b in (0, 3, 8, None)]
    assert [p["thinking_tokens"] for p in points[:3]] == [0, 3, 8] and points[3]["thinking_tokens"] > 8
    assert all(p["n_problems"] == 3 for p in points) and results["answers"] == 2 and results["landing"] == ""
    assert all(two["tokens"] == 2 * one["tokens"] for one, two in zip(points[:4], points[4:], strict=True))
    page = (home / "out" / "budget.html").read_text()
    assert page.count("<tr>") == 1 + 8 and "majority of 2</text>" in page
    assert page.count('class="span"') == 2  # all of them wrong at 16 tokens: one point a line
    assert cli.dispatch(["eval", *asked]) == 0  # the same again
    assert json.loads((home / "out" / "budget.json").read_text()) == results


def test_the_page_says_what_effort_means_and_escapes_what_others_wrote():
    one = {"budget": 4, "best_of": 1, "accuracy": 0.5, "ci_low": 0.4, "ci_high": 0.6, "n_problems": 9, "tokens": 12.0,
           "thinking_tokens": 3.5, "cut_share": 0.25, "truncated_share": 0.0}
    results = {"checkpoint": "<b>r1</b>", "data": "a.jsonl", "n_problems": 9, "answers": 4, "temperature": 0.6,
               "points": [one, one | {"budget": None}, one | {"budget": 2, "tokens": 1200.0}],
               "lengths": {"n_answers": 40, "lengths": {"low": 5, "medium": 8, "high": 1300}}}
    page = budget_page(results)
    assert "half, 80 % and 95 % took at most 5 (low), 8 (medium), 1,300 (high) tokens" in page
    assert "<b>r1</b>" not in page and "&lt;b&gt;r1" in page
    assert page.count('class="span"') == 2 and page.count("<tr>") == 1 + 3  # equal points are drawn once
    # a decade is as wide as the next: 12, 120 and 1200 stand apart by the same
    ten, hundred = (float(page.split(f'text-anchor="middle">{tick}</text>')[0].rsplit('x="', 1)[1].split('"')[0])
                    for tick in (20, 200))
    left, right = (float(x) for x in (page.split('class="axis" x1="')[1].split('"')[0],
                                      page.split('class="axis" x1="')[1].split('x2="')[1].split('"')[0]))
    assert hundred - ten == pytest.approx((right - left) / 2, abs=0.2)


@pytest.mark.parametrize(("options", "message"), [
    (["--budget", "8,-1"], "--budget 8,-1: '-1' is no number from 0 up; give such as 0,16,64"),
    (["--budget", "8", "--best-of", "0"], "--best-of 0: '0' is no number from 1 up"),
    (["--budget", "8", "--best-of", "4", "--answers", "2"], "--best-of 4 needs as many answers a problem"),
    (["--budget", "8", "--max-tokens", "10"], "--max-tokens 10 leaves no room for an answer behind 8 tokens"),
    (["--budget", "8", "--problems", "0"], "problems=0 leaves nothing to measure"),
])
def test_what_cannot_be_measured_is_refused(home: Path, options: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        cli.dispatch(["eval", str(home / "r1"), "--out", str(home / "none"), *options])
    assert not (home / "none").exists()
