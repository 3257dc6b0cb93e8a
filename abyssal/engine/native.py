"""The native twin of the plain forward pass: the same layers in own C++ on a CPU, for the runner. (kernels/native)

It computes a flat list of tokens, each with its place in some sequence, through all layers into the same cache tensors
and expert record as the plain path. A token's numbers depend on its own sequence alone, to the bit: not on neighbours,
chunks or threads. Weights are packed when they are loaded. Linears sum in the order of torch's own where that can be
found out, so trainer and engine have the same bits in FP32 (`order_of_sums`).
Letters: B sequences, T new tokens, N tokens of a flat list, X tokens asked for, R rows of the block table, W wanted
tokens, V vocabulary, D width; of a product M outputs, K inputs.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.engine.blocks import TRASH_BLOCK
from abyssal.engine.sequence import Chunk
from abyssal.kernels.native_build import NotBuilt, library
from abyssal.machine import cache_directory
from abyssal.model.config import ModelConfig
from abyssal.model.mla import LATENT_NORM_EPS
from abyssal.model.quantized import format_of
from abyssal.model.rope import rope_amplitude, rope_tables
from abyssal.model.transformer import Transformer, count_parameters

MOST_ROPE = 1024  # widest rotated part of a head
LITTLE = 2_500_000  # products of a step below which a second thread costs more than it brings (0.1 ms of one)
FIRST_POSITIONS = 4096  # that rotation tables reach; they grow with the contexts
FOUR_LANES = -4  # as in native/matrix.h
DEFAULT_BLOCK = 512  # products summed in one go where torch's order is not known


class Shape(ctypes.Structure):
    """AbyssalShape of native/model.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "vocab_size hidden_size n_layers n_mtp n_heads intermediate_size first_k_dense is_moe "
            "is_mla q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim rope_interleave "
            "latent_norm n_kv_heads head_dim qk_norm "
            "n_experts n_shared n_chosen moe_width n_group topk_group by_sigmoid biased by_groups best_of_group "
            "norm_topk tied block_size router_block"
        ).split()),
        *((name, ctypes.c_double) for name in ("norm_eps", "latent_eps", "softmax_scale", "routed_scaling")),
    ]  # fmt: skip


