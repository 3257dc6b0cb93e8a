"""What the entries of a cached block depend on besides its tokens, as one hash.

It covers every byte of the weights that are computed with, the config, the way of computing (type, plain or invariant,
torch's version, the processor), the tokenizer and the layout of a block. A block kept under another fingerprint may
have other bits, or mean something else, and is never looked at.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.model.config import ModelConfig

LAYOUT = 1  # of a block's bytes, see `block_bytes.py`; another number, and no older block is found
ON_DEVICE = 1 << 26  # weights that come from a GPU at a time
CPU_FACTS = ("vendor_id", "cpu family", "model", "model name", "stepping")


def facts(
    config: ModelConfig, stores: list[Tensor], *, block_size: int, numerics: str, tokenizer: str
) -> dict[str, Any]:
    """All but the weights. `stores` are the tensors that blocks lie in, `numerics` names the way of computing."""
    device = stores[0].device
    return {
        "layout": [LAYOUT, block_size, *(f"{store.dtype} {tuple(store.shape[1:])}" for store in stores)],
        "config": asdict(config),
        "numerics": numerics,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu(),
        "tokenizer": tokenizer,
    }


def cpu(info: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Which kernels torch and MKL choose depends on these."""
    try:
        lines = info.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0].splitlines()
        named = sorted({line for line in lines if line.partition("\t")[0].partition(":")[0].strip() in CPU_FACTS})
    except OSError:  # no Linux
        named = [platform.processor()]
    return [platform.machine(), torch.backends.cpu.get_cpu_capability(), *named]


def weights_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Everything a model computes with; what it uses twice only once."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return sorted((name, tensor.detach()) for name, tensor in named)


def fingerprint(
    facts: dict[str, Any], weights: Iterable[tuple[str, Tensor]], *, is_wanted: Callable[[], bool] = lambda: True
) -> str | None:
    """64 hex digits; None once it is no longer wanted. Takes a second for each GB or so, without Python's lock."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in weights:
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for piece in tensor.contiguous().flatten().view(torch.uint8).split(ON_DEVICE):
            if not is_wanted():
                return None
            digest.update(memoryview(piece.cpu().numpy()))
    return digest.hexdigest()
