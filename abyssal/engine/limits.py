"""What an engine takes: ids of its vocabulary, ways to draw, and how much memory when nobody says."""

from __future__ import annotations

import torch

from abyssal.model.config import ModelConfig
from abyssal.types import SamplingParams

DEFAULT_CACHE_BYTES = 2 << 30  # what the cache may take when nobody says how many blocks it has


def check_ids(ids: list[int], n_vocab: int, *, what: str) -> None:
    for i in (min(ids), max(ids)):
        if not 0 <= i < n_vocab:
            raise ValueError(
                f"{what} contains the id {i}, outside the vocabulary of {n_vocab}; is this the model's tokenizer?"
            )


def check_params(params: SamplingParams, *, vocab_size: int, knows_text: bool, records: bool) -> None:
    """What a request asks of its draws. `records`: the engine tells what ids were drawn from."""
    if params.stop and not knows_text:
        raise ValueError("stop strings need an engine that knows text; give it vocabulary=Vocabulary.of(tokenizer)")
    if params.logit_bias:
        check_ids(list(params.logit_bias), vocab_size, what="logit_bias")
    if params.reshapes and records:
        raise ValueError(
            "an engine with record_sampling=True draws from the model's logits as they are; leave penalties and "
            "logit_bias out"
        )


def default_blocks(config: ModelConfig, dtype: torch.dtype, *, block_size: int, wanted: int, at_least: int) -> int:
    n_layers = config.num_hidden_layers + config.num_nextn_predict_layers
    block_bytes = block_size * config.cache_width * dtype.itemsize * n_layers
    return max(min(wanted, DEFAULT_CACHE_BYTES // block_bytes), at_least) + 1  # block 0 is reserved


def check_sizes(**sizes: int | None) -> None:
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def check_step(step_tokens: int | None, max_batch: int) -> None:
    if step_tokens is not None and step_tokens <= max_batch:
        raise ValueError(
            f"step_tokens={step_tokens} leaves no token for prompts beside max_batch={max_batch} answers; "
            f"use {max_batch + 1} or more"
        )
