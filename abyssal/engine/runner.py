"""The model at work on a batch: prefill, decode, block copies, and the record of chosen experts. Decides nothing.

Owns the compute weights, the cache tensors and the expert record, which lives in the same slots as the cache: what is
shared, copied or recomputed there is so here. The context of a step ends with the longest sequence in it, rounded up
to a block.
Letters: B sequences, T new tokens, S key positions, N blocks, D width, V vocabulary, M MoE layers, K chosen experts.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.engine.blocks import TRASH_BLOCK
from abyssal.model.cache import CacheView, allocate_cache
from abyssal.model.config import ModelConfig
from abyssal.model.moe import Routing
from abyssal.model.transformer import Transformer

# FP32 linears on a CPU (MKL) give a row the same bits in every batch whose rows are a multiple of 4; seen with torch
# 2.13 on an AVX-512 machine with 1 to 8 threads. (1 to 3 rows take other paths, and so do 5 to 11 when threads split
# them.) FP32 experts still differ in the last bits when one gets few rows; BF16 has none of this.
ROW_MULTIPLE_FP32_CPU = 4


class Runner:
    def __init__(self, model: Transformer, *, n_blocks: int, block_size: int, record_experts: bool) -> None:
        config = model.config
        self.model = model.inference_copy()
        self.block_size = block_size
        self.device = model.embed_tokens.weight.device
        is_fp32_cpu = self.device.type == "cpu" and model.dtype == torch.float32
        self._row_multiple = ROW_MULTIPLE_FP32_CPU if is_fp32_cpu else 1
        self._offsets = np.arange(block_size)
        self._cache = allocate_cache(config, n_blocks * block_size, dtype=model.dtype, device=self.device)
        self._experts: Tensor | None = None
        n_moe = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
        if record_experts and n_moe:
            shape = (n_blocks * block_size, n_moe, config.num_experts_per_tok)
            dtype = torch.uint8 if config.n_routed_experts <= 256 else torch.int16
            self._experts = torch.zeros(shape, dtype=dtype, device=self.device)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def load_weights(self, model: Transformer) -> None:
        """Compute with these weights from now on. In FP32 they are shared, in BF16 copied into place."""
        if model.config != self.config or model.dtype != self.model.dtype:
            raise ValueError(
                f"weights of {model.config} in {model.dtype} do not fit an engine built for {self.config} "
                f"in {self.model.dtype}; build a new Engine"
            )
        if model.dtype == torch.float32:
            self.model = model.inference_copy()
        else:
            self.model.load_state_dict(model.state_dict())

    def prefill(self, prompts: list[np.ndarray], blocks: list[np.ndarray]) -> Tensor:
        """Compute whole prompts, padded to the longest, into their blocks; logits of their last positions, (B, V)."""
        blocks_BN = np.full((len(prompts), max(map(len, blocks))), TRASH_BLOCK)
        ids_BT = np.zeros((len(prompts), blocks_BN.shape[1] * self.block_size), np.int64)
        for row, (prompt, held) in enumerate(zip(prompts, blocks, strict=True)):
            ids_BT[row, : len(prompt)] = prompt
            blocks_BN[row, : len(held)] = held
        lengths_B = np.array([len(prompt) for prompt in prompts])
        positions_BT = np.tile(np.arange(ids_BT.shape[1]), (len(prompts), 1))
        context_BS = self._slots(blocks_BN)
        # within a prompt's own blocks the padding may be written: a later token overwrites it before anyone sees it
        hidden_BTD = self._hidden(ids_BT, positions_BT, slots_BT=context_BS, context_BS=context_BS)
        last_BD = hidden_BTD[torch.arange(len(prompts)), torch.from_numpy(lengths_B - 1)]
        return self.model.logits(F.pad(last_BD, (0, 0, 0, -len(prompts) % self._row_multiple)))[: len(prompts)]

    def decode(self, ids_B: np.ndarray, positions_B: np.ndarray, blocks_BN: np.ndarray) -> Tensor:
        """Compute one token of each sequence; logits for the next, (B, V)."""
        n_rows = len(ids_B)
        missing = -n_rows % self._row_multiple
        if missing:
            ids_B, positions_B = np.pad(ids_B, (0, missing)), np.pad(positions_B, (0, missing))
            blocks_BN = np.pad(blocks_BN, ((0, missing), (0, 0)), constant_values=TRASH_BLOCK)
        block_B, offset_B = np.divmod(positions_B, self.block_size)
        slots_B = blocks_BN[np.arange(len(block_B)), block_B] * self.block_size + offset_B
        hidden_BTD = self._hidden(
            ids_B[:, None], positions_B[:, None], slots_BT=slots_B[:, None], context_BS=self._slots(blocks_BN)
        )
        return self.model.logits(hidden_BTD[:, 0])[:n_rows]

    def _hidden(
        self, ids_BT: np.ndarray, positions_BT: np.ndarray, *, slots_BT: np.ndarray, context_BS: np.ndarray
    ) -> Tensor:
        slots = self._tensor(slots_BT)
        view = CacheView(self._cache, slots, self._tensor(context_BS))
        routings: list[Routing] | None = None if self._experts is None else []
        hidden_BTD = self.model.hidden(
            self._tensor(ids_BT), positions_BT=self._tensor(positions_BT), cache=view, routings=routings
        )
        if self._experts is not None and routings:
            chosen_NMK = torch.stack([routing.experts_NK for routing in routings], dim=1)
            self._experts.index_copy_(0, slots.flatten(), chosen_NMK.to(self._experts.dtype))
        return hidden_BTD

    def copy_blocks(self, source: list[int], target: list[int]) -> None:
        """Give a forked sequence its own copy of a partly filled block, in every layer."""
        source_X, target_X = (self._tensor(self._slots(np.array([ids]))[0]) for ids in (source, target))
        stores = self._cache if self._experts is None else [*self._cache, self._experts]
        for store in stores:
            store.index_copy_(0, target_X, store.index_select(0, source_X))

    def experts_at(self, blocks: np.ndarray, n_computed: int) -> Tensor | None:
        """(n_computed, M, K) of a sequence that holds these blocks; None when nothing is recorded."""
        if self._experts is None:
            return None
        return self._experts.index_select(0, self._tensor(self._slots(blocks[None])[0, :n_computed])).cpu()

    def clear(self) -> None:
        """Forget all entries, so that one that is not finite cannot reach a later sequence."""
        for store in self._cache:
            store.zero_()

    def _slots(self, blocks_BN: np.ndarray) -> np.ndarray:
        """Flat slots of all positions of these blocks, (B, N x block_size)."""
        return (blocks_BN[..., None] * self.block_size + self._offsets).reshape(len(blocks_BN), -1)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
