"""The one Transformer: ids -> hidden states -> logits, with MTP modules behind it. Knows no ranks, files or engine.

Module names are the official tensor names without the leading "model.", experts stacked. Weights are FP32 masters; each
layer casts them to `dtype`, the compute type, where it uses them. A model that only generates may store them so cast.
Letters: B batch, T tokens, D width, V vocabulary, M MoE layers, K chosen experts, N tokens of the whole batch.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abyssal.model.attention import AttentionContext, cached_mask, segment_mask
from abyssal.model.block import Block
from abyssal.model.cache import CacheView
from abyssal.model.config import ModelConfig
from abyssal.model.gqa import GQA
from abyssal.model.linear import Linear, RMSNorm
from abyssal.model.mla import MLA
from abyssal.model.moe import DenseFFN, Experts, Gate, Routing
from abyssal.model.mtp import MtpModule
from abyssal.model.quantized import QuantizedExperts, weight_counts
from abyssal.model.rope import rope_amplitude, rope_frequencies, rope_tables

CAST_AT_USE = (Linear, Experts, nn.Embedding)  # modules that cast their weights to the compute type


class Transformer(nn.Module):
    rope_frequencies: Tensor

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype={dtype} is not supported for compute; use float32 or bfloat16")
        self.config, self.dtype = config, dtype
        n_layers = config.num_hidden_layers
        # filling a table or computing frequencies on "meta" would load torch's compiler: a second and more for nothing
        table_VD = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table_VD, freeze=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(n_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.mtp = nn.ModuleList(MtpModule(config, n_layers + k) for k in range(config.num_nextn_predict_layers))
        frequencies = torch.empty(config.rope_dim // 2) if table_VD.is_meta else rope_frequencies(config)
        self.register_buffer("rope_frequencies", frequencies, persistent=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> Transformer:
        """Normal with std `initializer_range` for every matrix, ones for norms, zeros for biases. (V3 section 4.2)"""
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)
        return self

    def context(
        self,
        ids_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        cache: CacheView | None = None,
    ) -> AttentionContext:
        """Rotation tables and mask of a batch. Positions count from 0 in each row unless given."""
        if positions_BT is None:
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        cos, sin = rope_tables(positions_BT, self.rope_frequencies, rope_amplitude(self.config))
        mask_BTS = None
        if cache is not None:
            mask_BTS = cached_mask(positions_BT, cache.context_BS.shape[1])
        elif segments_BT is not None:
            mask_BTS = segment_mask(segments_BT)
        return AttentionContext(cos, sin, mask_BTS, cache)

    def embed(self, ids_BT: Tensor) -> Tensor:
        return F.embedding(ids_BT, self.embed_tokens.weight).to(self.dtype)

    def hidden(
        self,
        ids_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        cache: CacheView | None = None,
        routings: list[Routing] | None = None,
        experts_BTMK: Tensor | None = None,
    ) -> Tensor:
        """(B, T) -> (B, T, D) after the final norm. `routings` receives one entry per MoE layer.

        `experts_BTMK` are int64 experts to use instead of choosing, a row of -1 where a layer chooses itself.
        """
        context = self.context(ids_BT, positions_BT=positions_BT, segments_BT=segments_BT, cache=cache)
        x_BTD = self.embed(ids_BT)
        replays = self._replays(experts_BTMK)
        for layer, replay_NK in zip(self.layers, replays, strict=True):
            x_BTD = layer(x_BTD, context, routings, replay_NK)
        return self.norm(x_BTD)

    def _replays(self, experts_BTMK: Tensor | None) -> list[Tensor | None]:
        """What each layer has to use: (N, K), or None where there is nothing to replay."""
        moe_layers = [i for i in range(len(self.layers)) if self.config.is_moe(i)]
        replays: list[Tensor | None] = [None] * len(self.layers)
        if experts_BTMK is not None:
            for i, replay_NK in zip(moe_layers, experts_BTMK.flatten(0, 1).unbind(1), strict=True):
                replays[i] = replay_NK
        return replays

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) in FP32."""
        weight = self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return F.linear(hidden, weight.to(hidden.dtype)).float()

    def mtp_hidden(
        self,
        hidden_BTD: Tensor,
        ids_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        routings: list[Routing] | None = None,
    ) -> list[Tensor]:
        """One (B, T - k, D) per module k = 1..: position i knows tokens up to i + k and predicts token i + k + 1."""
        outputs = []
        for k, module in enumerate(self.mtp, start=1):
            rows = slice(0, ids_BT.shape[1] - k)
            context = self.context(
                ids_BT[:, rows],
                positions_BT=None if positions_BT is None else positions_BT[:, rows],
                segments_BT=None if segments_BT is None else segments_BT[:, rows],
            )
            hidden_BTD = module(hidden_BTD[:, rows], self.embed(ids_BT[:, k:]), context, routings)
            outputs.append(hidden_BTD)
        return outputs

    def gates(self) -> list[Gate]:
        """Every router with a balance bias, main layers first, then MTP modules."""
        return [m for m in self.modules() if isinstance(m, Gate) and m.config.topk_method == "noaux_tc"]

    @property
    def is_cast(self) -> bool:
        """Whether weights are stored in the compute type already: FP32 ones always are."""
        return self.embed_tokens.weight.dtype == self.dtype

    def cast_weights(self) -> Transformer:
        """Store in the compute type what each use casts to it. Router and norms stay FP32. Not for training."""
        for module in self.modules():
            if isinstance(module, CAST_AT_USE):
                module.to(self.dtype)
        return self.requires_grad_(False)

    @torch.no_grad()
    def inference_copy(self, *, invariant: bool = False) -> Transformer:
        """The same model with its weights cast once, as training casts them at each use; itself when none needs it.

        Router and norms stay FP32, so the numbers are those of training. With `invariant`, layers that have a slower
        form in which a row's bits do not depend on the other rows use it; such a copy shares what needs no cast.
        """
        if self.is_cast and not invariant:
            return self
        if self.is_cast:
            taken = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        else:
            cast = [module for module in self.modules() if isinstance(module, CAST_AT_USE)]
            masters = {id(p): p for module in cast for p in module.parameters(recurse=False)}
            taken = {key: nn.Parameter(p.to(self.dtype), requires_grad=False) for key, p in masters.items()}
        model = copy.deepcopy(self, dict(taken))  # what is in `taken` is not copied: no second set of masters
        for module in model.modules():
            if isinstance(module, (MLA, GQA, DenseFFN, Gate, Experts, QuantizedExperts)):
                module.invariant = invariant
        return model if self.is_cast else model.requires_grad_(False)


def count_parameters(model: Transformer) -> tuple[int, int]:
    """(all, active): weights of the main model, MTP left out; active counts K of E experts and no embedding table.

    Balance biases count: no optimizer moves them, so they are buffers here, but published sizes have them (of V3's
    671,026,419,200 and 36,625,618,432 they are 14,848).
    """
    config = model.config
    main = {name: n for name, n in weight_counts(model).items() if not name.startswith("mtp.")}
    total = sum(main.values())
    idle = 0
    if config.feed_forward == "moe":
        routed = sum(n for name, n in main.items() if ".experts." in name)
        idle = routed - routed * config.num_experts_per_tok // config.n_routed_experts
    embedding = 0 if config.tie_word_embeddings else model.embed_tokens.weight.numel()
    return total, total - idle - embedding


def count_mtp_parameters(model: Transformer) -> int:
    """What MTP modules have to themselves; embedding and head, which files repeat for them, are the main model's."""
    return sum(weight_counts(model.mtp).values())


def default_init_range(hidden_size: int) -> float:
    """0.006 at V3's width of 7168, and the same fraction of 1/sqrt(width) elsewhere."""
    return 0.006 * math.sqrt(7168 / hidden_size)
