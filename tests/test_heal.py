"""Healing: the student comes nearer to the original, the same way each time, and the original stays as it is."""

from __future__ import annotations

import torch
from small_models import random_prompts, small_model

from abyssal.model.transformer import Transformer
from abyssal.stages.heal import HealConfig, heal
from abyssal.surgery.mla_from_gqa import exact_config, mla_from_gqa

ROWS_BT = torch.tensor(random_prompts([16] * 5))


def pair() -> tuple[Transformer, Transformer]:
    """An original, and a copy in the extended config whose values are off."""
    teacher = small_model("gqa_dense")
    student = mla_from_gqa(teacher, exact_config(teacher.config))
    with torch.no_grad():
        for block in student.layers:
            block.self_attn.kv_b_proj.weight *= 0.5
    return student, teacher


def test_healing_comes_nearer_and_is_the_same_each_time():
    config = HealConfig(steps=12, rows=2, lr=3e-3, warmup=2)
    student, teacher = pair()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    losses = list(heal(student, teacher, ROWS_BT, config))
    assert len(losses) == 12 and sum(losses[-3:]) < 0.5 * sum(losses[:3])
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    again, teacher = pair()
    assert list(heal(again, teacher, ROWS_BT, config)) == losses


def test_an_exact_copy_has_nothing_to_heal():
    teacher = small_model("gqa_dense")
    student = mla_from_gqa(teacher, exact_config(teacher.config))
    [first] = heal(student, teacher, ROWS_BT, HealConfig(steps=1, rows=5))
    assert abs(first) < 1e-6
