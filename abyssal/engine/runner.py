"""The model at work on a batch: prefill, decode, block copies, and the record of chosen experts. Decides nothing.

Owns the compute weights, the cache tensors and the expert record, which lives in the same slots as the cache: what is
shared, copied or recomputed there is so here. The context of a step ends with the longest sequence in it, rounded up
to a block.

Invariant mode: each token, of a prompt or drawn, is a row of its own that reads all it attends to from the cache. Rows
are computed in passes of at most ROWS, filled up to a multiple of 8; keys are walked in tiles (`model/attention.py`);
no kernel then sums in another order because of what else is there. Shown on a CPU (AVX-512, torch 2.13, 1 and 2
threads); for others the first thing a runner does is to compare passes of 8 rows with longer ones.
Letters: B sequences, T new tokens, S key positions, N rows, X blocks, D width, V vocabulary, M MoE layers, K chosen
experts.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.engine.blocks import TRASH_BLOCK, blocks_for
from abyssal.engine.sequence import Chunk
from abyssal.model.attention import KEY_TILE
from abyssal.model.cache import CacheView, allocate_cache
from abyssal.model.config import ModelConfig
from abyssal.model.moe import Routing
from abyssal.model.transformer import Transformer

# FP32 linears on a CPU (MKL) give a row the same bits in every batch whose rows are a multiple of 4; seen with torch
# 2.13 on an AVX-512 machine with 1 to 8 threads. (1 to 3 rows take other paths, and so do 5 to 11 when threads split
# them.) FP32 experts still differ in the last bits when one gets few rows; BF16 has none of this.
ROW_MULTIPLE_FP32_CPU = 4
ROW_MULTIPLE = 8  # in invariant mode: FP64 products, which attention uses under FP32, need it too
ROWS = 128  # of a pass in invariant mode
PASS_SLOTS = 1 << 16  # rows x key positions of a pass in invariant mode: what attention gathers must fit in memory


class Runner:
    def __init__(
        self,
        model: Transformer,
        *,
        n_blocks: int,
        block_size: int,
        record_experts: bool,
        invariant: bool = False,
    ) -> None:
        config = model.config
        self.model = model.inference_copy(invariant=invariant)
        self.block_size, self.invariant = block_size, invariant
        self.device = model.embed_tokens.weight.device
        is_fp32_cpu = self.device.type == "cpu" and model.dtype == torch.float32
        self._row_multiple = ROW_MULTIPLE if invariant else ROW_MULTIPLE_FP32_CPU if is_fp32_cpu else 1
        self._offsets = np.arange(block_size)
        self._cache = allocate_cache(config, n_blocks * block_size, dtype=model.dtype, device=self.device)
        self._experts: Tensor | None = None
        n_moe = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
        if record_experts and n_moe:
            shape = (n_blocks * block_size, n_moe, config.num_experts_per_tok)
            dtype = torch.uint8 if config.n_routed_experts <= 256 else torch.int16
            self._experts = torch.zeros(shape, dtype=dtype, device=self.device)
        self._n_rows = self._safe_rows(n_blocks) if invariant else None

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
            self.model = model.inference_copy(invariant=self.invariant)
        else:
            self.model.load_state_dict(model.state_dict())

    def prefill(self, chunks: list[Chunk]) -> Tensor:
        """Compute prompts or parts of them into their blocks; logits of each chunk's last position, (B, V)."""
        lengths_B = np.array([len(chunk.ids) for chunk in chunks])
        if self.invariant:
            hidden_ND = self._rows(
                np.concatenate([chunk.ids for chunk in chunks]),
                np.concatenate([chunk.start + np.arange(len(chunk.ids)) for chunk in chunks]),
                self._table([chunk.blocks for chunk in chunks]).repeat(lengths_B, axis=0),
            )
            return self._logits(hidden_ND[torch.from_numpy(lengths_B.cumsum() - 1)])
        starts_B = np.array([chunk.start for chunk in chunks])
        positions_BT = starts_B[:, None] + np.arange(blocks_for(lengths_B.max(), self.block_size) * self.block_size)
        ids_BT = np.zeros_like(positions_BT)
        for row, chunk in enumerate(chunks):
            ids_BT[row, : len(chunk.ids)] = chunk.ids
        n_columns = blocks_for((starts_B + lengths_B).max(), self.block_size)
        # the tokens that pad a chunk may reach beyond any block: theirs is the trash
        blocks_BX = self._table([chunk.blocks for chunk in chunks], n_columns=positions_BT.max() // self.block_size + 1)
        # within a prompt's own blocks the padding may be written: a later token overwrites it before anyone sees it
        hidden_BTD = self._hidden(
            ids_BT,
            positions_BT,
            slots_BT=self._slots_at(positions_BT, blocks_BX),
            context_BS=self._slots(blocks_BX[:, :n_columns]),
        )
        return self._logits(hidden_BTD[torch.arange(len(chunks)), torch.from_numpy(lengths_B - 1)])

    def decode(self, ids_N: np.ndarray, positions_N: np.ndarray, blocks_NX: np.ndarray) -> Tensor:
        """Compute one token of each sequence; logits for the next, (N, V)."""
        return self._logits(self._rows(ids_N, positions_N, blocks_NX))

    def _rows(self, ids_N: np.ndarray, positions_N: np.ndarray, blocks_NX: np.ndarray) -> Tensor:
        """Hidden states of single tokens, (N, D). A row may read what rows before it, in the same call, write."""
        n_rows, n_slots = len(ids_N), blocks_NX.shape[1] * self.block_size
        missing = -n_rows % self._row_multiple
        if missing:
            ids_N, positions_N = np.pad(ids_N, (0, missing)), np.pad(positions_N, (0, missing))
            blocks_NX = np.pad(blocks_NX, ((0, missing), (0, 0)), constant_values=TRASH_BLOCK)
        most = len(ids_N)
        if self._n_rows is not None:
            most = max(min(self._n_rows, PASS_SLOTS // n_slots // ROW_MULTIPLE * ROW_MULTIPLE), ROW_MULTIPLE)
        slots_N, context_NS = self._slots_at(positions_N[:, None], blocks_NX), self._slots(blocks_NX)
        if self.invariant:
            context_NS = np.pad(context_NS, ((0, 0), (0, -n_slots % KEY_TILE)))  # slot 0 is trash
        hidden_NTD = [
            self._hidden(
                ids_N[some, None], positions_N[some, None], slots_BT=slots_N[some], context_BS=context_NS[some]
            )
            for some in (slice(start, start + most) for start in range(0, len(ids_N), most))
        ]
        return torch.cat(hidden_NTD)[:n_rows, 0]

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        padded_ND = F.pad(hidden_ND, (0, 0, 0, -len(hidden_ND) % self._row_multiple))
        parts = [self.model.logits(some_ND) for some_ND in padded_ND.split(self._n_rows or len(padded_ND))]
        return torch.cat(parts)[: len(hidden_ND)]

    def _safe_rows(self, n_blocks: int) -> int:
        """How many rows a pass may hold: ROWS, or 8 where longer passes give a row other bits than passes of 8.

        Computed on a made-up sequence, in an empty cache that is empty again afterwards.
        """
        n_rows = min(ROWS, n_blocks * self.block_size, self.config.max_position_embeddings)
        n_rows = n_rows // ROW_MULTIPLE * ROW_MULTIPLE
        positions_N = np.arange(n_rows)
        ids_N = positions_N * 7919 % self.config.vocab_size
        blocks_NX = np.arange(blocks_for(n_rows, self.block_size))[None].repeat(n_rows, axis=0)
        wanted: Tensor | None = None
        is_same = n_rows > ROW_MULTIPLE
        with torch.inference_mode():
            for self._n_rows in sorted({ROW_MULTIPLE, 2 * ROW_MULTIPLE, 3 * ROW_MULTIPLE, n_rows // 16 * 8, n_rows}):
                if not is_same or not 0 < self._n_rows <= n_rows:
                    continue
                logits_NV = self._logits(self._rows(ids_N, positions_N, blocks_NX))
                wanted = logits_NV if wanted is None else wanted
                is_same = torch.equal(logits_NV, wanted)
        self.clear()
        return n_rows if is_same else ROW_MULTIPLE

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

    def _table(self, held: list[np.ndarray], n_columns: int = 0) -> np.ndarray:
        """Blocks side by side, as wide as the longest and at least n_columns, filled up with the trash."""
        blocks_BX = np.full((len(held), max(n_columns, *map(len, held))), TRASH_BLOCK)
        for row, blocks in enumerate(held):
            blocks_BX[row, : len(blocks)] = blocks
        return blocks_BX

    def _slots(self, blocks_BX: np.ndarray) -> np.ndarray:
        """Flat slots of all positions of these blocks, (B, X x block_size)."""
        return (blocks_BX[..., None] * self.block_size + self._offsets).reshape(len(blocks_BX), -1)

    def _slots_at(self, positions_BT: np.ndarray, blocks_BX: np.ndarray) -> np.ndarray:
        """Flat slot of each position, (B, T)."""
        block_BT, offset_BT = np.divmod(positions_BT, self.block_size)
        return np.take_along_axis(blocks_BX, block_BT, axis=1) * self.block_size + offset_BT

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
