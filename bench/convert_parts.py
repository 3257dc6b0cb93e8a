"""What each part of the conversion to MLA is worth: python bench/convert_parts.py [--base DIR] [--latent 128]

SmolLM2-135M-Instruct in DeepSeek-V3's shape, nothing healed, with one part left out at a time and with all of them
left out, which is RoRoPE and a PCA of keys and values balanced by their norms (TransMLA). Prints perplexities and
appends them to bench/results/convert_parts.jsonl. One thread, some five minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import tyro
from common import append_result
from foreign_base import smollm2
from rich.console import Console
from torch import Tensor

from abyssal.checkpoint.load import load_checkpoint
from abyssal.commands.convert_shape import ConvertOptions, read_text
from abyssal.evals.perplexity import perplexity
from abyssal.machine import keep_freed_memory
from abyssal.model.gqa import GQA
from abyssal.model.mla import MLA
from abyssal.model.transformer import Transformer
from abyssal.surgery import calibrate, mla_from_gqa
from abyssal.surgery.calibrate import AttentionStatistics, Looks, attention_statistics, layer_inputs
from abyssal.surgery.mla_from_gqa import LOUD, KeyBasis, attentions, v3_config

Statistics = list[AttentionStatistics]
looks, key_basis = calibrate._looks, mla_from_gqa.key_basis


@dataclass(frozen=True, kw_only=True)
class Options:
    base: Path | None = None
    work: Path = Path("out/foreign_base")
    latent: int = 128
    windows: int = 8
    calibration_tokens: int = 4096
    save: bool = True  # append the result to results/convert_parts.jsonl


@torch.no_grad()
def statistics_of(model: Transformer, ids_BT: Tensor) -> Statistics:
    inputs = layer_inputs(model, ids_BT)
    return [attention_statistics(model, a, x.attention_BTD) for a, x in zip(attentions(model), inputs, strict=True)]


def looks_alike(model: Transformer, q_BTHQ: Tensor, k_BTGQ: Tensor) -> Looks:
    """Every token counts the same, however much it is looked at."""
    found = looks(model, q_BTHQ, k_BTGQ)
    return found._replace(weight_BT=torch.ones_like(found.weight_BT))


def without_turn(statistics: Statistics) -> Statistics:
    return [found._replace(turn_HP=torch.ones_like(found.turn_HP)) for found in statistics]


def real_basis(statistics: AttentionStatistics, query_GQQ: Tensor) -> KeyBasis:
    """RoRoPE: heads are mixed by real numbers, both numbers of a pair alike."""
    n_keys = query_GQQ.shape[0] * query_GQQ.shape[1]
    key_KK = statistics.cache_KK.clone()
    pairs_PAPA = key_KK[:n_keys, :n_keys].view(n_keys // 2, 2, n_keys // 2, 2)
    crossed = (pairs_PAPA[:, 1, :, 0] - pairs_PAPA[:, 0, :, 1]) / 2  # what makes the Hermitian moments complex
    pairs_PAPA[:, 1, :, 0] -= crossed
    pairs_PAPA[:, 0, :, 1] += crossed
    return key_basis(statistics._replace(cache_KK=key_KK), query_GQQ)


def balanced(attention: GQA, statistics: AttentionStatistics) -> tuple[Tensor, Tensor]:
    """All directions alike, keys scaled to the norm of the values."""
    groups, width = attention.config.num_key_value_heads, attention.config.head_dim
    keys, values = statistics.cache_KK.diagonal().view(2, -1).sum(1)
    alike_GQQ = torch.eye(width, dtype=torch.float64).expand(groups, -1, -1)
    return alike_GQQ * (values / keys), alike_GQQ


@torch.no_grad()
def without_constant(model: Transformer) -> None:
    """The latent's norm is met by its mean alone."""
    for module in model.modules():
        if isinstance(module, MLA):
            module.kv_a_proj_with_mqa.weight[model.config.kv_lora_rank - 1] = 0
            weight = module.kv_a_layernorm.weight
            weight.fill_(float(weight[0]) / LOUD)


def main(options: Options) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    base = options.base or smollm2(options.work)
    model, tokenizer, config = load_checkpoint(base)
    assert tokenizer is not None
    settings = {"calibration_tokens": options.calibration_tokens, "windows": options.windows}
    asked = ConvertOptions(directory=base, to="mla", **settings)
    text = read_text(asked, tokenizer, longest=config.max_position_embeddings, console=Console(quiet=True))
    target = v3_config(config, latent=options.latent)
    began, found = time.process_time(), {}

    def note(name: str, measured: Transformer) -> None:
        found[name] = round(perplexity(measured, text.held_out_WT).perplexity, 3)
        print(f"{name:36}  {found[name]:14,.3f}", flush=True)

    def measure(name: str, statistics: Statistics, after: Callable[[Transformer], None] | None = None) -> None:
        converted = mla_from_gqa.mla_from_gqa(model, target, statistics)
        if after is not None:
            after(converted)
        note(name, converted)

    note("original", model)
    statistics = statistics_of(model, text.calibration_BT)
    with mock.patch.object(calibrate, "_looks", looks_alike):
        alike = statistics_of(model, text.calibration_BT)
    measure("all parts", statistics)
    measure("no constant in the latent", statistics, without_constant)
    measure("every token counts alike", alike)
    measure("no mean turn", without_turn(statistics))
    with mock.patch.object(mla_from_gqa, "key_basis", real_basis):
        measure("heads mixed by real numbers", statistics)
    with mock.patch.object(mla_from_gqa, "importance", balanced):
        measure("PCA without queries and output", statistics)
    with mock.patch.multiple(mla_from_gqa, key_basis=real_basis, importance=balanced):
        measure("none of these but the constant", without_turn(alike))
        measure("none of these", without_turn(alike), without_constant)
    if options.save:
        result = {"base": base.name, "latent": options.latent, **settings, "perplexity": found}
        append_result("convert_parts", result | {"cpu_s": round(time.process_time() - began)})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
