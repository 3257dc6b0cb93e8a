"""One pre-norm residual block: attention, then feed-forward.

Letters: B batch, T tokens, D width, N tokens of the whole batch, K chosen experts.
"""

from __future__ import annotations

from torch import Tensor, nn

from abyssal.model.attention import AttentionContext
from abyssal.model.config import ModelConfig
from abyssal.model.gqa import GQA
from abyssal.model.linear import RMSNorm
from abyssal.model.mla import MLA
from abyssal.model.moe import DenseFFN, MoE, Routing


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config, layer) if config.attention == "mla" else GQA(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (
            MoE(config, layer) if config.is_moe(layer) else DenseFFN(config.hidden_size, config.intermediate_size)
        )

    def forward(
        self,
        x_BTD: Tensor,
        context: AttentionContext,
        routings: list[Routing] | None,
        replay_NK: Tensor | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), context)
        y_BTD = self.post_attention_layernorm(x_BTD)
        return x_BTD + (self.mlp(y_BTD, routings, replay_NK) if isinstance(self.mlp, MoE) else self.mlp(y_BTD))
