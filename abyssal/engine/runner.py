"""The model at work on a batch: prefill, decode, block copies, and the record of chosen experts. Decides nothing.

Owns the compute weights, the cache tensors and the expert record, which lives in the same slots as the cache: what is
shared, copied or recomputed there is so here. The context of a step ends with the longest sequence in it, rounded up
to a block.

Invariant mode: every token, of a prompt or drawn, takes one way. It reads all it attends to from the cache, in tiles of
keys (`model/attention.py`); drawn tokens come as rows of one, prompts as rows of PIECE; passes hold at most MOST_TOKENS
and a multiple of 8, so that no kernel sums in another order because of what else is there. Shown on a CPU (AVX-512,
torch 2.13, 1 and 2 threads). Elsewhere it is not assumed: a runner first compares longer passes with passes of 8 single
tokens, on its own weights, and keeps to the latter where they differ.
Letters: B sequences or rows, T new tokens, S key positions, N tokens or blocks of a sequence, D width, V vocabulary,
M MoE layers, K chosen experts, X tokens asked for, sequence after sequence, A places ahead (MTP modules).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.engine.blocks import TRASH_BLOCK, blocks_for
from abyssal.engine.native import native_forward
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
PAD_MULTIPLE = 16  # prompts of one pass are filled up to it
ROW_MULTIPLE = 8  # in invariant mode: FP64 products, which attention uses under FP32, need it too
PIECE = 16  # prompt tokens of a row in invariant mode: they share what is gathered from the cache
MOST_TOKENS = 128  # of a pass in invariant mode
PASS_SLOTS = 1 << 16  # rows x key positions of a pass in invariant mode: what attention gathers must fit in memory


class Passes(NamedTuple):
    """How invariant mode cuts up its work."""

    piece: int = PIECE
    most_tokens: int = MOST_TOKENS


class Batch(NamedTuple):
    """Rows of new tokens: what they are, where they stand, where they write, what they read. For MTP modules: the ids
    1, 2, .. A places after each, or the hidden states that one module starts from."""

    ids_BT: np.ndarray
    positions_BT: np.ndarray
    slots_BT: np.ndarray
    context_BS: np.ndarray
    ahead_BTA: np.ndarray | None = None
    hidden_BTD: Tensor | None = None

    def rows(self, some: slice) -> Batch:
        return Batch(
            self.ids_BT[some],
            self.positions_BT[some],
            self.slots_BT[some],
            self.context_BS[some],
            None if self.ahead_BTA is None else self.ahead_BTA[some],
            None if self.hidden_BTD is None else self.hidden_BTD[some],
        )


class Computed(NamedTuple):
    """Of each token asked for: logits of what comes after it, and the hidden state they were made from."""

    logits_XV: Tensor
    hidden_XD: Tensor


class Runner:
    def __init__(
        self,
        model: Transformer,
        *,
        n_blocks: int,
        block_size: int,
        record_experts: bool,
        invariant: bool = False,
        looks_ahead: bool = False,
        native: bool | None = None,
    ) -> None:
        """`looks_ahead`: MTP modules draft (`look_ahead`), so a prompt leaves its entries in their layers too.
        `native`: compute in own C++ (`native.py`); None: where that can be."""
        config = model.config
        self._native = native_forward(model, block_size=block_size, looks_ahead=looks_ahead, native=native)
        invariant = invariant and self._native is None  # the native path needs no other form for that
        self.model = model.inference_copy(invariant=invariant)
        self._owns_weights = not model.is_cast
        self.block_size, self.invariant = block_size, invariant
        self._n_ahead = config.num_nextn_predict_layers if looks_ahead else 0
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
        self._passes = self._safe_passes(n_blocks) if invariant else None
        if self._native is not None:
            self._native.attach(self._cache, self._experts)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def stores(self) -> list[Tensor]:
        """All that lies in slots: the cache of each layer, and the expert record where there is one."""
        return self._cache if self._experts is None else [*self._cache, self._experts]

    @property
    def numerics(self) -> str:
        """Names the way of computing: the same tokens have entries of other bits when computed in another way, and none
        in the layers of MTP modules that do not draft."""
        way = "invariant" if self.invariant else "plain"
        return f"{way if self._native is None else self._native.numerics}, {self._n_ahead} ahead"

    @property
    def is_exact(self) -> bool:
        """Does a token have the same bits whatever else is computed with it, or was before?"""
        return self._native is not None or self.invariant

    def load_weights(self, model: Transformer) -> None:
        """Compute with these weights from now on: copied into place if they need a cast, else shared."""
        if model.config != self.config or model.dtype != self.model.dtype:
            raise ValueError(
                f"weights of {model.config} in {model.dtype} do not fit an engine built for {self.config} "
                f"in {self.model.dtype}; build a new Engine"
            )
        if self._owns_weights and not model.is_cast:
            self.model.load_state_dict(model.state_dict())
        else:  # weights that the runner shares with somebody are never written to
            self.model = model.inference_copy(invariant=self.invariant)
            self._owns_weights = not model.is_cast
        if self._native is not None:
            self._native.load(model)

    def alone(self) -> AbstractContextManager[None]:
        """Around a step: see `NativeForward.alone`."""
        return nullcontext() if self._native is None else self._native.alone()

    def prefill(self, chunks: list[Chunk]) -> Computed:
        """Compute prompts or parts of them into their blocks; asked for is each chunk's last token."""
        if self._native is not None:
            return Computed(*self._native.prefill(chunks))
        lengths_B = np.array([len(chunk.ids) for chunk in chunks])
        if self._passes is not None:
            hidden_ND = self._prefill_pieces(chunks, self._passes)
            return self._computed(hidden_ND[torch.from_numpy(lengths_B.cumsum() - 1)])
        starts_B = np.array([chunk.start for chunk in chunks])
        positions_BT = starts_B[:, None] + np.arange(-(-lengths_B.max() // PAD_MULTIPLE) * PAD_MULTIPLE)
        ids_BT = np.zeros_like(positions_BT)
        for row, chunk in enumerate(chunks):
            ids_BT[row, : len(chunk.ids)] = chunk.ids
        n_columns = blocks_for((starts_B + lengths_B).max(), self.block_size)
        # the tokens that pad a chunk may reach beyond any block: theirs is the trash
        blocks_BN = self._table([chunk.blocks for chunk in chunks], n_columns=positions_BT.max() // self.block_size + 1)
        # within a prompt's own blocks the padding may be written: a later token overwrites it before anyone sees it
        slots_BT, context_BS = self._slots_at(positions_BT, blocks_BN), self._slots(blocks_BN[:, :n_columns])
        batch = Batch(ids_BT, positions_BT, slots_BT, context_BS, self._ahead(ids_BT, chunks))
        hidden_BTD = self._hidden(batch)
        return self._computed(hidden_BTD[torch.arange(len(chunks)), torch.from_numpy(lengths_B - 1)])

    def decode(
        self, ids_BT: np.ndarray, positions_BT: np.ndarray, blocks_BN: np.ndarray, counts_B: np.ndarray | None = None
    ) -> Computed:
        """Compute the next tokens of each sequence, all asked for. Of row b the first counts_B[b] are tokens (None: all
        T); the rest may hold anything. Slots of all tokens are in blocks_BN."""
        if self._native is not None:
            return Computed(*self._native.decode(ids_BT, positions_BT, blocks_BN, counts_B))
        counts_B = np.full(len(ids_BT), ids_BT.shape[1]) if counts_B is None else counts_B
        is_token_BT = np.arange(ids_BT.shape[1]) < counts_B[:, None]
        batch = self._laid_out(ids_BT, positions_BT, blocks_BN, is_token_BT)
        if self._passes is not None:
            return self._computed(self._in_passes(batch, self._passes)[: is_token_BT.sum(), 0])
        return self._computed(_asked(self._hidden(batch), is_token_BT))

    def look_ahead(
        self,
        module: int,
        hidden_XD: Tensor,
        ids_BT: np.ndarray,
        positions_BT: np.ndarray,
        blocks_BN: np.ndarray,
        counts_B: np.ndarray,
    ) -> Tensor:
        """One MTP module on hidden states at these positions, each with the id that stands module + 1 places after it;
        hidden states from which `logits` of the id after that one are made, (X, D). Rows as in `decode`."""
        if self._native is not None:
            return self._native.look_ahead(module, hidden_XD, ids_BT, positions_BT, blocks_BN, counts_B)
        is_token_BT = np.arange(ids_BT.shape[1]) < counts_B[:, None]
        batch = self._laid_out(ids_BT, positions_BT, blocks_BN, is_token_BT)
        hidden_BTD = hidden_XD.new_zeros(*batch.ids_BT.shape, hidden_XD.shape[1])
        if self._passes is not None:
            hidden_BTD[: len(hidden_XD), 0] = hidden_XD
            batch = batch._replace(hidden_BTD=hidden_BTD)
            return self._in_passes(batch, self._passes, module)[: len(hidden_XD), 0]
        hidden_BTD[: len(ids_BT)][torch.from_numpy(is_token_BT)] = hidden_XD
        return _asked(self._mtp_hidden(module, batch._replace(hidden_BTD=hidden_BTD)), is_token_BT)

    def logits(self, hidden_XD: Tensor) -> Tensor:
        """(X, D) -> (X, V) in FP32."""
        if self._native is not None:
            return self._native.logits(hidden_XD)
        n_rows = len(hidden_XD)
        padded_XD = F.pad(hidden_XD, (0, 0, 0, -n_rows % self._row_multiple))
        if self._passes is None:
            return self.model.logits(padded_XD)[:n_rows]
        return torch.cat([self.model.logits(some_XD) for some_XD in padded_XD.split(self._passes.most_tokens)])[:n_rows]

    def _computed(self, hidden_XD: Tensor) -> Computed:
        return Computed(self.logits(hidden_XD), hidden_XD)

    def _ahead(self, ids_BT: np.ndarray, chunks: list[Chunk]) -> np.ndarray | None:
        """What MTP modules read beside these ids, (B, T, A), 0 where nobody knows it yet."""
        if not self._n_ahead:
            return None
        ids_BX = np.pad(ids_BT, ((0, 0), (0, self._n_ahead)))
        for row, chunk in enumerate(chunks):
            following = chunk.following[: self._n_ahead]
            ids_BX[row, len(chunk.ids) : len(chunk.ids) + len(following)] = following
        return np.stack([ids_BX[:, a : a + ids_BT.shape[1]] for a in range(1, self._n_ahead + 1)], axis=-1)

    def _laid_out(
        self, ids_BT: np.ndarray, positions_BT: np.ndarray, blocks_BN: np.ndarray, is_token_BT: np.ndarray
    ) -> Batch:
        """Side by side, filled up with rows of trash; in invariant mode every token is a row."""
        if self._passes is not None and ids_BT.shape[1] > 1:
            row_X = np.repeat(np.arange(len(ids_BT)), is_token_BT.sum(1))
            ids_BT, positions_BT = ids_BT[is_token_BT][:, None], positions_BT[is_token_BT][:, None]
            blocks_BN, is_token_BT = blocks_BN[row_X], np.ones_like(ids_BT, bool)
        n_rows, n_tokens = ids_BT.shape
        missing = -n_rows % (self._row_multiple // math.gcd(self._row_multiple, n_tokens))
        if missing:
            below = ((0, missing), (0, 0))
            ids_BT, positions_BT, is_token_BT = (np.pad(x, below) for x in (ids_BT, positions_BT, is_token_BT))
            blocks_BN = np.pad(blocks_BN, below, constant_values=TRASH_BLOCK)
        if not is_token_BT.all():
            ids_BT, positions_BT = np.where(is_token_BT, ids_BT, 0), np.where(is_token_BT, positions_BT, 0)
        slots_BT = np.where(is_token_BT, self._slots_at(positions_BT, blocks_BN), 0)
        return Batch(ids_BT, positions_BT, slots_BT, self._slots(blocks_BN))

    def _prefill_pieces(self, chunks: list[Chunk], passes: Passes) -> Tensor:
        """Hidden states of all tokens of these chunks, (N, D). Each chunk is cut into pieces, filled up with trash."""
        pieces = []
        for chunk in chunks:
            ids = np.concatenate((chunk.ids, chunk.following[: self._n_ahead]))
            for start in range(0, len(chunk.ids), passes.piece):
                end = min(start + passes.piece, len(chunk.ids))
                pieces.append(Chunk(ids[start:end], chunk.start + start, chunk.blocks, ids[end : end + self._n_ahead]))
        nothing = np.zeros(0, np.int64)
        pieces += [Chunk(nothing, 0, nothing)] * (-len(pieces) * passes.piece % ROW_MULTIPLE)
        lengths_B = np.array([len(piece.ids) for piece in pieces])
        is_token_BT = np.arange(passes.piece) < lengths_B[:, None]
        ids_BT, positions_BT = np.zeros(is_token_BT.shape, np.int64), np.zeros(is_token_BT.shape, np.int64)
        ids_BT[is_token_BT] = np.concatenate([piece.ids for piece in pieces])
        positions_BT[is_token_BT] = np.concatenate([piece.start + np.arange(len(piece.ids)) for piece in pieces])
        blocks_BN = self._table([piece.blocks for piece in pieces])
        slots_BT = np.where(is_token_BT, self._slots_at(positions_BT, blocks_BN), 0)
        batch = Batch(ids_BT, positions_BT, slots_BT, self._slots(blocks_BN), self._ahead(ids_BT, pieces))
        hidden_BTD = self._in_passes(batch, passes)
        return hidden_BTD[torch.from_numpy(is_token_BT)]

    def _in_passes(self, batch: Batch, passes: Passes, module: int | None = None) -> Tensor:
        """Hidden states of the model or of one MTP module, (B, T, D), some rows at a time. A row may read what rows
        before it write."""
        n_rows, n_tokens = batch.ids_BT.shape
        missing = -batch.context_BS.shape[1] % KEY_TILE
        batch = batch._replace(context_BS=np.pad(batch.context_BS, ((0, 0), (0, missing))))  # slot 0 is trash
        unit = ROW_MULTIPLE if n_tokens == 1 else 1  # rows that make a multiple of 8 tokens
        most = min(passes.most_tokens // n_tokens, PASS_SLOTS // batch.context_BS.shape[1])
        most = max(most // unit * unit, unit)
        parts = [batch.rows(slice(start, start + most)) for start in range(0, n_rows, most)]
        if module is not None:
            return torch.cat([self._mtp_hidden(module, part) for part in parts])
        return torch.cat([self._hidden(part) for part in parts])

    def _safe_passes(self, n_blocks: int) -> Passes:
        """The longest passes that give a token the bits of passes of 8 single ones, on a made-up sequence.

        The cache must be empty, and is so again afterwards.
        """
        n_tokens = min(MOST_TOKENS, (n_blocks - 1) * self.block_size, self.config.max_position_embeddings)
        ids_N = np.arange(n_tokens) * 7919 % self.config.vocab_size
        made_up = Chunk(ids_N, 0, 1 + np.arange(blocks_for(n_tokens, self.block_size)))

        def logits(passes: Passes) -> Tensor:
            self._passes = passes
            return self.logits(self._prefill_pieces([made_up], passes))

        safe = Passes(piece=1, most_tokens=ROW_MULTIPLE)
        with torch.inference_mode():
            wanted_NV = logits(safe)
            for passes in (Passes(1, 24), Passes(1, MOST_TOKENS), Passes(PIECE, PIECE), Passes()):
                if not torch.equal(logits(passes), wanted_NV):
                    break
            else:
                safe = passes
        self.clear()
        return safe

    def _hidden(self, batch: Batch) -> Tensor:
        slots = self._tensor(batch.slots_BT)
        view = CacheView(self._cache, slots, self._tensor(batch.context_BS))
        routings: list[Routing] | None = None if self._experts is None else []
        positions_BT = self._tensor(batch.positions_BT)
        hidden_BTD = self.model.hidden(
            self._tensor(batch.ids_BT), positions_BT=positions_BT, cache=view, routings=routings
        )
        if self._experts is not None and routings:
            chosen_NMK = torch.stack([routing.experts_NK for routing in routings], dim=1)
            self._experts.index_copy_(0, slots.flatten(), chosen_NMK.to(self._experts.dtype))
        if batch.ahead_BTA is not None:
            ahead_BTD = hidden_BTD
            for module in range(self._n_ahead):
                following = batch._replace(ids_BT=batch.ahead_BTA[..., module], hidden_BTD=ahead_BTD)
                ahead_BTD = self._mtp_hidden(module, following)
        return hidden_BTD

    def _mtp_hidden(self, module: int, batch: Batch) -> Tensor:
        view = CacheView(self._cache, self._tensor(batch.slots_BT), self._tensor(batch.context_BS))
        ids_BT = self._tensor(batch.ids_BT)
        context = self.model.context(ids_BT, positions_BT=self._tensor(batch.positions_BT), cache=view)
        return self.model.mtp[module](batch.hidden_BTD, self.model.embed(ids_BT), context, None)

    def copy_blocks(self, source: list[int], target: list[int]) -> None:
        """Give a forked sequence its own copy of a partly filled block, in every layer."""
        source_X, target_X = (self._tensor(self._slots(np.array([ids]))[0]) for ids in (source, target))
        for store in self.stores:
            store.index_copy_(0, target_X, store.index_select(0, source_X))

    def experts_at(self, blocks: np.ndarray, n_computed: int) -> Tensor | None:
        """(n_computed, M, K) of a sequence that holds these blocks; None when nothing is recorded."""
        if self._experts is None:
            return None
        return self._experts.index_select(0, self._tensor(self._slots(blocks[None])[0, :n_computed])).cpu()

    def clear(self) -> None:
        """Forget all entries."""
        for store in self._cache:
            store.zero_()

    def clean(self, blocks: np.ndarray) -> np.ndarray:
        """Forget the entries of these blocks that are not finite; returns which blocks had any, (N,)."""
        slots_X = self._tensor(self._slots(blocks[None])[0])
        is_bad_X = torch.zeros(len(slots_X), dtype=torch.bool, device=self.device)
        for store in self._cache:
            bad_X = ~store.index_select(0, slots_X).isfinite().all(-1)
            store.index_fill_(0, slots_X[bad_X], 0.0)
            is_bad_X |= bad_X
        is_bad_N: np.ndarray = is_bad_X.view(len(blocks), -1).any(-1).cpu().numpy()
        return is_bad_N

    def _table(self, held: list[np.ndarray], n_columns: int = 0) -> np.ndarray:
        """Blocks side by side, as wide as the longest and at least n_columns, filled up with the trash."""
        blocks_BN = np.full((len(held), max(n_columns, *map(len, held))), TRASH_BLOCK)
        for row, blocks in enumerate(held):
            blocks_BN[row, : len(blocks)] = blocks
        return blocks_BN

    def _slots(self, blocks_BN: np.ndarray) -> np.ndarray:
        """Flat slots of all positions of these blocks, (B, N x block_size)."""
        return (blocks_BN[..., None] * self.block_size + self._offsets).reshape(len(blocks_BN), -1)

    def _slots_at(self, positions_BT: np.ndarray, blocks_BN: np.ndarray) -> np.ndarray:
        """Flat slot of each position, (B, T)."""
        block_BT, offset_BT = np.divmod(positions_BT, self.block_size)
        return np.take_along_axis(blocks_BN, block_BT, axis=1) * self.block_size + offset_BT

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def _asked(hidden_BTD: Tensor, is_token_BT: np.ndarray) -> Tensor:
    """Those of tokens, (X, D), without the rows of trash behind them."""
    hidden_BTD = hidden_BTD[: len(is_token_BT)]
    return hidden_BTD.flatten(0, 1) if is_token_BT.all() else hidden_BTD[torch.from_numpy(is_token_BT)]
