"""Stage `extend`: the base's context in two phases, to twice and then four times its length. (DeepSeek-V3 section 4.3)

YaRN is set once, with one factor for both phases, as V3 does; then the model goes on pretraining, first on rows of
twice the length, then of four times, at the last small learning rate and with as many tokens a step. Beside the
ordinary mix the rows hold needles and long copies (data/haystack.py), since natural documents of that length are few.
At the end needles are looked for before and after.

Leaves `phase1/` with a checkpoint of its own, the final `checkpoint/` and `needle.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from abyssal.checkpoint.load import load_checkpoint
from abyssal.data.haystack import NeedleMix
from abyssal.data.loader import TokenWriter
from abyssal.data.problems import Split
from abyssal.evals.needle import NeedleEval, needle_accuracy, needle_grid
from abyssal.model.config import ModelConfig, RopeScaling
from abyssal.model.rope import rope_frequencies
from abyssal.model.transformer import Transformer
from abyssal.stages.pretrain import PretrainConfig, pretrain
from abyssal.stages.schedule_points import RecorderAt
from abyssal.stages.tokenize import DataConfig, TextStream, mixed_rows, plain_text
from abyssal.tokens.tokenizer import Tokenizer

BEFORE, UNTRAINED, AFTER = "base", "base with YaRN, untrained", "extended"  # whom needles are hidden from


@dataclass(frozen=True, kw_only=True)
class ExtendConfig:
    """What it does not name (optimizer, clipping, weight decay, isolation, type) is as in `pretrain`."""

    steps: int = 0  # of each phase; 0: the stage is passed over (V3: 1000)
    times: tuple[int, int] = (2, 4)  # context after each phase, in lengths of the base's (V3: 8 and 32)
    rows: int = 8  # per step of the first phase; the second has as many tokens a step (V3: 1920, then 480)
    micro_rows: int = 0
    factor: float = 0.0  # of YaRN, the same in both phases; 0: what the last phase needs (V3: 40, for 32 times)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    lr_share: float = 7.3 / 220  # of pretraining's peak rates, constant: V3's last rate
    warmup: int = 5
    needles: NeedleMix = field(default_factory=lambda: NeedleMix(share=0.25, copies=0.25))
    grid: NeedleEval = field(default_factory=NeedleEval)
    eval_every: int = 100
    save_every: int = 100

    def __post_init__(self) -> None:
        if not 1 < self.times[0] < self.times[1]:
            raise ValueError(f"extend.times={self.times}: each phase is longer than what was before; give e.g. [2, 4]")
        if self.rows * self.times[0] % self.times[1]:
            raise ValueError(
                f"extend.rows={self.rows} of {self.times[0]} lengths are no whole rows of {self.times[1]}: the second "
                f"phase has as many tokens a step; make rows a multiple of {self.times[1]}"
            )
        if self.factor and self.factor < self.times[1]:
            raise ValueError(
                f"extend.factor={self.factor} stretches positions less than times={self.times} asks; give "
                f"{self.times[1]} or more, or 0"
            )

    def scaling(self, base: ModelConfig, context: int) -> RopeScaling:
        """YaRN from a context of so many trained tokens. MLA has its temperature in the softmax scale and cos and sin
        as they were; other attention, as transformers reads it, has it in cos and sin."""
        mscale = 1.0 if base.attention == "mla" else 0.0
        return RopeScaling(
            kind="yarn",
            factor=self.factor or float(self.times[1]),
            original_max_position_embeddings=context,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
            mscale=mscale,
            mscale_all_dim=mscale,
        )

    def phase(self, number: int, base: PretrainConfig, context: int) -> PretrainConfig:
        """Phase 0 or 1 as pretraining."""
        return replace(
            base,
            steps=self.steps,
            row_len=context * self.times[number],
            rows=self.rows * self.times[0] // self.times[number],
            micro_rows=self.micro_rows,
            rows_start=0,
            ramp_tokens=0,
            lr=base.lr * self.lr_share,
            adamw_lr=base.adamw_lr * self.lr_share,
            warmup=self.warmup,
            shape="constant",
            mtp_weight=base.mtp_weight_late,
            bias_speed=0.0,  # as in the last part of pretraining
            eval_every=self.eval_every,
            save_every=self.save_every,
        )


def extend(
    stage_dir: Path,
    *,
    config: ExtendConfig,
    like: PretrainConfig,
    data: DataConfig,
    documents: Path,
    base: Path,
    context: int,
    first_problem: int,
    tokenizer: Tokenizer,
    seed: int,
    device: torch.device,
    recorder_at: Callable[[Path, str], RecorderAt],
) -> dict[str, Any]:
    """`base` is the checkpoint to start from, `context` the length it was trained on, `documents` the cleaned text of
    `tokenize`. Returns what the stage found."""
    lengths = config.grid.lengths_up_to(context * config.times[1])
    hay_of = plain_text(documents, data, tokenizer, split="held_out", seed=seed)
    grid = needle_grid(config.grid, lengths=lengths, hay_of=hay_of, tokenizer=tokenizer, seed=seed)  # or an error, now
    mix = replace(data, needles=config.needles)
    directories = (stage_dir / "phase1", stage_dir)
    for number, directory in enumerate(directories):
        phase = config.phase(number, like, context)
        if number == 0 and (directory / "done.json").is_file():
            continue
        write_rows(
            directory, phase, mix, tokenizer, documents, seed=seed, first_problem=first_problem + number * 500_000
        )
        source = base if number == 0 else directories[0] / "checkpoint"
        model = load_checkpoint(source, dtype=phase.dtype, device=device).model
        if number == 0:
            model = stretched(model, config.scaling(model.config, context))
        pretrain(
            directory,
            config=phase,
            model_config=model.config,
            tokens_dir=directory,
            tokenizer=tokenizer,
            seed=seed + number,
            device=device,
            recorder_at=recorder_at(directory, f"extend to {phase.row_len}"),
            start=model,
        )
        if number == 0:
            write_json(directory / "done.json", {})
    load = partial(load_checkpoint, dtype=like.dtype, device=device)
    short = load(base).model
    accuracy = {
        BEFORE: needle_accuracy(short, grid),
        UNTRAINED: needle_accuracy(stretched(short, config.scaling(short.config, context)), grid),
        AFTER: needle_accuracy(load(stage_dir / "checkpoint").model, grid),
    }
    found: dict[str, Any] = {
        "lengths": lengths,
        "depths": config.grid.all_depths(),
        "documents": config.grid.documents,
        "keys": config.grid.keys,
        "trained": {BEFORE: context, UNTRAINED: context, AFTER: context * config.times[1]},
        "accuracy": accuracy,
    }
    write_json(stage_dir / "needle.json", found)
    return {"context": context * config.times[1], "needle": {name: overall(found, name) for name in accuracy}}


def stretched(model: Transformer, scaling: RopeScaling) -> Transformer:
    """The same weights with another reading of positions."""
    if (before := model.config.rope_scaling) is not None:
        raise ValueError(
            f"the base's positions are stretched already (rope_scaling {before.kind} by {before.factor:g}); extend a "
            f"base without rope_scaling, or set extend.steps=0"
        )
    longest = round(scaling.original_max_position_embeddings * scaling.factor)
    config = replace(model.config, rope_scaling=scaling, max_position_embeddings=longest)
    with torch.device("meta"):
        longer = Transformer(config, dtype=model.dtype)
    longer.load_state_dict(model.state_dict(), assign=True)
    longer.rope_frequencies = rope_frequencies(config).to(model.rope_frequencies.device)
    return longer


def write_rows(
    directory: Path,
    phase: PretrainConfig,
    mix: DataConfig,
    tokenizer: Tokenizer,
    documents: Path,
    *,
    seed: int,
    first_problem: int,
) -> None:
    """As many long rows as the phase trains on, and some to measure the loss on; each folder whole or not at all."""
    sizes: list[tuple[Split, int]] = [("train", phase.steps * phase.rows), ("held_out", phase.eval_rows)]
    for split, n_rows in sizes:
        if (directory / split / "index.json").is_file():
            continue
        text = TextStream(documents, mix, tokenizer, split=split, seed=seed) if mix.text_share > 0 else None
        rows = mixed_rows(
            mix, tokenizer, documents, text, split=split, seed=seed, row_len=phase.row_len,
            n_tokens=n_rows * phase.row_len, first=first_problem,
        )  # fmt: skip
        with TokenWriter(directory / split, vocab_size=tokenizer.vocab_size) as writer:
            for ids, mask in rows:
                writer.add(ids, mask)


def overall(found: dict[str, Any], name: str) -> dict[str, float]:
    """Mean accuracy within the base's length and beyond it."""
    short = found["trained"][BEFORE]
    rows = list(zip(found["lengths"], found["accuracy"][name], strict=True))
    parts = {
        "within": [cell for length, row in rows if length <= short for cell in row],
        "beyond": [cell for length, row in rows if length > short for cell in row],
    }
    return {part: round(sum(cells) / len(cells), 4) for part, cells in parts.items() if cells}


def write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
