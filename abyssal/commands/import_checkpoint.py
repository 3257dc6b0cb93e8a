"""`abyssal import`: what a checkpoint is and whether it would load, before a byte of its weights is read; and then a
plain BF16 directory of it, written tensor by tensor."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from abyssal.checkpoint.export_hf import export_hf
from abyssal.checkpoint.load import REMEDY
from abyssal.checkpoint.source import Source, open_checkpoint
from abyssal.checkpoint.survey import Survey, survey, survey_index
from abyssal.commands.checkpoint_path import resolve_checkpoint
from abyssal.commands.options import parsed
from abyssal.model.config import ModelConfig
from abyssal.model.presets import shaped_like
from abyssal.progress import bytes_bar

INDEX_ENDING = ".safetensors.index.json"
LISTED = 50  # tensors of one fault


@dataclass(frozen=True)
class ImportOptions:
    path: Annotated[Path, tyro.conf.Positional]  # a checkpoint, or an index with config.json beside it
    check: bool = False  # say what it is and whether it would load, and write nothing
    out: Path | None = None  # write it here as a Hugging Face directory in BF16

    def __post_init__(self) -> None:
        if self.check and self.out is not None:
            raise ValueError(f"--check writes nothing and --out {self.out} does; leave out one of them")


def import_checkpoint(arguments: list[str]) -> None:
    options: ImportOptions = parsed(ImportOptions, args=arguments, prog="abyssal import")
    source = None
    with warnings.catch_warnings(record=True) as said:  # an MTP layer that is not there
        warnings.simplefilter("always")
        if options.path.name.endswith(INDEX_ENDING):
            found, words = survey_index(options.path), "not looked for: an index alone"
        else:
            source = open_checkpoint(options.path if options.path.is_file() else resolve_checkpoint(options.path))
            found, words = survey(source), speech(source)
    for line in report(found, words=words):
        print(line)
    for warning in said:
        print(f"note: {warning.message}")
    if found.verdict:
        raise ValueError(f"{found.path} would not load: {found.verdict}; {REMEDY}")
    if options.out is None:
        print("the names fit; shapes and types could not be checked" if found.names_only else "it would load")
        return
    if source is None:
        raise ValueError(f"{found.path} has no weights to write to {options.out}; name the directory that has them")
    with bytes_bar(f"writing {options.out}", Console(stderr=True)) as on_bytes:
        written = export_hf(source, options.out, to="bf16", on_bytes=on_bytes)
    print(f"{options.out}: {written.n_bytes:,} bytes of weights in BF16")


def report(found: Survey, *, words: str) -> list[str]:
    """A line a fact, and a line a tensor that does not fit."""
    config, memory = found.config, ", ".join(f"{kept} {gigabytes(n)}" for kept, n in found.memory.items())
    mtp = f", and {found.n_mtp:,} for MTP" if found.n_mtp else ""
    stored = ", ".join(f"{kind} {number:,}" for kind, number in sorted(found.stored.items())) or "unknown"
    size = "" if found.n_bytes is None else f", {found.n_bytes:,} bytes"
    facts = {
        "type": f"{found.kind}: {config.attention.upper()}, {config.feed_forward}",
        "shape": shape(config),
        "parameters": f"{found.n_parameters:,}, active {found.n_active:,}{mtp}",
        "numbers stored": stored,
        "on disk": f"{found.n_tensors:,} tensors, {found.n_files:,} files{size}",
        "cache": f"{2 * config.cache_width * config.num_hidden_layers:,} bytes a token in BF16",
        "tokenizer": words,
        "memory to load": memory,
    }
    lines = [str(found.path), *(f"  {name:<15} {fact}" for name, fact in facts.items())]
    for fault, names in found.faults.items():
        if names:
            lines += [f"  {fault}: {len(names):,}", *(f"    {name}" for name in names[:LISTED])]
            lines += [f"    and {len(names) - LISTED:,} more"] * (len(names) > LISTED)
    return lines


def shape(config: ModelConfig) -> str:
    dense = config.first_k_dense_replace
    parts = [
        f"{config.num_hidden_layers} layers" + (f" ({dense} dense)" if config.feed_forward == "moe" else ""),
        f"width {config.hidden_size:,}",
        f"{config.num_attention_heads} heads",
    ]
    if config.attention == "gqa":
        parts.append(f"{config.num_key_value_heads} of keys and values")
    if config.feed_forward == "moe":
        parts.append(
            f"{config.num_experts_per_tok} of {config.n_routed_experts} experts and {config.n_shared_experts} shared"
        )
    parts += [f"vocabulary {config.vocab_size:,}", f"context {config.max_position_embeddings:,}"]
    alike = shaped_like(config)
    return ", ".join(parts) + (f": that of {' and '.join(alike)}" if alike else "")


def speech(source: Source) -> str:
    """Its tokenizer and chat template, as far as there are any."""
    tokenizer = source.tokenizer()
    if tokenizer is None:
        return "none: it loads, but cannot be talked to"
    return f"{tokenizer.vocab_size:,} ids, {'no' if tokenizer.template is None else 'a'} chat template"


def gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:,.1f} MB"
