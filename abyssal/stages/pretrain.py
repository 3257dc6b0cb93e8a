"""Stage `pretrain`: a V3-shaped base from rows of tokens. (DeepSeek-V3 sections 2 and 4.2)

MLA and DeepSeekMoE with auxiliary-loss-free balancing, multi-token prediction, Muon or AdamW, a rate that is constant
and then falls, if wanted a batch that grows. The balance bias is moved once per optimizer step by the loads of the
whole batch, however many pieces it was computed in.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from abyssal.data.loader import RowLoader
from abyssal.evals.held_out_rows import held_out_metrics
from abyssal.loss.balance import max_violation
from abyssal.machine import Precision, compute_dtype
from abyssal.model.config import ModelConfig
from abyssal.model.transformer import Transformer
from abyssal.optim.clip import clip_gradients
from abyssal.optim.schedule import learning_rate, ramped_rows, total_rows, v3_learning_rate
from abyssal.record import memory_gb
from abyssal.stages.objective import Batch, Losses, add_losses, language_loss
from abyssal.stages.schedule_points import RecorderAt, due
from abyssal.stages.state import TrainState, apply_step, build_optimizers, resume_state, save_state
from abyssal.tokens.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    steps: int = 600
    row_len: int = 256
    rows: int = 6  # per optimizer step
    rows_start: int = 0  # of the first step, growing to `rows`; 0: `rows` from the first step on (V3: 3072 to 15360)
    ramp_tokens: int = 0  # over which they grow (V3: 469B)
    micro_rows: int = 0  # rows per forward pass; 0: all at once
    isolate: bool = True  # documents of a row cannot see each other; V3 lets them (False)
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: float = 0.02  # Muon, matrices
    adamw_lr: float = 3e-3
    weight_decay: float = 0.05
    warmup: int = 20
    shape: Literal["wsd", "v3", "constant"] = "wsd"  # v3: falls until `fall_until`, then two constants
    stable: float = 0.67  # share of the steps (v3: of the tokens) at the peak (V3: 10T of 14.8T)
    floor: float = 0.05
    fall_until: float = 14.3 / 14.8  # v3 only: share of the tokens after which the rate is `floor`
    last_from: float = 14.633 / 14.8  # v3 only: share of the tokens after which it is `last`
    last: float = 7.3 / 220  # v3 only
    clip: float = 1.0
    mtp_weight: float = 0.3
    mtp_weight_late: float = 0.1  # from `stable` on, as V3 from 10T tokens on
    balance_weight: float = 1e-4  # alpha, sequence-wise
    bias_speed: float = 1e-3  # gamma
    bias_until: float = 0.97  # share of the steps after which gamma is 0 (V3: 14.3T of 14.8T)
    eval_every: int = 100
    eval_rows: int = 24
    save_every: int = 100
    dtype: Precision = "auto"

    def __post_init__(self) -> None:
        if self.micro_rows and self.rows % self.micro_rows:
            raise ValueError(f"pretrain.rows={self.rows} is not a multiple of micro_rows={self.micro_rows}")
        if self.rows_start and not 0 < self.rows_start <= self.rows:
            raise ValueError(f"pretrain.rows_start={self.rows_start} must lie in 1..rows={self.rows}; 0: no ramp")
        if self.rows_start and self.micro_rows and self.rows_start % self.micro_rows:
            raise ValueError(f"pretrain.rows_start={self.rows_start} is not a multiple of micro_rows={self.micro_rows}")
        if bool(self.rows_start) != (self.ramp_tokens > 0):
            raise ValueError(
                f"pretrain.rows_start={self.rows_start} and ramp_tokens={self.ramp_tokens}: a ramp of the batch needs "
                f"both; set the other one too, or both to 0"
            )
        if self.shape == "v3" and not 0 <= self.stable <= self.fall_until <= self.last_from <= 1:
            raise ValueError(
                f"pretrain: stable={self.stable}, fall_until={self.fall_until} and last_from={self.last_from} are "
                f"shares of the tokens that follow each other; put them in order, from 0 to 1"
            )

    def rows_at(self, rows_seen: int) -> int:
        """Rows of the step that comes after so many rows."""
        return ramped_rows(rows_seen, **self._ramp()) if self.rows_start else self.rows

    @property
    def all_rows(self) -> int:
        """Of all steps together."""
        return total_rows(self.steps, **self._ramp()) if self.rows_start else self.steps * self.rows

    def learning_rate_at(self, step: int, rows_seen: int) -> float:
        """The share of the peak rates in this step."""
        if self.shape != "v3":
            return learning_rate(
                step, self.steps, warmup=self.warmup, shape=self.shape, stable=self.stable, floor=self.floor
            )
        return v3_learning_rate(
            step,
            rows_seen / self.all_rows,
            warmup=self.warmup,
            stable=self.stable,
            fall_until=self.fall_until,
            last_from=self.last_from,
            floor=self.floor,
            last=self.last,
        )

    def _ramp(self) -> dict[str, int]:
        return {
            "start": self.rows_start,
            "end": self.rows,
            "ramp_rows": self.ramp_tokens // self.row_len,
            "multiple": self.micro_rows or 1,
        }


def pretrain(
    stage_dir: Path,
    *,
    config: PretrainConfig,
    model_config: ModelConfig,
    tokens_dir: Path,
    tokenizer: Tokenizer,
    seed: int,
    device: torch.device,
    recorder_at: RecorderAt,
    start: Transformer | None = None,
) -> TrainState:
    """Leaves `stage_dir`/checkpoint; continues from it if there is one. Without a `start` the weights are random."""
    if start is None:
        model = Transformer(model_config, dtype=compute_dtype(config.dtype, device))
        model = model.init_weights(torch.Generator().manual_seed(seed)).to(device)
    else:
        model = start
    optimizers = build_optimizers(
        model, kind=config.optimizer, lr=config.lr, adamw_lr=config.adamw_lr, weight_decay=config.weight_decay
    )
    state = TrainState(model, optimizers)
    loader = RowLoader(tokens_dir / "train", row_len=config.row_len, rows_per_step=config.rows, seed=seed)
    if resume_state(stage_dir / "checkpoint", state):
        loader.load_state_dict(state.extra["loader"])
    held_out = RowLoader(tokens_dir / "held_out", row_len=config.row_len, rows_per_step=config.eval_rows, seed=0).next()
    to_batch = partial(
        as_batch, eos_id=tokenizer.eos_id, only_learned=tokenizer.is_chatml, isolate=config.isolate, device=device
    )
    held_out_batch = to_batch(*held_out)

    with recorder_at(state.step) as recorder:
        if state.remark:
            recorder.log(state.remark, aloud=True)
        for step in range(state.step, config.steps):
            began = time.perf_counter()
            rows_seen = loader.position
            rows = loader.next(config.rows_at(rows_seen))
            batch = to_batch(*rows)
            losses = backward(model, batch, config, step)
            grad_norm = clip_gradients(model.parameters(), config.clip)
            lr = config.learning_rate_at(step, rows_seen)
            apply_step(state.optimizers, lr)
            balance(model, losses.loads, config, step)
            state.step, state.tokens = step + 1, state.tokens + batch.ids_BT.numel()

            time_s = time.perf_counter() - began
            metrics = {
                "loss": losses.next_token,
                "mtp_loss": losses.mtp,
                "balance_loss": losses.balance,
                "grad_norm": grad_norm,
                "lr": lr * config.lr,
                "tokens": batch.ids_BT.numel(),
                "tokens_per_s": batch.ids_BT.numel() / time_s,
                "rows": len(batch.ids_BT) if config.rows_start else None,
                "max_violation": max((max_violation(load) for load in losses.loads), default=None),
                "memory_gb": memory_gb(),
                "time_s": time_s,
            }
            if due(step, config.eval_every, config.steps):
                metrics |= held_out_metrics(
                    model, held_out_batch.ids_BT, held_out_batch.mask_BT, held_out_batch.segments_BT
                )
            recorder.step(step, config.steps, {name: value for name, value in metrics.items() if value is not None})
            if due(step, config.save_every, config.steps):
                state.extra = {"loader": loader.state_dict()}
                save_state(stage_dir / "checkpoint", state, tokenizer)
    return state


def as_batch(
    ids_BT: Tensor, mask_BT: Tensor, *, eos_id: int, isolate: bool, device: torch.device, only_learned: bool = False
) -> Batch:
    """Rows of the loader; with `isolate`, each document is a segment of its own, ended by its end token.

    ChatML ends a question with the same token as an answer; there only one that is learned ends a document.
    """
    segments_BT = None
    if isolate:
        ends = (ids_BT == eos_id).int()
        if only_learned:
            ends = ends * mask_BT.int()
        segments_BT = (ends.cumsum(1) - ends + 1).to(device)
    return Batch(ids_BT.to(device), mask_BT.to(device), segments_BT)


def backward(model: Transformer, batch: Batch, config: PretrainConfig, step: int) -> Losses:
    """Gradients of the mean loss of the batch, in micro-batches whose losses and loads add up to the whole's."""
    mtp_weight = config.mtp_weight if step < config.stable * config.steps else config.mtp_weight_late
    micro = config.micro_rows or len(batch.ids_BT)
    parts: list[Losses] = []
    for first in range(0, len(batch.ids_BT), micro):
        piece = batch.rows(slice(first, first + micro))
        losses = language_loss(
            model, piece, mtp_weight=mtp_weight, balance_weight=config.balance_weight, whole=batch
        )
        losses.total.backward()
        parts.append(losses._replace(total=losses.total.detach()))  # its graph is not needed any more
    return add_losses(parts)


def balance(model: Transformer, loads: list[Tensor], config: PretrainConfig, step: int) -> None:
    """Move each layer's bias towards its idle experts. (auxiliary-loss-free balancing)"""
    if step < config.bias_until * config.steps and config.bias_speed > 0:
        for gate, load in zip(model.gates(), loads, strict=True):
            gate.update_bias(load, config.bias_speed)
