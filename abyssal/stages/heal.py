"""Healing: a converted model learns back, on some text, what the conversion cost. (TransMLA, LLaMA-MoE)

The original is the teacher: the student follows its whole distribution at every place, which says far more of a token
than which one came. Rows are used in order, so the same rows and steps give the same weights. Routers stay as the
conversion made them: their logits are so small that a few steps of AdamW would make the choice random. Owns the loop;
not the conversion (surgery/), the text or its measure (commands/convert_shape.py).
Letters: B rows, T tokens, N places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.loss.kl import forward_kl
from abyssal.model.transformer import Transformer
from abyssal.optim.clip import clip_gradients
from abyssal.optim.schedule import learning_rate
from abyssal.stages.state import apply_step, build_optimizers


@dataclass(frozen=True, kw_only=True)
class HealConfig:
    steps: int = 0
    rows: int = 4  # per step
    lr: float = 1e-4  # AdamW; three times as much tears apart what it heals, a third is slower (LOG.md)
    weight_decay: float = 0.0  # a few steps have no time to shrink what was good
    warmup: int = 5
    floor: float = 0.1
    clip: float = 1.0


def heal(student: Transformer, teacher: Transformer, rows_BT: Tensor, config: HealConfig) -> Iterator[float]:
    """Changes `student`, a step each time it is asked; yields the step's mean KL. Rows that end begin again."""
    optimizers = build_optimizers(
        student, kind="adamw", lr=0.0, adamw_lr=config.lr, weight_decay=config.weight_decay
    )
    device = student.embed_tokens.weight.device
    for gate in student.gates():
        gate.weight.requires_grad_(False)  # and so has no gradient, which an optimizer passes over
    for step in range(config.steps):
        places_B = (torch.arange(config.rows) + step * config.rows) % len(rows_BT)
        loss = 0.0
        for ids_T in rows_BT[places_B].to(device):  # one at a time: logits over a whole vocabulary are large
            part = _distance(student, teacher, ids_T[None]) / config.rows
            part.backward()
            loss += float(part.detach())
        clip_gradients(student.parameters(), config.clip)
        lr = learning_rate(step, config.steps, warmup=config.warmup, shape="wsd", floor=config.floor)
        apply_step(optimizers, lr)
        yield loss


def _distance(student: Transformer, teacher: Transformer, ids_BT: Tensor) -> Tensor:
    """Mean over all places of KL(teacher || student)."""
    with torch.no_grad():
        teacher_logits_NV = teacher.logits(teacher.hidden(ids_BT)).flatten(0, 1)
    return forward_kl(student.logits(student.hidden(ids_BT)).flatten(0, 1), teacher_logits_NV).mean()
