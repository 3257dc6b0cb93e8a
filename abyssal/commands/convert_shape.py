"""`abyssal convert`: GQA becomes latent attention, a dense feed-forward experts; what that costs and what healing gives
back, in a table.

Owns the text, the measuring and the table. Does not own the surgery (surgery/) or the healing (stages/heal.py).
Letters: B rows, T tokens, W windows.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import tyro
from rich.console import Console
from torch import Tensor

from abyssal.checkpoint.atomic import refuse_other_folders
from abyssal.checkpoint.convert import model_type
from abyssal.checkpoint.load import load_checkpoint
from abyssal.checkpoint.save import save_checkpoint
from abyssal.commands.checkpoint_path import resolve_checkpoint
from abyssal.commands.fits import check_loadable
from abyssal.commands.options import parsed
from abyssal.data.corpus import encode_documents, open_source
from abyssal.data.pack import pack_rows
from abyssal.evals.perplexity import cut_windows, held_out_text, perplexity
from abyssal.machine import Precision, keep_freed_memory
from abyssal.model.config import ModelConfig
from abyssal.model.moe import DenseFFN
from abyssal.model.transformer import Transformer, count_parameters
from abyssal.progress import bytes_bar, steps_bar
from abyssal.stages.heal import HealConfig, heal
from abyssal.surgery.calibrate import AttentionStatistics, attention_statistics, layer_inputs
from abyssal.surgery.mla_from_gqa import attentions, exact_config, mla_from_gqa, v3_config
from abyssal.surgery.moe_from_dense import moe_config, moe_from_dense, moe_weights
from abyssal.tokens.tokenizer import Tokenizer

PROG = "abyssal convert"
ROW = "{:<24}  {:>6}  {:>9}  {:>6}  {:>17}  {:>9}  {:>17}  {:>10}"
TITLES = ("shape", "latent", "experts", "healed", "cache bytes/token", "of before", "active parameters", "perplexity")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    directory: Annotated[Path, tyro.conf.Positional]  # a checkpoint: Llama, Qwen2, a student of ours, a GGUF file
    to: str  # mla, from GQA or MHA; moe, from a dense feed-forward; or both: mla,moe
    latent: str = ""  # widths of deepseek_v3's latent, e.g. 64,128; without: the exact conversion, in a type of ours
    experts: int = 0  # routed ones, that a feed-forward is split into
    shared: int = 1  # that are always active, of the same size
    active: int = 0  # routed ones for each token; all of them compute what the dense model does
    out: Path | None = None  # the directory to write; of several widths OUT/latent-WIDTH each
    text: str = "python"  # to calibrate and heal on: python, docs, debian:PACKAGE, a folder, a .jsonl
    held_out: Path | None = None  # a text file to measure on; without: Python's language reference
    calibration_tokens: int = 8192
    row_len: int = 512  # tokens of a row of text and of a window that is measured
    windows: int = 16  # that are measured
    heal_steps: str = ""  # e.g. 200; or 50,200: measured after 50 and after 200
    heal_rows: int = HealConfig.rows  # of a step
    heal_lr: float = HealConfig.lr
    seed: int = 0  # of the text's order
    device: str = "auto"
    dtype: Precision = "auto"
    refuse: bool = True  # do not load what cannot fit into memory

    def __post_init__(self) -> None:
        if not self.to or not self.shapes <= {"mla", "moe"}:
            raise ValueError(f"--to {self.to} is no shape to convert to; use mla, moe or mla,moe")
        if self.latent and "mla" not in self.shapes:
            raise ValueError(f"--latent {self.latent} is of latent attention; add mla to --to, or leave it out")
        if self.experts and "moe" not in self.shapes:
            raise ValueError(f"--experts {self.experts} is of a split feed-forward; add moe to --to, or leave it out")
        for name in ("calibration_tokens", "row_len", "windows", "heal_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is less than one")
        if self.steps != sorted(set(self.steps)) or min(self.steps, default=1) < 1:
            raise ValueError(f"--heal-steps {self.heal_steps} counts steps from the start; write them in order: 50,200")

    @property
    def shapes(self) -> set[str]:
        return set(self.to.split(","))

    @property
    def latents(self) -> list[int]:
        return numbers(self.latent, "latent")

    @property
    def steps(self) -> list[int]:
        return numbers(self.heal_steps, "heal-steps")


class Text(NamedTuple):
    """Rows of one text to calibrate on and, after them, to heal on; windows of another to measure on."""

    calibration_BT: Tensor
    healing_BT: Tensor
    held_out_WT: Tensor


class Target(NamedTuple):
    """`half`: attention is converted, or as it was, and the feed-forward still is."""

    half: ModelConfig
    config: ModelConfig


class Row(NamedTuple):
    """A line of the table. The cache is in BF16, of all layers."""

    shape: str
    latent: int | None
    experts: str
    steps: int
    cache_bytes: int
    cache_share: float
    active: int
    perplexity: float


def convert(arguments: list[str]) -> None:
    options: ConvertOptions = parsed(ConvertOptions, args=arguments, prog=PROG)
    keep_freed_memory()
    print_table(conversions(options, Console(stderr=True)))


def print_table(rows: Iterable[Row]) -> None:
    print(ROW.format(*TITLES))
    for row in rows:
        latent, share = "-" if row.latent is None else str(row.latent), f"{100 * row.cache_share:.0f} %"
        cost = (f"{row.cache_bytes:,}", share, f"{row.active:,}", f"{row.perplexity:.3f}")
        print(ROW.format(row.shape, latent, row.experts, row.steps, *cost), flush=True)


def conversions(options: ConvertOptions, console: Console) -> Iterator[Row]:
    """The table, the model as it was first. Each conversion is written once it is healed."""
    path = options.directory if options.directory.is_file() else resolve_checkpoint(options.directory)
    check_loadable(path, weights="master", dtype=options.dtype, device=options.device, refuse=options.refuse)
    with bytes_bar(f"loading {options.directory}", console) as on_bytes:
        model, tokenizer, config = load_checkpoint(
            path, dtype=options.dtype, device=options.device, on_bytes=on_bytes
        )
    if tokenizer is None:
        raise FileNotFoundError(f"{path} has no tokenizer.json, by which text becomes ids; copy it there")
    targets = targets_of(config, options)
    folders = folders_of(targets, options)
    for folder in folders:
        if folder is not None:
            refuse_other_folders(folder)  # before any work
    text = read_text(options, tokenizer, longest=config.max_position_embeddings, console=console)
    original = measured(model, text, console, shape=model_type(config), steps=0)
    yield original
    statistics, experts = calibrated(model, targets[0], text.calibration_BT, options, console)
    for target, folder in zip(targets, folders, strict=True):
        student = convert_model(model, target, statistics, experts)
        shape = model_type(target.config) + (", exact" if is_exact(target.config, options) else "")
        yield measured(student, text, console, shape=shape, steps=0, before=original)
        yield from healed(student, model, text, options, console, shape=shape, before=original)
        if folder is not None:
            save_checkpoint(folder, student, tokenizer)


def healed(
    student: Transformer,
    teacher: Transformer,
    text: Text,
    options: ConvertOptions,
    console: Console,
    *,
    shape: str,
    before: Row,
) -> Iterator[Row]:
    """A row after each number of steps that was asked for."""
    if not options.steps:
        return
    config = HealConfig(steps=options.steps[-1], rows=options.heal_rows, lr=options.heal_lr)
    healing = heal(student, teacher, text.healing_BT, config)
    for start, end in itertools.pairwise([0, *options.steps]):
        with steps_bar(f"healing {shape}", console) as on_step:
            for n_done, _ in zip(range(start + 1, end + 1), healing, strict=False):
                on_step(n_done, config.steps)
        yield measured(student, text, console, shape=shape, steps=end, before=before)


def read_text(options: ConvertOptions, tokenizer: Tokenizer, *, longest: int, console: Console) -> Text:
    """As many rows of the text as calibrating and healing want, or as there are, which is said."""
    row_len = options.row_len
    if row_len > longest:
        raise ValueError(f"--row-len {row_len} is longer than the model's max_position_embeddings={longest}")
    n_calibrate = max(1, options.calibration_tokens // row_len)
    n_heal = max(options.steps, default=0) * options.heal_rows
    documents = (document.text for document in open_source(options.text, seed=options.seed).documents())
    encoded, n_tokens = [], 0
    for ids in encode_documents(documents, tokenizer, random.Random(options.seed), 0.0):
        encoded.append(ids)
        n_tokens += len(ids)
        if n_tokens >= (n_calibrate + n_heal) * row_len:
            break
    rows_BT = pack_rows(encoded, row_len=row_len)[: n_calibrate + n_heal]
    held_out = held_out_text() if options.held_out is None else options.held_out.read_text(encoding="utf-8")
    windows_WT = cut_windows(held_out, tokenizer, length=row_len, most=options.windows)
    calibration_BT, healing_BT = rows_BT[:n_calibrate], rows_BT[n_calibrate:]
    if len(healing_BT) < n_heal:
        console.print(
            f"note: {options.text} has {len(rows_BT)} rows of {row_len} tokens: healing uses each more than once",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        healing_BT = rows_BT
    return Text(calibration_BT, healing_BT, windows_WT)


def measured(
    model: Transformer, text: Text, console: Console, *, shape: str, steps: int, before: Row | None = None
) -> Row:
    config = model.config
    with steps_bar(f"perplexity of {shape}", console) as on_window:
        n_windows = len(text.held_out_WT)
        found = perplexity(model, text.held_out_WT, on_window=lambda n_done: on_window(n_done, n_windows))
    cache_bytes = 2 * config.cache_width * config.num_hidden_layers
    return Row(
        shape=shape,
        latent=config.kv_lora_rank or None,
        experts=experts_of(config),
        steps=steps,
        cache_bytes=cache_bytes,
        cache_share=1.0 if before is None else cache_bytes / before.cache_bytes,
        active=count_parameters(model)[1],
        perplexity=found.perplexity,
    )


def experts_of(config: ModelConfig) -> str:
    """1+4/16: one shared, four of sixteen."""
    if config.feed_forward == "dense":
        return "-"
    return f"{config.n_shared_experts}+{config.num_experts_per_tok}/{config.n_routed_experts}"


def targets_of(config: ModelConfig, options: ConvertOptions) -> list[Target]:
    """What is asked for, or the error that it would end in."""
    halves = [config]
    if "mla" in options.shapes:
        halves = [v3_config(config, latent=latent) for latent in options.latents] or [exact_config(config)]
    if "moe" not in options.shapes:
        return [Target(half, half) for half in halves]
    counts = {"experts": options.experts, "shared": options.shared, "active": options.active}
    return [Target(half, moe_config(half, **counts)) for half in halves]


def folders_of(targets: list[Target], options: ConvertOptions) -> list[Path | None]:
    """Where each is written, if anywhere."""
    if options.out is None or len(targets) == 1:
        return [options.out] * len(targets)
    return [options.out / f"latent-{target.config.kv_lora_rank}" for target in targets]


def is_exact(config: ModelConfig, options: ConvertOptions) -> bool:
    return not options.latents and config.num_experts_per_tok == config.n_routed_experts


def calibrated(
    model: Transformer, target: Target, rows_BT: Tensor, options: ConvertOptions, console: Console
) -> tuple[list[AttentionStatistics], list[dict[str, Tensor]]]:
    """What each layer's attention sees and says on these rows, and its feed-forward dealt out; where it is wanted."""
    statistics: list[AttentionStatistics] = []
    experts: list[dict[str, Tensor]] = []
    if not options.latents and "moe" not in options.shapes:
        return statistics, experts
    feed_forwards = [module for module in model.layers.modules() if isinstance(module, DenseFFN)]
    with torch.no_grad(), steps_bar("calibrating", console) as on_layer:
        for layer, attention_BTD, feed_forward_BTD in layer_inputs(model, rows_BT.to(model.embed_tokens.weight.device)):
            if options.latents:
                statistics.append(attention_statistics(model, attentions(model)[layer], attention_BTD))
            if "moe" in options.shapes:
                experts.append(moe_weights(feed_forwards[layer], feed_forward_BTD.flatten(0, 1), target.config))
            on_layer(layer + 1, len(model.layers))
    return statistics, experts


def convert_model(
    model: Transformer, target: Target, statistics: list[AttentionStatistics], experts: list[dict[str, Tensor]]
) -> Transformer:
    """A new model, the given one as it was."""
    student = model if target.half == model.config else mla_from_gqa(model, target.half, statistics or None)
    return moe_from_dense(student, target.config, experts) if experts else student


def numbers(said: str, name: str) -> list[int]:
    """64,128 -> [64, 128]"""
    try:
        return [int(number) for number in said.split(",") if number.strip()]
    except ValueError:
        raise ValueError(f"--{name} {said} is no list of whole numbers; write 64,128") from None
