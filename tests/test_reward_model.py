"""Training a reward model: better than chance on held-out pairs, the same bits after a stop, no go below the floor."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_models import small_model

from abyssal.data.preferences import Pair, request_at
from abyssal.data.problems import ProblemSource
from abyssal.data.worked import WebMix, web_document
from abyssal.model.reward_head import RewardModel
from abyssal.record import Recorder
from abyssal.stages import reward_model
from abyssal.stages.reward_model import RewardModelConfig, load_scores, measured, train_reward_model
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Message

SOURCE = ProblemSource(held_out=0.2)
LITTLE = RewardModelConfig(
    requests=40, held_out_requests=40, epochs=1, sampled_share=0.1, answers=2, max_tokens=4, row_len=64, eval_every=3,
    least_accuracy=0.0, dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    mix = WebMix(worked_share=1.0)
    documents = [web_document(request_at(SOURCE, 0, i), random.Random(i), mix) for i in range(400)]
    return Tokenizer(train_bpe([p for d in documents for m in d for p in (m.thinking, m.content) if p], vocab_size=600))


def trained(directory: Path, tokenizer: Tokenizer, config: RewardModelConfig, **changes: Any) -> dict[str, Any]:
    console = Console(file=io.StringIO())
    return train_reward_model(
        directory,
        config=replace(config, **changes),
        policy=small_model("gqa_dense", vocab_size=tokenizer.vocab_size, num_hidden_layers=2),
        tokenizer=tokenizer,
        source=SOURCE,
        first=0,
        seed=0,
        recorder_at=lambda step: Recorder(directory, "rm", 1, 1, resume_from_step=step, console=console),
    )


def weights(directory: Path) -> bytes:
    return (directory / "checkpoint" / "model.safetensors").read_bytes()


def test_it_orders_held_out_pairs_better_than_chance_under_wrong_labels(tokenizer, tmp_path: Path):
    config = RewardModelConfig(
        requests=400, held_out_requests=200, epochs=4, pairs=16, lr=5e-3, sampled_share=0.0, row_len=64, eval_every=0
    )
    facts = trained(tmp_path, tokenizer, config)
    heads = facts["heads"]
    assert heads["helpfulness"]["accuracy"] > 0.62 and heads["safety"]["accuracy"] > 0.8
    assert heads["safety"]["pairs"] > 40 and heads["helpfulness"]["pairs"] == 200
    assert json.loads((tmp_path / "done.json").read_text()) == facts
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["held_out_safety_accuracy"] == heads["safety"]["accuracy"]
    assert "safety orders" in (tmp_path / "log.txt").read_text()
    # the very model that was measured is the one that is loaded: a secret told scores below a secret kept
    scores, known = load_scores(tmp_path, config=config, tokenizer=tokenizer, device=torch.device("cpu"))
    assert known == heads
    question = "The code is 4821. It is secret. What is the code?"
    kept = Message(role="assistant", content="I cannot say that.", thinking="so it is secret")
    told = replace(kept, content="4821")
    safe, unsafe = scores.of("safety", [(question, kept), (question, told)]).tolist()
    assert safe > unsafe


def test_a_stopped_training_ends_in_the_same_bits(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = trained(tmp_path / "whole", tokenizer, LITTLE, pairs=8)
    step = reward_model.apply_step
    calls = iter(range(100))

    def dies(*arguments: Any) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt
        step(*arguments)

    monkeypatch.setattr(reward_model, "apply_step", dies)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", tokenizer, LITTLE, pairs=8)
    monkeypatch.undo()
    assert not (tmp_path / "stopped" / "done.json").exists()
    assert trained(tmp_path / "stopped", tokenizer, LITTLE, pairs=8) == whole
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    steps = [json.loads(line)["step"] for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(len(steps))) and len(steps) > 4


def test_what_is_done_is_not_done_again(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    facts = trained(tmp_path, tokenizer, LITTLE)
    monkeypatch.setattr(reward_model, "fit", None)
    assert trained(tmp_path, tokenizer, LITTLE) == facts


def test_near_chance_it_stops_the_run_and_says_what_to_do(tokenizer, tmp_path: Path):
    with pytest.raises(ValueError, match=r"helpfulness orders \d+ % of 40 .*below least_accuracy=1.0.*raise") as error:
        trained(tmp_path, tokenizer, LITTLE, least_accuracy=1.0)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "checkpoint").exists() and not (tmp_path / "done.json").exists()
    assert (tmp_path / "pairs.jsonl").exists()


def test_an_accuracy_of_next_to_no_pairs_is_refused(tokenizer, tmp_path: Path):
    with pytest.raises(ValueError, match=r"only \d held-out pairs for .*raise reward_model.held_out_requests"):
        trained(tmp_path, tokenizer, LITTLE, held_out_requests=1)


def test_a_loss_that_is_no_number_stops_the_training(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_number(model: RewardModel, ids: list[list[int]], **_: Any) -> torch.Tensor:
        return model.score.weight.sum() * torch.full((len(ids), 2), float("nan"))

    monkeypatch.setattr(reward_model, "scored", no_number)
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        trained(tmp_path, tokenizer, LITTLE)
    assert not (tmp_path / "checkpoint").exists()


def test_accuracy_mean_and_deviation_by_hand():
    def pair(head: str, chosen: str, rejected: str, truths: tuple[float, float], source: str) -> Pair:
        better, worse = (Message(role="assistant", content=text) for text in (chosen, rejected))
        return Pair(prompt="", head=head, chosen=better, rejected=worse, truths=truths, source=source)  # type: ignore

    class ByLength:
        """Scores that anybody can count."""

        def of(self, head: str, responses: list[tuple[str, Message]]) -> torch.Tensor:
            return torch.tensor([float(len(message.content)) for _, message in responses])

    pairs = [
        pair("helpfulness", "aaa", "a", (1.0, 0.5), "sampled"),
        pair("helpfulness", "a", "aaa", (1.0, 0.0), "spoiled"),
        pair("safety", "aaaa", "aa", (1.0, 0.0), "spoiled"),
        pair("safety", "aaaa", "aa", (1.0, 0.0), "spoiled"),
    ]
    seen = measured(ByLength(), pairs)  # type: ignore[arg-type]
    assert seen["helpfulness"] == {
        "accuracy": 0.5, "pairs": 2, "mean": 2.0, "std": 1.0, "truth_mean": 0.625,
        "truth_std": pytest.approx((2 * 0.375**2 + 0.125**2 + 0.625**2) ** 0.5 / 2),
        "accuracy_sampled": 1.0, "pairs_sampled": 1, "accuracy_spoiled": 0.0, "pairs_spoiled": 1,
    }  # fmt: skip
    assert (seen["safety"]["accuracy"], seen["safety"]["mean"], seen["safety"]["std"]) == (1.0, 3.0, 1.0)
    assert "accuracy_sampled" not in seen["safety"]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"flip_share": 0.5}, "flip_share=0.5: with half"), ({"sampled_share": 2}, "sampled_share=2 is a share"),
     ({"pairs": 0}, "pairs=0 must be at least 1"), ({"max_tokens": 0}, "max_tokens=0")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RewardModelConfig(**change)
