"""The `quantization_config` of a config.json: which weights in few bits a checkpoint holds. Owns no tensors."""

from __future__ import annotations

from collections.abc import Mapping

from abyssal.checkpoint.compressed_tensors import METHOD, read_packing
from abyssal.checkpoint.strict_json import shown
from abyssal.kernels.quantize import BLOCK, QuantFormat

# field -> what is read; the first is what DeepSeek writes
FP8 = {
    "fmt": ("e4m3", None),
    "weight_block_size": ([BLOCK, BLOCK],),
    "activation_scheme": ("dynamic", None),
    "scale_fmt": ("ue8m0", "float", None),
    "expert_dtype": ("fp8", None),
}


def read_quantization(hf: Mapping[str, object]) -> QuantFormat | None:
    """What config.json says, None for plain numbers, or a ValueError naming the field that asks for something else."""
    given = hf.get("quantization_config")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ValueError(f"config.json: quantization_config={shown(given)} is no object; copy it again")
    if given.get("quant_method") == METHOD:
        return read_packing(given)
    for name, known in {"quant_method": ("fp8",), **FP8}.items():
        if given.get(name) not in known:
            raise ValueError(
                f"config.json: quantization_config has {name}={shown(given.get(name))}, which is not supported, only "
                f"{known[0]!r} is; convert the weights to BF16 first"
            )
    return "fp8"
