"""Supervised fine-tuning on conversations: packed rows whose examples cannot see each other. (DeepSeek-V3 section 5.1)

`cold_start`, `reject` and `distil` end here, each with other conversations. MTP is trained on, as in pretraining.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from abyssal.data.pack import Example, pack_isolated
from abyssal.loss.balance import max_violation
from abyssal.machine import Precision
from abyssal.model.transformer import Transformer
from abyssal.optim.clip import clip_gradients
from abyssal.optim.schedule import learning_rate
from abyssal.record import memory_gb
from abyssal.stages.objective import Batch, language_loss
from abyssal.stages.schedule_points import RecorderAt, due
from abyssal.stages.state import TrainState, apply_step, build_optimizers, resume_state, save_state
from abyssal.tokens.chat import render
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Conversation


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    epochs: int = 2  # R1: 2 to 3
    row_len: int = 256
    rows: int = 8  # per step
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: float = 0.005  # Muon, matrices
    adamw_lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 3
    floor: float = 0.1  # cosine down to a tenth, as R1's SFT
    clip: float = 1.0
    mtp_weight: float = 0.1
    save_every: int = 50
    dtype: Precision = "auto"


def fine_tune(
    stage_dir: Path,
    *,
    config: SftConfig,
    model: Transformer,
    tokenizer: Tokenizer,
    conversations: list[Conversation],
    seed: int,
    recorder_at: RecorderAt,
) -> TrainState:
    """Leaves `stage_dir`/checkpoint; continues from it if there is one."""
    examples = [Example(*render(conversation, tokenizer)) for conversation in conversations]
    epochs = [packed_epoch(examples, config, tokenizer, seed=seed, epoch=epoch) for epoch in range(config.epochs)]
    batches = [epoch.rows(rows) for epoch in epochs for rows in torch.arange(len(epoch.ids_BT)).split(config.rows)]
    optimizers = build_optimizers(
        model, kind=config.optimizer, lr=config.lr, adamw_lr=config.adamw_lr, weight_decay=config.weight_decay
    )
    state = TrainState(model, optimizers)
    resume_state(stage_dir / "checkpoint", state)
    device = model.embed_tokens.weight.device

    with recorder_at(state.step) as recorder:
        if state.remark:
            recorder.log(state.remark, aloud=True)
        for step in range(state.step, len(batches)):
            began = time.perf_counter()
            batch = batches[step].to(device)
            losses = language_loss(model, batch, mtp_weight=config.mtp_weight, balance_weight=0.0)
            losses.total.backward()
            grad_norm = clip_gradients(model.parameters(), config.clip)
            lr = learning_rate(step, len(batches), warmup=config.warmup, shape="cosine", floor=config.floor)
            apply_step(state.optimizers, lr)
            n_tokens = int((batch.segments_BT > 0).sum()) if batch.segments_BT is not None else batch.ids_BT.numel()
            state.step, state.tokens = step + 1, state.tokens + n_tokens
            time_s = time.perf_counter() - began
            metrics: dict[str, Any] = {
                "loss": losses.next_token,
                "grad_norm": grad_norm,
                "lr": lr * config.adamw_lr,
                "tokens": n_tokens,
                "tokens_per_s": n_tokens / time_s,
                "memory_gb": memory_gb(),
                "time_s": time_s,
            }
            if losses.mtp is not None:
                metrics["mtp_loss"] = losses.mtp
            if losses.loads:
                metrics["max_violation"] = max(max_violation(load) for load in losses.loads)
            recorder.step(step, len(batches), metrics)
            if due(step, config.save_every, len(batches)):
                save_state(
                    stage_dir / "checkpoint",
                    state,
                    tokenizer,
                    generation={"temperature": 0.6, "top_p": 0.95, "do_sample": True},
                )
    return state


def packed_epoch(
    examples: list[Example], config: SftConfig, tokenizer: Tokenizer, *, seed: int, epoch: int
) -> Batch:
    """Examples in a new order, packed in pools so that best-fit does not sort the whole epoch by length."""
    order = list(range(len(examples)))
    random.Random(f"sft {seed} {epoch}").shuffle(order)
    pool = 64 * config.rows
    parts = [
        pack_isolated([examples[i] for i in order[k : k + pool]], row_len=config.row_len, pad_id=tokenizer.pad_id)
        for k in range(0, len(order), pool)
    ]
    return Batch(
        torch.cat([part.ids_BT for part in parts]),
        torch.cat([part.mask_BT for part in parts]),
        torch.cat([part.segment_BT for part in parts]),
        torch.cat([part.position_BT for part in parts]),
    )
