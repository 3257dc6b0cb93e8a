"""A reward model on disk: the same bits back, the same scores in transformers, and damage named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_models import KINDS, small_model

from abyssal.checkpoint.save_reward import load_reward_model, save_reward_model
from abyssal.model.reward_head import RewardModel
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer

CPU = torch.device("cpu")
FACTS = {"heads": {"helpfulness": {"accuracy": 0.75}}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe(["name two colours"] * 9, vocab_size=300))


def saved(directory: Path, tokenizer: Tokenizer, kind: str) -> RewardModel:
    policy = small_model(kind, vocab_size=tokenizer.vocab_size)
    model = RewardModel.from_policy(policy, 2, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(1))
    save_reward_model(directory, model, tokenizer, heads=("helpfulness", "safety"), facts=FACTS)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_what_was_saved_bit_for_bit(kind: str, tokenizer, tmp_path: Path):
    model = saved(tmp_path / "model", tokenizer, kind)
    loaded, facts = load_reward_model(tmp_path / "model", dtype=torch.float32, device=CPU)
    assert facts == FACTS
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loaded.body.config == model.body.config and not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize("kind", ["mla_moe", "gqa_dense"])
def test_transformers_reads_it_as_a_classifier_with_the_same_scores(kind: str, tokenizer, tmp_path: Path):
    from transformers import AutoModelForSequenceClassification

    model = saved(tmp_path / "model", tokenizer, kind)
    theirs, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.config.id2label == {0: "helpfulness", 1: "safety"}
    ids_BT = torch.tensor([[0, 7, 8, 9, 10], [0, 20, 21, 22, 23]])
    with torch.inference_mode():
        assert torch.allclose(theirs(ids_BT).logits, model(ids_BT, torch.tensor([4, 9])), atol=1e-4)


def test_damage_is_named_in_one_line(tokenizer, tmp_path: Path):
    directory = tmp_path / "model"
    saved(directory, tokenizer, "gqa_dense")
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="not there or damaged") as error:
        load_reward_model(directory, dtype=torch.float32, device=CPU)
    assert "\n" not in str(error.value)
    (directory / "model.safetensors").write_bytes(whole)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"id2label": {"0": "one"}}))
    with pytest.raises(ValueError, match="1 tensors do not fit config.json, first score.weight"):
        load_reward_model(directory, dtype=torch.float32, device=CPU)
    with pytest.raises(OSError, match="not there or damaged"):
        load_reward_model(tmp_path / "nothing", dtype=torch.float32, device=CPU)
