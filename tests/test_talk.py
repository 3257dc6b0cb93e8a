"""The conversation in the terminal: what is asked of the thinking, Ctrl-C in the middle of it, the best of several."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console
from small_models import small_model, thinking_model

import abyssal
from abyssal import LM, Message, SamplingParams
from abyssal.checkpoint.own_thinking import ThinkingLengths, write_lengths
from abyssal.checkpoint.save import save_checkpoint
from abyssal.engine.disk_cache import DiskCache
from abyssal.engine.draft_tuner import DraftStats
from abyssal.talk import Manner, answer, answer_room, caching, drafting, talk
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.chat import LANDING, landing_ids
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import ThinkingLimits

QUESTION = [Message(role="user", content="one plus two?")]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    """It opens its thinking by itself and never closes it."""
    tokenizer = Tokenizer(train_bpe(["one plus two is three", "time is up; the answer follows"] * 20, vocab_size=400))
    never = [tokenizer.end_think_id, tokenizer.eos_id]
    model = thinking_model(opens_behind=tokenizer.assistant_id, think=tokenizer.think_id, never=never,
                           vocab_size=tokenizer.vocab_size, max_position_embeddings=256)
    path = tmp_path_factory.mktemp("checkpoint") / "r1"
    save_checkpoint(path, model, tokenizer)
    write_lengths(path, ThinkingLengths(50, {"low": 20, "medium": 30, "high": 40}, LANDING))
    return abyssal.load(path)


@pytest.fixture
def console(tmp_path: Path):
    with (tmp_path / "said.txt").open("w+", encoding="utf-8") as file:
        yield Console(file=file, width=200)


def said(console: Console) -> str:
    console.file.seek(0)
    return console.file.read()


def interrupted_at(lm: LM, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> list[int]:
    """Ctrl-C arrives while these steps of the engine compute; returns how many ids were drawn before each."""
    step, count, drawn = lm.engine.step, [0], []

    def interrupted():
        count[0] += 1
        if count[0] in steps:
            drawn.append(len(lm.engine.drawn(max(lm.engine._sequences))))
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    monkeypatch.setattr(lm.engine, "step", interrupted)
    return drawn


def test_ctrl_c_while_it_thinks_asks_for_the_answer(lm: LM, monkeypatch: pytest.MonkeyPatch, console: Console):
    limits = lm.limits()
    landing = lm.tokenizer.decode(list(limits.landing))
    drawn = interrupted_at(lm, monkeypatch, {6})
    before = signal.getsignal(signal.SIGINT)
    message = answer(lm, QUESTION, Manner(params=SamplingParams(max_tokens=60), limits=limits), console=console)
    # the id of the step that was under way, then the landing: <think> is none of the thinking
    thinking = lm.tokenizer.encode_after(message.thinking)
    assert message.thinking.endswith(landing) and message.content
    assert len(lm.tokenizer.decode(thinking)) > len(landing)
    assert said(console).count(landing.strip()) == 1
    free = abyssal.LM(lm.model, lm.tokenizer).chat(QUESTION, SamplingParams(max_tokens=drawn[0] + 1))
    assert message.thinking == free.thinking + landing
    assert signal.getsignal(signal.SIGINT) is before and lm.engine.n_unfinished == 0


def test_a_second_ctrl_c_and_one_at_the_answer_end_it(lm: LM, monkeypatch: pytest.MonkeyPatch, console: Console):
    manner = Manner(params=SamplingParams(max_tokens=60), limits=lm.limits())
    interrupted_at(lm, monkeypatch, {4, 5})
    with pytest.raises(KeyboardInterrupt):
        answer(lm, QUESTION, manner, console=console)
    monkeypatch.undo()
    interrupted_at(lm, monkeypatch, {3})
    with pytest.raises(KeyboardInterrupt):
        answer(lm, QUESTION, Manner(params=manner.params, thinking="off"), console=console)
    assert lm.engine.n_unfinished == 0 and lm.engine.n_free_blocks == lm.engine._scheduler.pool.n_usable


def test_effort_is_a_budget_for_this_model_and_the_answer_has_room_beside_it(lm: LM, monkeypatch: pytest.MonkeyPatch):
    n_landing = len(landing_ids(lm.tokenizer, LANDING))
    assert lm.effort("low").budget == 20 + n_landing + 1
    limits = lm.limits(effort="medium")
    assert limits.budget == 31 + n_landing and answer_room(None, limits) == 256 + limits.budget
    assert answer_room(None, None) == 256 and answer_room(9, None) == 9 and answer_room(4, lm.limits(budget=1)) == 4
    with pytest.raises(ValueError, match="1 tokens of thinking leave no room for an answer in --max-tokens 3; give at"):
        answer_room(3, lm.limits(budget=1))
    with pytest.raises(ValueError, match="effort='low' is a budget, and budget=3 another"):
        lm.limits(effort="low", budget=3)
    message = lm.chat(QUESTION, SamplingParams(max_tokens=80), effort="low")
    assert message.thinking.endswith(lm.tokenizer.decode(list(limits.landing))) and message.content
    assert lm.chat(QUESTION, SamplingParams(max_tokens=40), budget=0).thinking == ""
    assert LM(lm.model, lm.tokenizer).limits(effort="high") == ThinkingLimits(budget=128)  # nothing measured: no words
    # without options only loops are looked for, and nothing where thinking cannot be marked
    assert lm.limits() == ThinkingLimits(landing=limits.landing, stop_loops=True)
    monkeypatch.setattr(Tokenizer, "has_thinking", property(lambda _: False))
    assert lm.limits() is None and lm.limits(min_thinking=1).at_least == 1  # which the engine refuses


def test_the_best_of_several_is_what_most_say_or_what_a_judge_finds_best(lm: LM):
    params = SamplingParams(max_tokens=12, seed=3)
    free = lm.best(QUESTION, 4, params=params)
    assert free.worth == [None] * 4 and free.chosen == 0 and free.n_tokens == 48  # none came to its end
    texts = iter(["7", "12", " 12. ", "7", "12"])
    whole = lm.engine.generate

    def scripted(prompts, how, **more):
        assert len({tuple(prompt) for prompt in prompts}) == 1
        end = [lm.tokenizer.eos_id]
        return [abyssal.types.Completion(prompt_ids=p, ids=lm.tokenizer.encode(next(texts)) + end, logps=[],
                                         finish_reason="stop") for p in prompts]

    lm.engine.generate = scripted
    try:
        best = lm.best(QUESTION, 5, params=params)
        assert best.chosen == 1 and best.worth == [2, 3, 3, 2, 3] and best.message.content == "12"
        texts = iter(["a", "bbb", "cc", "d"])
        scores = {"a": 1, "bbb": None, "cc": 2, "d": math.nan}  # what cannot be judged is not chosen
        judged = lm.best(QUESTION, 4, by=lambda said: [scores[message.content] for message in said])
        assert judged.message.content == "cc" and judged.worth == [1, None, 2, None]
    finally:
        lm.engine.generate = whole
    with pytest.raises(ValueError, match="n=0 answers leave nothing"):
        lm.best(QUESTION, 0)


def test_what_the_command_line_asks_reaches_the_answer(
    lm: LM, monkeypatch: pytest.MonkeyPatch, console: Console, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("abyssal.talk.load", lambda *_, **__: lm)
    ask = {"params": SamplingParams(seed=1), "thinking": "auto", "prompt": "one?", "console": console}
    talk(Path("r1"), **ask, effort="low", max_tokens=70)
    told = capsys.readouterr().err
    assert f"effort low: {lm.effort('low').budget} tokens of thinking; 50% of 50 right answers" in told
    assert "the answer follows." in said(console)
    talk(Path("r1"), **ask, max_tokens=20, best_of=3)
    assert capsys.readouterr().err == "none came to its end; 60 tokens\n"
    for options, message in [({"raw": True, "best_of": 2}, "--best-of 2 chooses"), ({"best_of": 0}, "--best-of 0")]:
        with pytest.raises(ValueError, match=message):
            talk(Path("r1"), **ask, **options)


def test_stats_say_in_the_end_what_drafts_did(lm: LM, console: Console, monkeypatch: pytest.MonkeyPatch):
    """Never anything but what was counted, and a plain word where nothing was."""
    monkeypatch.setattr(type(lm.engine), "draft_stats", property(lambda engine: None))
    assert drafting(lm) == "no drafts were made"
    few = DraftStats("MTP", 2, (0.9, 0.5), 2.4, 0.55, 4, 3)
    monkeypatch.setattr(type(lm.engine), "draft_stats", property(lambda engine: few))
    assert "3 of 4 were right" in drafting(lm) and "too few to say" in drafting(lm) and "0.55" not in drafting(lm)
    known = DraftStats("MTP", 2, (0.9, 0.5), 2.4, 1.31, 400, 280)
    monkeypatch.setattr(type(lm.engine), "draft_stats", property(lambda engine: known))
    assert drafting(lm) == ("drafts by MTP: 280 of 400 were right (by place: 90%, 50%); 2.40 tokens a step, "
                            "1.31 times the speed without; now 2 a step")
    monkeypatch.setattr("abyssal.talk.load", lambda *args, **kwargs: lm)
    params = SamplingParams(max_tokens=4)
    for stats in (False, True):
        talk(Path("r1"), params=params, max_tokens=4, thinking="auto", prompt="one", console=console, stats=stats)
        assert said(console).count("280 of 400") == stats


def test_stats_say_what_was_found_in_caches(lm: LM, tmp_path: Path):
    """The same question twice: all blocks but the last are there the second time, and on disk for another process."""
    prompt, params = list(range(20)) * 8, SamplingParams(max_tokens=2)  # 160 ids: two blocks of 64
    first = LM(lm.model, lm.tokenizer, disk_cache=DiskCache(folder=tmp_path))
    first.engine.generate([prompt], params)
    first.engine.generate([prompt], params)
    assert caching(first).startswith("128 of 320 tokens of prompts were found in the cache")
    first.engine.close()
    second = LM(lm.model, lm.tokenizer, disk_cache=DiskCache(folder=tmp_path))
    second.engine.generate([prompt], params)
    assert caching(second) == "128 of 160 tokens of prompts were found in the cache, 128 of them on disk"
    second.engine.close()


def test_mtp_drafts_only_where_it_is_asked_to(lm: LM):
    """Of a model of a few layers the module is too large a part; look-up costs next to nothing."""
    tokenizer = lm.tokenizer
    with_mtp = small_model("mla_moe", vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=1)
    without = small_model("gqa_dense", vocab_size=tokenizer.vocab_size)
    assert with_mtp.config.num_nextn_predict_layers and LM(with_mtp, tokenizer).engine.draft_stats is None
    assert LM(with_mtp, tokenizer, speculate="auto").engine.draft_stats.drafter == "MTP"
    assert LM(without, tokenizer).engine.draft_stats.drafter == "prompt look-up"
    assert LM(without, tokenizer, speculate="off").engine.draft_stats is None
