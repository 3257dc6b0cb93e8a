"""Multi-token prediction: one more block that looks one token further. (DeepSeek-V3 section 2.2)

Module k joins the hidden state of position i with the embedding of token i+k and predicts token i+k+1, through the main
model's own embedding and head. The hidden state is the main model's last representation, after its final norm, which is
also what engines that serve published checkpoints feed in.
Letters: B batch, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abyssal.model.attention import AttentionContext
from abyssal.model.block import Block
from abyssal.model.config import ModelConfig
from abyssal.model.linear import Linear, RMSNorm
from abyssal.model.moe import Routing


class MtpModule(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(dim, eps)
        self.hnorm = RMSNorm(dim, eps)
        self.eh_proj = Linear(2 * dim, dim)
        self.block = Block(config, layer)
        self.shared_head_norm = RMSNorm(dim, eps)

    def forward(
        self, hidden_BTD: Tensor, embedding_BTD: Tensor, context: AttentionContext, routings: list[Routing] | None
    ) -> Tensor:
        """-> (B, T, D), ready for the shared head and for the next module."""
        # released checkpoints hold the embedding first, the reverse of the paper's writing
        joined = torch.cat((self.enorm(embedding_BTD), self.hnorm(hidden_BTD)), dim=-1)
        return self.shared_head_norm(self.block(self.eh_proj(joined), context, routings))
