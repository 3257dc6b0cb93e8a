"""What a process takes beside its tensors, measured: libraries that begin to compute, and holes that steps leave.

Owns two figures of a machine's file. A tiny step and a few of a small model are made, of shapes that nobody trains;
what they should take is counted by autograd itself. Imports torch, so only `measure_machine.py` imports this.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import torch
from torch import Tensor

from abyssal.loss.balance import sequence_balance_loss
from abyssal.loss.cross_entropy import cross_entropy
from abyssal.model.config import ModelConfig
from abyssal.model.moe import Routing
from abyssal.model.transformer import Transformer
from abyssal.optim.adamw import AdamW
from abyssal.plan.memory_limit import resident_bytes

TINY = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, attention="mla",
    kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, feed_forward="moe", n_routed_experts=4,
    num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=32, first_k_dense_replace=1,
    max_position_embeddings=64,
)  # fmt: skip
SMALL = replace(
    TINY, vocab_size=768, hidden_size=144, num_hidden_layers=5, num_attention_heads=6, intermediate_size=400,
    kv_lora_rank=56, qk_nope_head_dim=24, v_head_dim=24, n_routed_experts=12, moe_intermediate_size=72,
    max_position_embeddings=256,
)  # fmt: skip


def runtime_bytes() -> float:
    """What one small step of training leaves behind: pages of libraries, their tables. Not torch's compiler, which is
    imported, though not before an optimizer's first step; what the engine takes, its plan counts."""
    importlib.import_module("torch._dynamo")
    before = resident_bytes()
    SmallStep(TINY, rows=4, row_len=16)()
    return max(1.0, float(resident_bytes() - before))


def allocator_share() -> float:
    """Memory taken for each byte of tensors that come and go, in steps of a small model: what the process grew by, less
    what lasts, over the most that is alive at once, which is when the loss begins to go backward. To be asked of a
    young process: a heap with holes of earlier work takes in what is asked for."""
    before = resident_bytes()
    step = SmallStep(SMALL, rows=6, row_len=160)
    for _ in range(4):
        step()
    return max(1.0, (resident_bytes() - before - step.lasting_bytes) / step.passing_bytes())


class SmallStep:
    """Forward, backward and AdamW of a small model, on the same ids each time."""

    def __init__(self, config: ModelConfig, *, rows: int, row_len: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = Transformer(config).init_weights(generator)
        self.optimizer = AdamW(self.model.parameters(), lr=1e-3)
        self.ids_BT = torch.randint(config.vocab_size, (rows, row_len), generator=generator)

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self) -> Tensor:
        config, routings = self.model.config, list[Routing]()
        logits_NV = self.model.logits(self.model.hidden(self.ids_BT, routings=routings)).flatten(0, 1)
        loss = cross_entropy(logits_NV, self.ids_BT.flatten())
        for routing in routings:
            scores_NE, k = routing.scores_NE, config.num_experts_per_tok
            loss = loss + sequence_balance_loss(scores_NE, batch=len(self.ids_BT), experts_per_tok=k)
        return loss

    def passing_bytes(self) -> float:
        """What autograd keeps, counted as it keeps it, and the gradients of the loss's input and of the logits."""
        kept: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.loss()
        loss.backward()  # and all of it goes again
        return sum(kept.values()) + 2.0 * 4 * self.ids_BT.numel() * self.model.config.vocab_size

    @property
    def lasting_bytes(self) -> int:
        """Weights and both moments."""
        return 3 * sum(p.nbytes for p in self.model.parameters())
