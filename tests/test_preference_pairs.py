"""Pairs for a run: which come from the policy, which labels are wrong, and that their file gives them back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from abyssal.data.preferences import Pair
from abyssal.data.problems import ProblemSource, Split
from abyssal.reward.open_request import REFUSAL
from abyssal.stages.preference_pairs import draw_pairs, read_pairs, write_pairs
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.chat import render
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Completion, FinishReason, Message


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe(["I cannot say that. 我不能说。"] * 9, vocab_size=300))


def spoken(message: Message, tokenizer: Tokenizer) -> list[int]:
    """What the assistant itself writes."""
    rendered = render([message], tokenizer)
    return [i for i, learned in zip(rendered.ids, rendered.mask, strict=True) if learned]


class Parrot:
    """An engine that refuses in English and in Chinese in turn, whatever it is asked; every fourth answer is cut off
    if it is told to be slow."""

    def __init__(self, tokenizer: Tokenizer, *, slow: bool = False) -> None:
        self.tokenizer, self.slow, self.n_prompts = tokenizer, slow, 0

    def generate(self, prompts: list[list[int]], params: list[Any]) -> list[Completion]:
        self.n_prompts += len(prompts)
        return [self.answer(i, prompt) for i, prompt in enumerate(prompts)]

    def answer(self, i: int, prompt: list[int]) -> Completion:
        ids = spoken(Message(role="assistant", content=list(REFUSAL.values())[i % 2]), self.tokenizer)
        reason: FinishReason = "length" if self.slow and i % 2 else "stop"
        return Completion(prompt_ids=prompt, ids=ids, logps=[0.0] * len(ids), finish_reason=reason)


def drawn(engine: Parrot, *, split: Split = "train", **changes: Any) -> list[Pair]:
    options = {"first": 7, "requests": 150, "answers": 2, "sampled_share": 0.5, "flip_share": 0.1, "max_tokens": 9}
    source = ProblemSource(held_out=0.2)
    return draw_pairs(engine, engine.tokenizer, source, split=split, seed=3, **(options | changes))  # type: ignore


def test_a_pair_a_head_the_policys_own_where_they_differ(tokenizer):
    engine = Parrot(tokenizer)
    pairs = drawn(engine)
    counts = Counter((pair.head, pair.source) for pair in pairs)
    # on the half that it answers, only refusals of secrets in two languages differ, and in helpfulness alone
    assert counts["helpfulness", "sampled"] + counts["helpfulness", "spoiled"] == 150
    assert 8 < counts["helpfulness", "sampled"] < 40 and ("safety", "sampled") not in counts
    assert 20 < counts["safety", "spoiled"] < 60
    assert 110 < engine.n_prompts < 190  # two answers to about half of 150
    sampled = [pair for pair in pairs if pair.source == "sampled"]
    assert all(sorted(pair.truths) == [0.5, 1.0] for pair in sampled)


def test_labels_are_wrong_in_their_share_and_never_on_the_held_out_side(tokenizer):
    flipped = sum(pair.flipped for pair in drawn(Parrot(tokenizer), requests=600, flip_share=0.1, sampled_share=0.0))
    assert 45 < flipped < 110  # of about 750 pairs
    held_out = drawn(Parrot(tokenizer), split="held_out", flip_share=0.0)
    assert not any(pair.flipped for pair in held_out)
    assert {pair.prompt for pair in held_out}.isdisjoint(pair.prompt for pair in drawn(Parrot(tokenizer)))


def test_answers_that_were_cut_off_make_no_pair(tokenizer):
    assert {pair.source for pair in drawn(Parrot(tokenizer, slow=True))} == {"spoiled"}


def test_pairs_are_a_function_of_their_seed_and_come_back_from_their_file(tokenizer, tmp_path: Path):
    pairs = {"train": drawn(Parrot(tokenizer)), "held_out": drawn(Parrot(tokenizer), split="held_out", requests=9)}
    assert pairs["train"] == drawn(Parrot(tokenizer))
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_a_broken_line_is_named(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"split": "train", "prompt": "?"}\n')
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: not a pair"):
        read_pairs(path)
