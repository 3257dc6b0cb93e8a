"""Any checkpoint as one GGUF file, for llama.cpp and what is built on it. Owns which tensor gets which type.

As llama.cpp does it: norms, biases and gates stay FP32. A Q4_0 file has what makes the logits in Q8_0. Rows that do not
divide into blocks of 32 stay F16, which is said. One official tensor is in memory at a time; the file is whole or not
there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGUFWriter, LlamaFileType, quantize
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from torch import Tensor

from abyssal.checkpoint.gguf_config import architecture, config_to_gguf
from abyssal.checkpoint.gguf_names import EMBEDDING, HEAD, ROPE_FACTORS, Entry, entries, to_gguf
from abyssal.checkpoint.gguf_rope import rope_factors
from abyssal.checkpoint.gguf_tokenizer import tokenizer_to_gguf
from abyssal.checkpoint.load import OnBytes, check_tensors, meta_model
from abyssal.checkpoint.own_sampling import GGUF_KEYS, said_sampling
from abyssal.checkpoint.source import Source
from abyssal.checkpoint.tensor_names import official_views
from abyssal.model.config import ModelConfig

GgufQuant = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0"]
FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
}


class WrittenGguf(NamedTuple):
    """`notes` say what the file lacks or has in another type than was asked for, one line each."""

    file: Path
    n_bytes: int
    notes: list[str]


class Planned(NamedTuple):
    entry: Entry
    shape: tuple[int, ...]
    kind: Kind

    @property
    def n_bytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * block_bytes


def write_gguf(
    source: Source, file: Path, *, quant: GgufQuant, name: str | None = None, on_bytes: OnBytes | None = None
) -> WrittenGguf:
    """`name` is what the file calls the model. A shape or tokenizer that GGUF has no words for is a ValueError, before
    anything is written."""
    if quant not in FILE_TYPES:
        raise ValueError(f"quant={quant!r} is unknown; use one of {', '.join(FILE_TYPES)}")
    config = source.config
    described = config_to_gguf(config)
    meta = meta_model(config, len(source.tensors), path=source.path)
    shapes = {official: tuple(view.shape) for official, view in official_views(meta).items()}
    check_tensors(source, shapes)
    plan = _plan(config, shapes, quant)
    metadata: dict[str, Any] = {
        "general.type": "model",
        "general.name": name or source.path.stem,
        "general.file_type": int(FILE_TYPES[quant]),
        **{GGUF_KEYS[key]: value for key, value in said_sampling(source.path).items()},
        **described.metadata,
        **_vocabulary(source),
    }
    if quant.startswith("Q"):
        metadata["general.quantization_version"] = GGML_QUANT_VERSION
    notes = [*described.notes, *_notes(plan, quant)]
    if metadata["tokenizer.ggml.model"] == "no_vocab":
        notes.append("without a tokenizer, since the checkpoint has none")

    partial = file.with_name(file.name + ".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(partial, source, architecture(config), metadata, plan, on_bytes)
        os.replace(partial, file)
    except OSError as error:
        raise OSError(f"could not write {file}: {error.strerror or error}; free some space and run again") from None
    finally:
        if partial.is_file():
            partial.unlink()
    return WrittenGguf(file, file.stat().st_size, notes)


def _plan(config: ModelConfig, shapes: dict[str, tuple[int, ...]], quant: GgufQuant) -> list[Planned]:
    arch = architecture(config)
    logits = EMBEDDING if config.tie_word_embeddings else HEAD
    plan = []
    for entry in entries(config, arch):
        shape = shapes[entry.official[0]]
        if entry.layout == "experts":
            shape = (len(entry.official), *shape)
        elif entry.layout == "k_b":
            shape = (entry.n_heads, config.kv_lora_rank, config.qk_nope_head_dim)
        elif entry.layout == "v_b":
            shape = (entry.n_heads, config.v_head_dim, config.kv_lora_rank)
        plan.append(Planned(entry, shape, _kind(entry, shape, quant, makes_logits=entry.gguf == logits)))
    return plan


def _kind(entry: Entry, shape: tuple[int, ...], quant: GgufQuant, *, makes_logits: bool) -> Kind:
    if len(shape) == 1 or entry.gguf.endswith("ffn_gate_inp.weight"):
        return Kind.F32
    kind = Kind.Q8_0 if quant == "Q4_0" and makes_logits else Kind[quant]
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else Kind.F16


def _notes(plan: Sequence[Planned], quant: GgufQuant) -> list[str]:
    wide = [planned for planned in plan if planned.kind == Kind.F16 and quant != "F16"]
    if not wide:
        return []
    columns = sorted({planned.shape[-1] for planned in wide})
    return [f"{len(wide)} tensors stay F16, among them {wide[0].entry.gguf}: {columns} columns do not divide by 32"]


def _vocabulary(source: Source) -> dict[str, Any]:
    tokenizer = source.tokenizer()
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    return tokenizer_to_gguf(tokenizer, source.config.vocab_size)


def _write(
    file: Path,
    source: Source,
    arch: str,
    metadata: dict[str, Any],
    plan: Sequence[Planned],
    on_bytes: OnBytes | None,
) -> None:
    writer = GGUFWriter(file, arch)
    for key, value in metadata.items():
        _add(writer, key, value)
    factors = rope_factors(source.config)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes, raw_dtype=Kind.F32)
    for planned in plan:
        writer.add_tensor_info(
            planned.entry.gguf, planned.shape, np.dtype(np.float32), planned.n_bytes, raw_dtype=planned.kind
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        (out,) = writer.fout
        writer.write_padding(out, out.tell())
        if factors is not None:
            out.write(factors.data)
            writer.write_padding(out, factors.nbytes)
        n_done, n_all = 0, sum(planned.n_bytes for planned in plan)
        for planned in plan:
            began = out.tell()
            for official in planned.entry.official:
                out.write(_encoded(source, official, planned).data)
            assert out.tell() - began == planned.n_bytes, planned.entry.gguf
            writer.write_padding(out, planned.n_bytes)
            n_done += planned.n_bytes
            if on_bytes is not None:
                on_bytes(n_done, n_all)
        out.flush()
        os.fsync(out.fileno())
    finally:
        writer.close()


def _encoded(source: Source, official: str, planned: Planned) -> NDArray[Any]:
    """One official tensor, or the part of it that belongs here, as the bytes of this type."""
    weight = to_gguf(planned.entry, source.read(official), source.config)
    if planned.kind == Kind.BF16:
        return _finite(weight.to(torch.bfloat16), source, official).contiguous().view(torch.int16).numpy()
    if planned.kind == Kind.F16:
        half = weight.to(torch.float16)
        if not half.isfinite().all() and weight.isfinite().all():
            raise ValueError(f"{source.path}: {official} has numbers beyond 65,504, the largest of F16; use BF16")
        return _finite(half, source, official).contiguous().numpy()
    numbers = _finite(weight.float(), source, official).contiguous().numpy()
    return numbers if planned.kind == Kind.F32 else quantize(numbers.reshape(-1, numbers.shape[-1]), planned.kind)


def _finite(weight: Tensor, source: Source, official: str) -> Tensor:
    if not weight.isfinite().all():
        raise ValueError(f"{source.path}: {official} holds NaN or infinite numbers; export another checkpoint")
    return weight


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](key, value)
