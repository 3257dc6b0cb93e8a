"""A small V3-shaped checkpoint as DeepSeek publishes them: FP8 codes, a scale for each block, made in plain loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from abyssal.checkpoint.fp8_blocks import BAND
from abyssal.checkpoint.save import save_checkpoint
from abyssal.model.config import ModelConfig
from abyssal.model.transformer import Transformer

# rows and columns that end in the middle of a block, as V3's kv_a_proj does: 576 = 4.5 x 128; and more rows than a band
CONFIG = ModelConfig(
    vocab_size=64, hidden_size=200, num_hidden_layers=2, num_attention_heads=2, intermediate_size=BAND + 130,
    kv_lora_rank=144, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, q_lora_rank=24, n_routed_experts=4,
    n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=136, first_k_dense_replace=1,
    max_position_embeddings=64, num_nextn_predict_layers=1,
)
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def split(weight_OI: torch.Tensor, *, powers_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of one matrix, block by block in plain loops."""
    rows, columns = weight_OI.shape
    codes, scales = torch.empty(rows, columns), torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            where = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale = weight_OI[where].abs().max() / 448
            scales[i, j] = scale.log2().ceil().exp2() if powers_of_two else scale
            codes[where] = weight_OI[where] / scales[i, j]
    return codes.to(torch.float8_e4m3fn), scales.to(torch.float8_e8m0fnu) if powers_of_two else scales


def fp8_checkpoint(path: Path, *, powers_of_two: bool = False) -> dict[str, torch.Tensor]:
    """A V3-shaped one as DeepSeek publishes it; returns what is in its file."""
    save_checkpoint(path, Transformer(CONFIG).init_weights(torch.Generator().manual_seed(0)), None)
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name and "eh_proj" not in name]:
        codes, scales = split(tensors[name].float(), powers_of_two=powers_of_two)
        tensors |= {name: codes, f"{name}_scale_inv": scales}
    save_file(tensors, path / "model.safetensors")
    extra = {"scale_fmt": "ue8m0"} if powers_of_two else {}
    change_config(path, quantization_config=QUANTIZATION | extra)
    return tensors


def change_config(path: Path, **changes: Any) -> None:
    hf = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(hf | changes))
