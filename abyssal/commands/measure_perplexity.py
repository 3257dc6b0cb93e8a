"""`abyssal perplexity DIR`: how well a checkpoint foresees a text, in the precision that is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from abyssal.checkpoint.load import FORMATS, Loaded, Weights, load_checkpoint
from abyssal.commands.checkpoint_path import resolve_checkpoint
from abyssal.commands.fits import check_loadable
from abyssal.commands.options import parsed
from abyssal.evals.perplexity import Perplexity, cut_windows, held_out_text, perplexity
from abyssal.machine import Precision, keep_freed_memory
from abyssal.progress import bytes_bar
from abyssal.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextOptions:
    text: Path | None = None  # UTF-8; without it the language reference that comes with Python
    windows: int = 32
    window: int = 512  # tokens

    def __post_init__(self) -> None:
        if self.windows < 0:
            raise ValueError(f"windows={self.windows} is less than none")


@dataclass(frozen=True)
class PerplexityOptions:
    directory: Annotated[Path, tyro.conf.Positional]  # a checkpoint, or a run and its name: out/laptop/r1
    weights: Literal["compute", "fp8", "int8", "int4"] = "compute"  # compute: in the type of products
    dtype: Precision | None = None  # of products; FP32, or auto with weights in few bits
    device: str = "auto"
    on: Annotated[TextOptions, tyro.conf.arg(name="")] = TextOptions()
    refuse: bool = True  # do not load what cannot fit into memory


def measure_perplexity(arguments: list[str]) -> None:
    options: PerplexityOptions = parsed(PerplexityOptions, args=arguments, prog="abyssal perplexity")
    console = Console()
    path = resolve_checkpoint(options.directory)
    keep_freed_memory()
    check_loadable(path, weights=options.weights, dtype=options.dtype, device=options.device, refuse=options.refuse)
    loaded = load(path, options.weights, options.dtype, options.device, console)
    if loaded.tokenizer is None:
        raise FileNotFoundError(f"{path} has no tokenizer.json: copy the model's tokenizer files into it")
    windows_WT = windows(options.on, loaded.tokenizer, most_tokens=loaded.config.max_position_embeddings)
    found = measure(loaded, windows_WT, console)
    console.print(
        f"perplexity {found.perplexity:.4f} (loss {found.loss:.5f}) over {found.n_tokens:,} tokens in "
        f"{len(windows_WT)} windows of {windows_WT.shape[1]}, {text_name(options.on)}; "
        f"{found.tokens_per_s:,.0f} tokens/s",
        highlight=False,
        soft_wrap=True,
    )


def load(path: Path, weights: Weights, dtype: Precision | torch.dtype | None, device: str, console: Console) -> Loaded:
    with bytes_bar(f"loading {path}", console) as on_bytes:
        chosen = dtype or ("auto" if weights in FORMATS else "float32")
        return load_checkpoint(path, dtype=chosen, device=device, weights=weights, on_bytes=on_bytes)


def windows(options: TextOptions, tokenizer: Tokenizer, *, most_tokens: int) -> Tensor:
    """(W, T) ids, T no more than the model's context."""
    text = held_out_text() if options.text is None else options.text.read_text(encoding="utf-8")
    return cut_windows(text, tokenizer, length=min(options.window, most_tokens), most=options.windows)


def text_name(options: TextOptions) -> str:
    return "Python's language reference" if options.text is None else str(options.text)


def measure(loaded: Loaded, windows_WT: Tensor, console: Console) -> Perplexity:
    columns = (TextColumn("perplexity"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(windows_WT))
        return perplexity(loaded.model, windows_WT, on_window=lambda n_done: bar.update(task, completed=n_done))