class Step(ctypes.Structure):
    """AbyssalStep of native/step.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n_tokens", "n_columns", "n_wanted", "module", "only_wanted")),
        *((name, ctypes.c_void_p) for name in ("ids", "positions", "rows", "blocks", "wanted", "caches", "experts")),
        ("experts_are_bytes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("hidden_in", "hidden_out", "logits")),
    ]  # fmt: skip


def why_not(model: Transformer) -> str | None:
    """What keeps this model from the native path; None when nothing does."""
    if model.embed_tokens.weight.device.type != "cpu":
        return f"the model is on {model.embed_tokens.weight.device}"
    if format_of(model) is not None:
        return "weights in few bits have kernels of their own"
    if model.config.rope_dim > MOST_ROPE:
        return f"heads that rotate {model.config.rope_dim} features are wider than {MOST_ROPE}"
    return None


def native_forward(
    model: Transformer, *, block_size: int, native: bool | None, looks_ahead: bool = False
) -> NativeForward | None:
    """`native` None: where it can be. True insists, and a reason against it is an error."""
    if native is False:
        return None
    reason = why_not(model)
    if reason is None:
        try:
            return NativeForward(model, block_size=block_size, looks_ahead=looks_ahead)
        except NotBuilt as error:
            reason = str(error)
            if native is None:
                say_once(f"the engine computes in plain torch, which is slower: {reason}")
    if native:
        raise ValueError(f"native=True is not possible here: {reason}; leave native out")
    return None


@functools.cache
def say_once(line: str) -> None:
    print(line, file=sys.stderr)


class Tokens(NamedTuple):
    """A flat list: what each is, where it stands in its sequence, and whose row of the block table that is. Tokens of
    one row stand in the order of their positions."""

    ids_N: np.ndarray
    positions_N: np.ndarray
    rows_N: np.ndarray
    blocks_RN: np.ndarray


class NativeForward:
    def __init__(self, model: Transformer, *, block_size: int, looks_ahead: bool = False) -> None:
        config = model.config
        self._n_ahead = config.num_nextn_predict_layers if looks_ahead else 0
        self.config, self.dtype = config, model.dtype
        self._library = _library(model.dtype)
        blocks = sum_blocks(self._library, _widths(config), known=model.dtype == torch.float32)
        inputs, sums = (np.array(list(numbers), np.int64) for numbers in (blocks, blocks.values()))
        shape = _shape(config, block_size)
        if config.feed_forward == "moe":  # FP32 whatever the rest is, and its sums decide who is chosen
            k, few = config.hidden_size, config.n_routed_experts
            shape.router_block = order_of_sums(self._library, k, n_outputs=few) or blocks[k]
        # the library's name stands for its source, its compiler's flags and the CPU
        self.numerics = f"{Path(self._library._name).stem}, sums of {blocks} and {shape.router_block}"
        self._handle = self._library.abyssal_new(ctypes.byref(shape), len(inputs), inputs.ctypes.data, sums.ctypes.data)
        if not self._handle:
            raise MemoryError("the packed weights do not fit in memory beside the model's; use native=False")
        self._step = Step()
        self._n_positions = self._n_threads = 0
        _, self._n_active = count_parameters(model)
        self.load(model)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.abyssal_free(self._handle)
            self._handle = None

    @torch.no_grad()
    def load(self, model: Transformer) -> None:
        """Pack these weights. What the caller changes in the model later is not seen before the next call."""
        threads = torch.get_num_threads()
        for name, tensor in model.state_dict().items():
            layer, tail = _place(name, self.config)
            if tensor.dtype not in (torch.float32, torch.bfloat16):
                tensor = tensor.float()
            tensor = tensor.contiguous()
            is_bf16 = tensor.dtype == torch.bfloat16
            found = self._library.abyssal_put(self._handle, layer, tail.encode(), tensor.data_ptr(), is_bf16, threads)
            assert found == 0, f"{name}: {self._error() if found < 0 else 'no such tensor in native/model.h'}"
        self._frequencies, self._n_positions = model.rope_frequencies, 0
        self._reach(min(FIRST_POSITIONS, self.config.max_position_embeddings))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, all threads are ours and torch has one: two teams that wait awake for their own keep each other off
        the cores (with two, a step of 16 rows took four times as long)."""
        self._n_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(self._n_threads)
            self._n_threads = 0

    def attach(self, caches: list[Tensor], experts: Tensor | None) -> None:
        """Where entries and chosen experts are kept from now on."""
        self._kept = caches, experts
        self._caches = (ctypes.c_void_p * len(caches))(*(cache.data_ptr() for cache in caches))
        step = self._step
        step.caches, step.experts = ctypes.addressof(self._caches), None if experts is None else experts.data_ptr()
        step.experts_are_bytes = experts is not None and experts.dtype == torch.uint8

    def prefill(self, chunks: list[Chunk]) -> tuple[Tensor, Tensor]:
        """Logits and hidden state of each chunk's last token."""
        lengths_B = np.array([len(chunk.ids) for chunk in chunks])
        tokens = Tokens(
            np.concatenate([chunk.ids for chunk in chunks]),
            np.concatenate([np.arange(chunk.start, chunk.start + len(chunk.ids)) for chunk in chunks]),
            np.repeat(np.arange(len(chunks)), lengths_B),
            block_table([chunk.blocks for chunk in chunks]),
        )
        last_B = lengths_B.cumsum() - 1
        if not self._n_ahead and self._kept[1] is None:
            return self._run(tokens, last_B, only_wanted=True)
        logits_BV, hidden_ND = self._run(tokens, last_B)
        ahead_ND = hidden_ND
        for module in range(self._n_ahead):
            # what the module reads beside a token: the id module + 1 places after it, 0 where nobody knows it yet
            following = [np.pad(np.concatenate((c.ids, c.following)), (0, self._n_ahead)) for c in chunks]
            ids_N = np.concatenate([
                ids[module + 1 : module + 1 + len(chunk.ids)] for ids, chunk in zip(following, chunks, strict=True)
            ])  # fmt: skip
            _, ahead_ND = self._run(tokens._replace(ids_N=ids_N), last_B[:0], module=module, hidden_ND=ahead_ND)
        return logits_BV, hidden_ND[torch.from_numpy(last_B)]

    def decode(
        self, ids_BT: np.ndarray, positions_BT: np.ndarray, blocks_BN: np.ndarray, counts_B: np.ndarray | None
    ) -> tuple[Tensor, Tensor]:
        """Logits and hidden states of the first counts_B[b] tokens of each row, row after row."""
        tokens = _flat(ids_BT, positions_BT, blocks_BN, counts_B)
        return self._run(tokens, np.arange(len(tokens.ids_N)))

    def look_ahead(
        self,
        module: int,
        hidden_XD: Tensor,
        ids_BT: np.ndarray,
        positions_BT: np.ndarray,
        blocks_BN: np.ndarray,
        counts_B: np.ndarray,
    ) -> Tensor:
        """Hidden states of one MTP module, which joins those given with the embedding of these ids."""
        tokens = _flat(ids_BT, positions_BT, blocks_BN, counts_B)
        return self._run(tokens, np.arange(0), module=module, hidden_ND=hidden_XD.float().contiguous())[1]

    def logits(self, hidden_XD: Tensor) -> Tensor:
        hidden_XD = hidden_XD.float().contiguous()
        logits_XV = torch.empty(len(hidden_XD), self.config.vocab_size)
        pointers = hidden_XD.data_ptr(), len(hidden_XD), logits_XV.data_ptr()
        if self._library.abyssal_logits(self._handle, *pointers, self._n_threads or torch.get_num_threads()):
            raise RuntimeError(f"the native logits failed: {self._error()}")
        return logits_XV

    def _run(
        self,
        tokens: Tokens,
        wanted_W: np.ndarray,
        *,
        module: int = -1,
        hidden_ND: Tensor | None = None,
        only_wanted: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Logits of the wanted tokens, which come in rising order, and every token's hidden state, or only theirs: then
        the last layer computes no more of the others than what they leave in the cache."""
        n_tokens, config = len(tokens.ids_N), self.config
        self._reach(int(tokens.positions_N.max()) + 1)
        logits_WV = torch.empty(len(wanted_W), config.vocab_size)
        out_ND = torch.empty(len(wanted_W) if only_wanted else n_tokens, config.hidden_size)
        arrays = [np.ascontiguousarray(array, np.int64) for array in (*tokens, wanted_W)]
        step = self._step
        step.n_tokens, step.n_wanted, step.module, step.only_wanted = n_tokens, len(wanted_W), module, only_wanted
        step.n_columns = tokens.blocks_RN.shape[1]
        step.ids, step.positions, step.rows, step.blocks, step.wanted = (int(array.ctypes.data) for array in arrays)
        step.hidden_in = None if hidden_ND is None else hidden_ND.data_ptr()
        step.hidden_out, step.logits = out_ND.data_ptr(), logits_WV.data_ptr()
        is_little = n_tokens * self._n_active < LITTLE
        n_threads = 1 if is_little else self._n_threads or torch.get_num_threads()
        if self._library.abyssal_forward(self._handle, ctypes.byref(step), n_threads):
            raise RuntimeError(f"the native forward step failed: {self._error()}")
        return logits_WV, out_ND

    def _reach(self, n_positions: int) -> None:
        """Rotation tables for so many positions, made by the plain path's own functions."""
        if n_positions <= self._n_positions:
            return
        self._n_positions = max(n_positions, min(2 * self._n_positions, self.config.max_position_embeddings))
        positions_BT = torch.arange(self._n_positions)[None]
        cos, sin = rope_tables(positions_BT, self._frequencies, rope_amplitude(self.config))
        cos, sin = cos.contiguous(), sin.contiguous()
        half = self.config.rope_dim // 2
        if self._library.abyssal_rope(self._handle, cos.data_ptr(), sin.data_ptr(), self._n_positions, half):
            raise MemoryError(f"no memory for {self._n_positions} positions' rotations")

    def _error(self) -> str:
        return str(self._library.abyssal_error(self._handle).decode())


def block_table(held: list[np.ndarray]) -> np.ndarray:
    """Blocks side by side, as wide as the longest, filled up with the trash."""
    blocks_RN = np.full((len(held), max(map(len, held))), TRASH_BLOCK)
    for row, blocks in enumerate(held):
        blocks_RN[row, : len(blocks)] = blocks
    return blocks_RN


def _flat(ids_BT: np.ndarray, positions_BT: np.ndarray, blocks_BN: np.ndarray, counts_B: np.ndarray | None) -> Tokens:
    n_rows, n_tokens = ids_BT.shape
    if n_tokens == 1:
        return Tokens(ids_BT[:, 0], positions_BT[:, 0], np.arange(n_rows), blocks_BN)
    counts_B = np.full(n_rows, n_tokens) if counts_B is None else counts_B
    is_token_BT = np.arange(n_tokens) < counts_B[:, None]
    return Tokens(ids_BT[is_token_BT], positions_BT[is_token_BT], np.repeat(np.arange(n_rows), counts_B), blocks_BN)


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL:
    macros = ("ABYSSAL_BF16",) if dtype == torch.bfloat16 else ()
    found = library("forward", *macros, folder=cache_directory() / "native")
    pointer, integer, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
    for name, result, arguments in (
        ("new", pointer, (pointer, integer, pointer, pointer)),
        ("free", None, (pointer,)),
        ("error", text, (pointer,)),
        ("put", integer, (pointer, integer, text, pointer, integer, integer)),
        ("rope", integer, (pointer, pointer, pointer, integer, integer)),
        ("forward", integer, (pointer, pointer, integer)),
        ("logits", integer, (pointer, pointer, integer, pointer, integer)),
        ("product", integer, (pointer, pointer, integer, integer, integer, integer, pointer)),
    ):
        function = getattr(found, f"abyssal_{name}")
        function.restype, function.argtypes = result, arguments
    return found


def sum_blocks(found: ctypes.CDLL, widths: list[int], *, known: bool) -> dict[int, int]:
    """Products over so many inputs: how many are summed in one go."""
    return {k: order_of_sums(found, k) or DEFAULT_BLOCK if known else DEFAULT_BLOCK for k in widths}


@functools.cache
def order_of_sums(found: ctypes.CDLL, n_inputs: int, *, n_outputs: int = 48) -> int | None:
    """How torch's FP32 linear sums on this machine: the number of products in one block; None when it is not so.

    MKL sums in blocks, each product added by a fused multiply-add; for few outputs in FOUR_LANES. Found out by trying:
    a right guess gives every bit.
    """
    generator = torch.Generator().manual_seed(n_inputs)
    x_NK, w_MK = (torch.randn(n, n_inputs, generator=generator) for n in (8, n_outputs))
    with torch.no_grad():
        wanted_NM = F.linear(x_NK, w_MK)
    out_NM = torch.empty_like(wanted_NM)
    halves = {-(-n_inputs // 2 // multiple) * multiple for multiple in (1, 2, 4, 8, 16)}
    for block in (n_inputs, 192, 128, 256, 320, 336, 384, 448, 512, *sorted(halves), FOUR_LANES):
        pointers = (tensor.data_ptr() for tensor in (x_NK, w_MK))
        found.abyssal_product(*pointers, len(x_NK), len(w_MK), n_inputs, block, out_NM.data_ptr())
        if torch.equal(out_NM, wanted_NM):
            return block
    return None


def _widths(config: ModelConfig) -> list[int]:
    """Every number of inputs that some product has."""
    heads = config.num_attention_heads
    values = heads * (config.v_head_dim if config.attention == "mla" else config.head_dim)
    widths = {config.hidden_size, values, config.intermediate_size, config.q_lora_rank or 0}
    if config.feed_forward == "moe":
        widths |= {config.moe_intermediate_size, config.n_shared_experts * config.moe_intermediate_size}
    if config.num_nextn_predict_layers:
        widths.add(2 * config.hidden_size)
    return sorted(widths - {0})


def _place(name: str, config: ModelConfig) -> tuple[int, str]:
    """A tensor's layer, -1 outside of them, and its name there."""
    found = re.fullmatch(r"(layers|mtp)\.(\d+)\.(?:block\.)?(.*)", name)
    if found is None:
        return -1, name
    return int(found[2]) + (config.num_hidden_layers if found[1] == "mtp" else 0), found[3]


def _shape(config: ModelConfig, block_size: int) -> Shape:
    return Shape(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_mtp=config.num_nextn_predict_layers,
        n_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        first_k_dense=config.first_k_dense_replace,
        is_moe=config.feed_forward == "moe",
        is_mla=config.attention == "mla",
        q_lora_rank=config.q_lora_rank or 0,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        rope_interleave=config.rope_interleave,
        latent_norm=config.latent_norm,
        n_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        qk_norm=config.qk_norm,
        n_experts=config.n_routed_experts,
        n_shared=config.n_shared_experts,
        n_chosen=config.num_experts_per_tok,
        moe_width=config.moe_intermediate_size,
        n_group=config.n_group,
        topk_group=config.topk_group,
        by_sigmoid=config.scoring_func == "sigmoid",
        biased=config.topk_method == "noaux_tc",
        by_groups=config.topk_method != "greedy" and config.n_group > 1,
        best_of_group=2 if config.topk_method == "noaux_tc" else 1,
        norm_topk=config.norm_topk_prob,
        tied=config.tie_word_embeddings,
        block_size=block_size,
        norm_eps=config.rms_norm_eps,
        latent_eps=LATENT_NORM_EPS,
        softmax_scale=config.softmax_scale,
        routed_scaling=config.routed_scaling_factor,
    )
