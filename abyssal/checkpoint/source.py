"""A checkpoint as named tensors, whatever its format: what loading, importing and exporting read from.

Owns the interface and the choice of a reader by what the path is. A reader owns one format: hf_directory.py,
gguf_file.py. Names are the official ones of Hugging Face directories, whatever the format calls them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor

from abyssal.checkpoint.atomic import find_directory
from abyssal.checkpoint.gguf_file import GgufFile
from abyssal.checkpoint.gguf_parts import first_parts
from abyssal.checkpoint.hf_directory import HfDirectory
from abyssal.checkpoint.tensor_info import TensorInfo
from abyssal.kernels.quantize import Quantized
from abyssal.model.config import ModelConfig
from abyssal.tokens.tokenizer import Tokenizer


class Source(Protocol):
    """`tensors` lists every tensor by its official name, read from headers alone; scales of quantised tensors are part
    of these, not tensors of their own."""

    path: Path
    config: ModelConfig
    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> Tensor:
        """Its numbers, in the type they are stored in (quantised ones in BF16 or FP32)."""

    def read_into(self, name: str, out: Tensor) -> None:
        """The same, rounded to the type of `out`, which has the tensor's shape and may be on a device."""

    def read_quantized(self, name: str) -> Quantized | None:
        """The few bits and scales as they are stored, or None for a tensor of plain numbers."""

    def tokenizer(self) -> Tokenizer | None: ...


def open_checkpoint(path: str | Path) -> Source:
    """Opens headers and config.json; reads no weights."""
    file = gguf_at(Path(path))
    return HfDirectory(find_directory(Path(path))) if file is None else GgufFile(file)


def gguf_at(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one in a directory without config.json."""
    if path.suffix == ".gguf" and not path.is_dir():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = first_parts(sorted(path.glob("*.gguf")))
    if len(files) > 1:
        raise ValueError(f"{path} holds {len(files)} GGUF files; name one of them: {files[0]}")
    return files[0] if files else None
