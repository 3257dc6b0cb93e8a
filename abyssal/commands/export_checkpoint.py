"""`abyssal export CHECKPOINT --to FORMAT --out DIR`: a checkpoint of any format as one that other tools load.

What loses something says how much: perplexity on held-out text before and after.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from torch import Tensor

from abyssal.checkpoint.activation_aware import ScaledSource, find_scales
from abyssal.checkpoint.export_hf import ExportFormat, export_hf
from abyssal.checkpoint.gguf_write import GgufQuant, write_gguf
from abyssal.checkpoint.load import FORMATS, OnBytes, Weights
from abyssal.checkpoint.source import Source, open_checkpoint
from abyssal.commands.checkpoint_path import resolve_checkpoint
from abyssal.commands.fits import check_loadable
from abyssal.commands.measure_perplexity import TextOptions, load, measure, text_name, windows
from abyssal.commands.options import parsed
from abyssal.evals.perplexity import Perplexity, calibration_text, cut_windows
from abyssal.kernels.quantize import QuantFormat, ScaleFormat
from abyssal.machine import Precision, compute_dtype, keep_freed_memory, resolve_device
from abyssal.progress import bytes_bar

CALIBRATION_WINDOWS, CALIBRATION_WINDOW = 8, 512


@dataclass(frozen=True)
class ExportOptions:
    checkpoint: Annotated[Path, tyro.conf.Positional]  # of any format, or a run and its name: out/laptop/r1
    to: ExportFormat | Literal["gguf"]
    out: Path  # a new directory, or an earlier checkpoint that it is to replace; for gguf a file
    quant: GgufQuant | None = None  # of GGUF, BF16 unless given
    scale_format: ScaleFormat | None = None  # of FP8: ue8m0 are powers of two; the checkpoint's own, or else fp32
    activation_aware: bool = False  # for int8 and int4: round by what goes through each channel
    calibration: Path | None = None  # text for that; without it, docstrings of Python's own modules
    shard_gb: float = 5.0
    dtype: Precision = "auto"  # that perplexity is measured in
    on: Annotated[TextOptions, tyro.conf.arg(name="")] = TextOptions()  # for perplexity; 0 windows leave it out
    refuse: bool = True  # to measure perplexity, do not load what cannot fit into memory

    def __post_init__(self) -> None:
        if self.quant is not None and self.to != "gguf":
            raise ValueError(f"--quant {self.quant} is a type of GGUF's; write --to gguf, or leave it out")
        if self.to == "gguf" and self.out.suffix != ".gguf":
            raise ValueError(f"--out {self.out} should be a file for gguf: {self.out}.gguf")
        if self.to == "gguf" and self.scale_format is not None:
            raise ValueError(f"--scale-format {self.scale_format} is for fp8, not gguf; leave it out")
        if self.activation_aware and self.to in ("bf16", "fp8", "gguf"):
            raise ValueError(f"--activation-aware is for int8 and int4, not {self.to}; leave it out")
        if not self.shard_gb > 0:
            raise ValueError(f"shard_gb={self.shard_gb} holds no tensor; use 5")


def export_checkpoint(arguments: list[str]) -> None:
    options: ExportOptions = parsed(ExportOptions, args=arguments, prog="abyssal export")
    console = Console()
    keep_freed_memory()
    path = resolve_checkpoint(options.checkpoint)
    source = open_checkpoint(path)
    tokenizer = source.tokenizer()
    format = FORMATS.get(options.to)
    loses = format is not None or (options.quant or "").startswith("Q")
    windows_WT = before = None
    measures = loses and tokenizer is not None and options.on.windows > 0
    if measures or options.activation_aware:  # else it is written tensor by tensor, whatever its size
        check_loadable(path, weights="compute", dtype=options.dtype, refuse=options.refuse)
    if measures and tokenizer is not None:
        windows_WT = windows(options.on, tokenizer, most_tokens=source.config.max_position_embeddings)
        before = _perplexity(path, "compute", options, windows_WT, console)
    if options.activation_aware and format:
        source = _scaled(source, path, format, options, console)
    with bytes_bar(f"writing {options.out}", console) as on_bytes:
        said = _to_gguf(source, options, on_bytes) if options.to == "gguf" else _to_directory(source, options, on_bytes)
    console.print(said, highlight=False, soft_wrap=True, markup=False)
    if before is not None and windows_WT is not None:
        after = _perplexity(options.out, format or "compute", options, windows_WT, console)
        change = 100 * (math.exp(after.loss - before.loss) - 1)
        console.print(
            f"perplexity {before.perplexity:.4f} before, {after.perplexity:.4f} after ({change:+.2f} %), over "
            f"{after.n_tokens:,} tokens of {text_name(options.on)}",
            highlight=False,
            soft_wrap=True,
        )
    elif loses:
        why = "0 windows" if tokenizer is not None else f"{path} has no tokenizer"
        console.print(f"perplexity not measured: {why}", highlight=False, soft_wrap=True)


def _to_directory(source: Source, options: ExportOptions, on_bytes: OnBytes) -> str:
    assert options.to != "gguf"
    done = export_hf(
        source, options.out, to=options.to, scale_format=options.scale_format,
        max_shard_bytes=int(options.shard_gb * 1e9), on_bytes=on_bytes,
    )  # fmt: skip
    said = f"{options.out}: {done.n_bytes / 1e6:,.1f} MB of weights"
    if options.to in FORMATS:
        said += f", {done.n_rounded} matrices in {options.to}"
    if done.kept:
        said += f"; {len(done.kept)} stay BF16, no group of columns divides them ({done.kept[0]}, ...)"
    return said


def _to_gguf(source: Source, options: ExportOptions, on_bytes: OnBytes) -> str:
    quant = options.quant or "BF16"
    done = write_gguf(source, options.out, quant=quant, name=options.out.stem, on_bytes=on_bytes)
    return "\n".join((f"{done.file}: {done.n_bytes / 1e6:,.1f} MB, {quant}", *(f"note: {n}" for n in done.notes)))


def _perplexity(
    path: Path, weights: Weights, options: ExportOptions, windows_WT: Tensor, console: Console
) -> Perplexity:
    """Before and after in the same type of products."""
    dtype = compute_dtype(options.dtype, resolve_device("auto"))
    return measure(load(path, weights, dtype, "auto", console), windows_WT, console)


def _scaled(
    source: Source, path: Path, format: QuantFormat, options: ExportOptions, console: Console
) -> Source:
    """The same checkpoint with its channels scaled for the format that it is to be rounded to."""
    loaded = load(path, "compute", torch.float32, "auto", console)
    if loaded.tokenizer is None:
        raise ValueError(f"{path} has no tokenizer to read a calibration text with; leave out --activation-aware")
    text = calibration_text() if options.calibration is None else options.calibration.read_text(encoding="utf-8")
    length = min(CALIBRATION_WINDOW, loaded.config.max_position_embeddings)
    ids_BT = cut_windows(text, loaded.tokenizer, length=length, most=CALIBRATION_WINDOWS)
    with bytes_bar("scaling channels", console) as on_bytes:
        return ScaledSource(source, find_scales(loaded.model, ids_BT, format, on_block=on_bytes), format)
