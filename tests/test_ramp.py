"""Pretraining with a growing batch and V3's rate: what each step takes, and that a resumed run ends in its bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_models import KINDS

from abyssal.data.loader import RowLoader, TokenWriter
from abyssal.model.config import ModelConfig
from abyssal.record import Recorder
from abyssal.stages import pretrain as stage
from abyssal.stages.pretrain import PretrainConfig, pretrain
from abyssal.tokens.bpe import train_bpe
from abyssal.tokens.tokenizer import Tokenizer

CONFIG = PretrainConfig(
    steps=8, row_len=16, rows=8, micro_rows=2, rows_start=2, ramp_tokens=16 * 20, shape="v3", warmup=2, stable=0.4,
    fall_until=0.7, last_from=0.9, floor=0.1, last=0.03, lr=0.01, eval_every=0, eval_rows=2, save_every=3,
)  # fmt: skip
# 2 + 6 x seen / 20 rows, in pairs: 2, 2, 2, 2, 4 (8 seen), 4 (12), 6 (16), 8 (22)
ROWS = [2, 2, 2, 2, 4, 4, 6, 8]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokens")
    generator = torch.Generator().manual_seed(0)
    for split, n in (("train", 16 * 40), ("held_out", 16 * 2)):
        with TokenWriter(directory / split, vocab_size=61) as writer:
            writer.add(torch.randint(2, 61, (n,), generator=generator).tolist())
    return directory


def trained(stage_dir: Path, tokens: Path, config: PretrainConfig = CONFIG) -> list[dict[str, Any]]:
    tokenizer = Tokenizer(train_bpe(["a"] * 9, vocab_size=276))
    pretrain(
        stage_dir, config=config, model_config=ModelConfig(**KINDS["mla_moe_query_latent"]), tokens_dir=tokens,
        tokenizer=tokenizer, seed=0, device=torch.device("cpu"),
        recorder_at=lambda step: Recorder(
            stage_dir, "pretrain", 1, 1, resume_from_step=step, console=Console(quiet=True)
        ),
    )  # fmt: skip
    return [json.loads(line) for line in (stage_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_batch_grows_and_the_rate_has_five_parts(tokens: Path, tmp_path: Path):
    metrics = trained(tmp_path, tokens)
    assert [entry["rows"] for entry in metrics] == ROWS
    assert [entry["tokens"] for entry in metrics] == [16 * n for n in ROWS]
    # of 30 rows 0, 2, 4, 6, 8, 12, 16 and 22 were seen: warm-up, warm-up, four flat, then a cosine from 12/30 to 21/30
    falling = 0.1 + 0.9 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (16 - 12) / 9)).item())
    assert [entry["lr"] for entry in metrics] == pytest.approx(
        [0.005, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01 * falling, 0.001], rel=1e-5
    )


def test_a_run_that_was_interrupted_in_the_ramp_ends_in_the_same_bits(tokens: Path, tmp_path: Path, monkeypatch):
    whole = trained(tmp_path / "whole", tokens)
    real = stage.save_state

    def killed(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "save_state", killed)
    for _ in range(2):  # after step 3 and after step 6
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "broken", tokens)
    monkeypatch.setattr(stage, "save_state", real)
    broken = trained(tmp_path / "broken", tokens)
    timed = ("time_s", "tokens_per_s", "memory_gb")
    for entry in (*whole, *broken):
        for name in timed:
            entry.pop(name)
    assert whole == broken
    file = "checkpoint/model.safetensors"
    assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "broken" / file).read_bytes()


def test_without_a_ramp_nothing_is_said_of_rows(tokens: Path, tmp_path: Path):
    config = replace(CONFIG, rows_start=0, ramp_tokens=0, shape="wsd", steps=1)
    assert "rows" not in trained(tmp_path, tokens, config)[0]
    assert config.rows_at(0) == config.rows_at(10**9) == 8


def test_a_loader_deals_other_numbers_of_rows_and_misses_none(tokens: Path):
    steady = RowLoader(tokens / "train", row_len=16, rows_per_step=4, seed=0)
    growing = RowLoader(tokens / "train", row_len=16, rows_per_step=4, seed=0)
    want = torch.cat([steady.next().ids_BT for _ in range(3)])
    assert torch.equal(torch.cat([growing.next(n).ids_BT for n in (1, 3, 8)]), want)
    assert growing.position == steady.position == 12


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rows_start": 10}, "rows_start=10 must lie in 1..rows=8"),
        ({"rows_start": 3}, "rows_start=3 is not a multiple of micro_rows=2"),
        ({"ramp_tokens": 0}, "rows_start=2 and ramp_tokens=0: a ramp of the batch needs both"),
        ({"rows_start": 0}, "rows_start=0 and ramp_tokens=320"),
        ({"fall_until": 0.3}, "stable=0.4, fall_until=0.3 and last_from=0.9 are shares"),
    ],
)
def test_settings_that_make_no_sense_are_named(wrong: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        replace(CONFIG, **wrong)
