"""GGUF files as llama.cpp's converter lays them out: names from the gguf package's own map, rows shuffled as there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from abyssal.checkpoint.tensor_names import official_views
from abyssal.model.transformer import Transformer

BYTES = sorted(set(range(33, 127)) | set(range(161, 173)) | set(range(174, 256)))  # printable ones, as GPT-2 has them
ALPHABET = [*map(chr, BYTES), *(chr(256 + n) for n in range(256 - len(BYTES)))]


def converted(model: Transformer, arch: str, *, whole_kv_b: bool = False) -> dict[str, NDArray[np.float32]]:
    """GGUF name -> FP32 array, for a model without MTP."""
    config = model.config
    hf = {name: view.detach().numpy() for name, view in official_views(model).items()}
    for layer in range(config.num_hidden_layers):
        mlp, attention = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.self_attn."
        if config.is_moe(layer):
            for part in ("gate_proj", "up_proj", "down_proj"):
                each = [hf.pop(f"{mlp}experts.{e}.{part}.weight") for e in range(config.n_routed_experts)]
                hf[f"{mlp}experts.{part}.weight"] = np.stack(each)
            if f"{mlp}gate.e_score_correction_bias" in hf:
                hf[f"{mlp}gate.e_score_correction.bias"] = hf.pop(f"{mlp}gate.e_score_correction_bias")
        if config.attention == "mla" and not whole_kv_b:
            kv_b = hf.pop(f"{attention}kv_b_proj.weight").reshape(config.num_attention_heads, -1, config.kv_lora_rank)
            n = config.qk_nope_head_dim
            hf[f"{attention}k_b_proj.weight"] = kv_b[:, :n].transpose(0, 2, 1)
            hf[f"{attention}v_b_proj.weight"] = kv_b[:, n:]
        if arch == "llama":
            for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
                for kind in ("weight", "bias"):
                    if (name := f"{attention}{part}_proj.{kind}") in hf:
                        w = hf[name]
                        pairs = w.reshape(heads, 2, len(w) // heads // 2, *w.shape[1:]).swapaxes(1, 2)
                        hf[name] = pairs.reshape(w.shape)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), config.num_hidden_layers)
    out = {names.get_name(name, (".weight", ".bias")): np.ascontiguousarray(array) for name, array in hf.items()}
    assert None not in out
    return out  # type: ignore[return-value]


def described(model: Transformer, arch: str, *, whole_kv_b: bool = False) -> dict[str, Any]:
    """The metadata of such a file, without a tokenizer."""
    c = model.config
    keys: dict[str, Any] = {
        "context_length": c.max_position_embeddings, "embedding_length": c.hidden_size, "block_count":
        c.num_hidden_layers, "feed_forward_length": c.intermediate_size, "attention.head_count": c.num_attention_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "rope.freq_base": c.rope_theta,
    }  # fmt: skip
    if arch != "deepseek2":
        keys |= {"attention.head_count_kv": c.num_key_value_heads, "rope.dimension_count": c.head_dim}
        keys |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
        return {f"{arch}.{key}": value for key, value in keys.items()}
    keys |= {"attention.kv_lora_rank": c.kv_lora_rank, "rope.dimension_count": c.qk_rope_head_dim}
    head = c.qk_nope_head_dim + c.qk_rope_head_dim
    if whole_kv_b:
        keys |= {"attention.head_count_kv": c.num_attention_heads}
        keys |= {"attention.key_length": head, "attention.value_length": c.v_head_dim}
    else:
        keys |= {"attention.head_count_kv": 1, "attention.key_length": c.kv_lora_rank + c.qk_rope_head_dim}
        keys |= {"attention.value_length": c.kv_lora_rank, "attention.key_length_mla": head}
        keys |= {"attention.value_length_mla": c.v_head_dim}
    if c.q_lora_rank:
        keys["attention.q_lora_rank"] = c.q_lora_rank
    if c.feed_forward == "moe":
        keys |= {
            "leading_dense_block_count": c.first_k_dense_replace, "expert_count": c.n_routed_experts,
            "expert_used_count": c.num_experts_per_tok, "expert_shared_count": c.n_shared_experts,
            "expert_feed_forward_length": c.moe_intermediate_size, "expert_weights_scale": c.routed_scaling_factor,
            "expert_weights_norm": c.norm_topk_prob, "expert_gating_func": {"softmax": 1, "sigmoid": 2}[c.scoring_func],
            "expert_group_count": c.n_group, "expert_group_used_count": c.topk_group,
        }  # fmt: skip
    return {f"{arch}.{key}": value for key, value in keys.items()}


def small_vocabulary(*, pre: str = "gpt-2") -> dict[str, Any]:
    """Three control tokens, the 256 bytes, and the merges that lead to "the" and " the"."""
    merges = ["t h", "th e", "Ġ the"]
    tokens = ["<s>", "<|im_start|>", "<|im_end|>", *ALPHABET, "th", "the", "Ġthe"]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3), "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip


def write_file(
    file: Path, arch: str, metadata: dict[str, Any], tensors: dict[str, NDArray[np.float32]], *, kind: Type = Type.F32
) -> Path:
    """Matrices in `kind`, the rest FP32."""
    writer = gguf.GGUFWriter(file, arch)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array}  # fmt: skip
    for key, value in metadata.items():
        add[type(value)](key, value)
    for name, array in tensors.items():
        if array.ndim > 1 and kind != Type.F32:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def randomized(model: Transformer, *, seed: int = 0) -> Transformer:
    """Norms and biases too: a tensor of ones would hide a mix-up."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        tensor.normal_(0.0, 0.3, generator=generator)
    return model
