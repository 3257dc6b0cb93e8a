"""Writing a checkpoint of any format as a Hugging Face directory in BF16, FP8, int8 or int4, tensor by tensor.

FP8 is DeepSeek's own layout, int8 and int4 are compressed_tensors.py's. What is stored in the wanted format already is
copied code by code. No more than one shard is in memory.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from abyssal.checkpoint.atomic import refuse_other_folders, replace_directory
from abyssal.checkpoint.compressed_tensors import pack, packed_bytes, packing_config
from abyssal.checkpoint.convert import config_to_hf
from abyssal.checkpoint.load import check_tensors, meta_model, read_rounded
from abyssal.checkpoint.shards import OnBytes, write_json, write_shards
from abyssal.checkpoint.source import Source
from abyssal.checkpoint.strict_json import one_line, read_object
from abyssal.checkpoint.tensor_names import (
    DERIVED,
    IN_FEW_BITS,
    common_group,
    keeps_fp32,
    official_views,
    shared_copies,
)
from abyssal.kernels.quantize import BLOCK, QuantFormat, ScaleFormat, scale_shape

ExportFormat = Literal["bf16", "fp8", "int8", "int4"]
# what a tokenizer and its defaults may consist of; copied as they are where they lie beside the weights
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "generation_config.json", "thinking.json",
)  # fmt: skip


@dataclass(frozen=True)
class Exported:
    n_bytes: int  # of weights
    n_rounded: int  # matrices in few bits
    kept: list[str]  # projections that stay BF16, because no group of columns divides them


def export_hf(
    source: Source,
    directory: Path,
    *,
    to: ExportFormat,
    scale_format: ScaleFormat | None = None,
    max_shard_bytes: int = 5_000_000_000,
    on_bytes: OnBytes | None = None,
) -> Exported:
    """The old `directory`, if there is one, stays until the new one is whole. `scale_format`, FP8's, is the source's or
    else FP32.
    """
    _check_target(source, directory)
    wanted = official_views(meta_model(source.config, len(source.tensors), path=source.path))
    check_tensors(source, {name: tuple(view.shape) for name, view in wanted.items()})
    plan = _Plan(source, None if to == "bf16" else to, scale_format or _scale_format_of(source))
    try:
        with replace_directory(directory) as new:
            config = config_to_hf(source.config) | _token_ids(source)
            if plan.rounded:
                config["quantization_config"] = plan.quantization_config()
            write_json(new / "config.json", config)
            write_shards(new, plan.sizes, plan.pieces, max_shard_bytes=max_shard_bytes, on_bytes=on_bytes)
            _write_companions(source, new)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {directory}: {one_line(error)}; free some disk space and run again") from error
    return Exported(sum(plan.sizes.values()), len(plan.rounded), plan.kept)


class _Plan:
    """What becomes of each tensor: its name in the new checkpoint -> the source's name, and the bytes it will have."""

    def __init__(self, source: Source, format: QuantFormat | None, scale_format: ScaleFormat) -> None:
        self.source, self.format, self.scale_format = source, format, scale_format
        copies = {copy: main for copy, main in shared_copies(source.config).items() if copy not in source.tensors}
        self.origin = {name: name for name in source.tensors if not DERIVED.search(name)} | copies
        self.group = BLOCK if format is None else common_group(source.tensors, format)
        self.rounded: dict[str, tuple[int, int]] = {}
        self.kept: list[str] = []
        self.sizes = {name: self._size(name) for name in self.origin}

    def _size(self, name: str) -> int:
        shape = self.source.tensors[self.origin[name]].shape
        n_numbers = torch.Size(shape).numel()
        if self.format is None or not IN_FEW_BITS.search(name):
            return n_numbers * (4 if keeps_fp32(name) else 2)
        rows, columns = shape
        if self.format != "fp8" and columns % self.group:
            self.kept.append(name)
            return n_numbers * 2
        self.rounded[name] = (rows, columns)
        if self.format == "fp8":
            return n_numbers + 4 * torch.Size(scale_shape("fp8", (rows, columns), BLOCK)).numel()
        return packed_bytes(self.format, (rows, columns), self.group)

    def pieces(self, name: str) -> dict[str, Tensor]:
        if self.format is None or name not in self.rounded:
            dtype = torch.float32 if keeps_fp32(name) else torch.bfloat16
            return {name: self.source.read(self.origin[name]).to(dtype).contiguous()}
        weight = read_rounded(self.source, name, self.format, group=self.group, scale_format=self.scale_format)
        if self.format == "fp8":
            return {name: weight.codes.contiguous(), f"{name}_scale_inv": weight.scales.float().contiguous()}
        if weight.group != self.group:
            raise ValueError(
                f"{self.source.path} is in {self.format} already, in groups of {weight.group}; copy it, or export bf16"
            )
        return {name + part: tensor.contiguous() for part, tensor in pack(weight).items()}

    def quantization_config(self) -> dict[str, Any]:
        assert self.format is not None
        if self.format != "fp8":
            return packing_config(self.format, self.group, self.kept)
        config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        scales = {"scale_fmt": "ue8m0"} if self.scale_format == "ue8m0" else {}
        return config | {"weight_block_size": [BLOCK, BLOCK]} | scales


def _check_target(source: Source, directory: Path) -> None:
    refuse_other_folders(directory)
    if directory.exists() and source.path.resolve() in (directory.resolve(), *directory.resolve().parents):
        raise ValueError(f"{directory} holds what is to be exported; name another folder")


def _hf_config(source: Source) -> dict[str, Any]:
    """config.json of a source that has one."""
    file = source.path / "config.json"
    return read_object(file) if file.is_file() else {}


def _scale_format_of(source: Source) -> ScaleFormat:
    given = _hf_config(source).get("quantization_config")
    return "ue8m0" if isinstance(given, dict) and given.get("scale_fmt") == "ue8m0" else "fp32"


def _token_ids(source: Source) -> dict[str, Any]:
    """Begin and end as the source's config.json has them, an end may be several; else as its tokenizer has."""
    hf, tokenizer = _hf_config(source), source.tokenizer()
    if hf:
        return {name: hf[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if hf.get(name) is not None}
    return {} if tokenizer is None else {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def _write_companions(source: Source, new: Path) -> None:
    if source.path.is_dir() and (source.path / "tokenizer.json").is_file():
        for name in COMPANIONS:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, new / name)
        return
    tokenizer = source.tokenizer()
    if tokenizer is not None:
        tokenizer.save(new, model_max_length=source.config.max_position_embeddings)
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        write_json(new / "generation_config.json", ids)
