"""A reward model: a transformer's body and one scalar per head, read at the last token of an example.

Owns no training and no idea of what its heads mean. Named as transformers' ForSequenceClassification: `score.weight`.
Letters: B rows, T tokens, N examples, K heads, D width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abyssal.model.config import ModelConfig
from abyssal.model.linear import Linear
from abyssal.model.transformer import Transformer


class RewardModel(nn.Module):
    def __init__(self, config: ModelConfig, n_heads: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        # a tied head is no tensor of its own: nothing is left here that predicts tokens
        self.body = Transformer(
            replace(config, num_nextn_predict_layers=0, tie_word_embeddings=True), dtype=dtype
        )
        self.score = Linear(config.hidden_size, n_heads)

    @classmethod
    def from_policy(cls, policy: Transformer, n_heads: int, *, dtype: torch.dtype) -> RewardModel:
        """The policy's body and heads of 0, which prefer nothing: the first loss is log 2 by any data."""
        device = policy.embed_tokens.weight.device
        model = cls(policy.config, n_heads, dtype=dtype).to(device)
        wanted = model.body.state_dict()
        model.body.load_state_dict({name: t for name, t in policy.state_dict().items() if name in wanted})
        nn.init.zeros_(model.score.weight)
        return model

    def forward(
        self, ids_BT: Tensor, last_N: Tensor, *, positions_BT: Tensor | None = None, segments_BT: Tensor | None = None
    ) -> Tensor:
        """(N, K) in FP32. `last_N` are places in the flattened batch, of the last token of each example."""
        hidden_BTD = self.body.hidden(ids_BT, positions_BT=positions_BT, segments_BT=segments_BT)
        last_ND = hidden_BTD.flatten(0, 1).index_select(0, last_N)
        return F.linear(last_ND.float(), self.score.weight)
