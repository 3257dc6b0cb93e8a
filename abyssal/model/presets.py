"""Published shapes, ready-made: each function returns the ModelConfig that its model's own config.json describes.

`abyssal presets` lists them with their sizes, `abyssal import --check` recognises them. Fields that are no shape are
config.json's too: initializer_range is its 0.02, while V3 and V2 were started with 0.006 (V3 section 4.2), which is
what ModelConfig has where nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from abyssal.model.config import ModelConfig, RopeScaling

# DeepSeek-V2 and V3 alike: 40 times the 4,096 tokens of pretraining
YARN = RopeScaling(kind="yarn", factor=40.0, original_max_position_embeddings=4096)
LLAMA_31 = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=8192)


def deepseek_moe_16b() -> ModelConfig:
    """DeepSeekMoE: multi-head attention, experts chosen greedily by softmax."""
    return ModelConfig(
        vocab_size=102400,
        hidden_size=2048,
        num_hidden_layers=28,
        num_attention_heads=16,
        intermediate_size=10944,
        attention="gqa",
        num_key_value_heads=16,
        head_dim=128,
        max_position_embeddings=4096,
        initializer_range=0.02,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=False,
    )


def v2_lite() -> ModelConfig:
    """No query latent, one group of experts."""
    return ModelConfig(
        vocab_size=102400,
        hidden_size=2048,
        num_hidden_layers=27,
        num_attention_heads=16,
        intermediate_size=10944,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=163840,
        rope_scaling=replace(YARN, mscale=0.707, mscale_all_dim=0.707),
        initializer_range=0.02,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=False,
    )


def v2() -> ModelConfig:
    """mscale is 0.707: the paper's sqrt(t) = 0.0707 ln s + 1. V2.5 and Coder-V2 have 1 there and are else the same."""
    return replace(
        v2_lite(),
        hidden_size=5120,
        num_hidden_layers=60,
        num_attention_heads=128,
        intermediate_size=12288,
        q_lora_rank=1536,
        n_routed_experts=160,
        moe_intermediate_size=1536,
        n_group=8,
        topk_group=3,
        topk_method="group_limited_greedy",
        routed_scaling_factor=16.0,
    )


def v3() -> ModelConfig:
    """DeepSeek-V3, V3-0324, V3.1 and R1: one shape."""
    return ModelConfig(
        vocab_size=129280,
        hidden_size=7168,
        num_hidden_layers=61,
        num_attention_heads=128,
        intermediate_size=18432,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=163840,
        rope_scaling=YARN,
        initializer_range=0.02,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        first_k_dense_replace=3,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
    )


def moonlight() -> ModelConfig:
    """Moonshot's Moonlight-16B-A3B: V3's routing in V2-Lite's widths, trained with Muon."""
    return replace(
        v2_lite(),
        vocab_size=163840,
        intermediate_size=11264,
        max_position_embeddings=8192,
        rope_theta=50000.0,
        rope_scaling=None,
        rms_norm_eps=1e-5,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        norm_topk_prob=True,
        routed_scaling_factor=2.446,
    )


def _dense(
    *, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, theta: float, eps: float
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=ffn,
        attention="gqa",
        feed_forward="dense",
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=131072,
        rope_theta=theta,
        rms_norm_eps=eps,
        initializer_range=0.02,
    )


def r1_distill_qwen_1_5b() -> ModelConfig:
    config = _dense(layers=28, hidden=1536, heads=12, kv_heads=2, ffn=8960, vocab=151936, theta=1e4, eps=1e-6)
    return replace(config, qkv_bias=True)


def r1_distill_qwen_7b() -> ModelConfig:
    config = _dense(layers=28, hidden=3584, heads=28, kv_heads=4, ffn=18944, vocab=152064, theta=1e4, eps=1e-6)
    return replace(config, qkv_bias=True)


def r1_distill_qwen_14b() -> ModelConfig:
    config = _dense(layers=48, hidden=5120, heads=40, kv_heads=8, ffn=13824, vocab=152064, theta=1e6, eps=1e-5)
    return replace(config, qkv_bias=True)


def r1_distill_qwen_32b() -> ModelConfig:
    return replace(r1_distill_qwen_14b(), num_hidden_layers=64, intermediate_size=27648)


def r1_distill_llama_8b() -> ModelConfig:
    config = _dense(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256, theta=5e5, eps=1e-5)
    return replace(config, rope_scaling=LLAMA_31)


def r1_distill_llama_70b() -> ModelConfig:
    config = _dense(layers=80, hidden=8192, heads=64, kv_heads=8, ffn=28672, vocab=128256, theta=5e5, eps=1e-5)
    return replace(config, rope_scaling=LLAMA_31)


def smollm2_135m() -> ModelConfig:
    config = _dense(layers=30, hidden=576, heads=9, kv_heads=3, ffn=1536, vocab=49152, theta=1e5, eps=1e-5)
    return replace(config, max_position_embeddings=8192, tie_word_embeddings=True)


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "deepseek_moe_16b": deepseek_moe_16b,
    "v2_lite": v2_lite,
    "v2": v2,
    "v3": v3,
    "r1": v3,
    "moonlight": moonlight,
    "r1_distill_qwen_1_5b": r1_distill_qwen_1_5b,
    "r1_distill_qwen_7b": r1_distill_qwen_7b,
    "r1_distill_qwen_14b": r1_distill_qwen_14b,
    "r1_distill_qwen_32b": r1_distill_qwen_32b,
    "r1_distill_llama_8b": r1_distill_llama_8b,
    "r1_distill_llama_70b": r1_distill_llama_70b,
    "smollm2_135m": smollm2_135m,
}


def shaped_like(config: ModelConfig) -> list[str]:
    """Names of the presets that it has the shape of, whether or not its MTP layers are there."""

    def freed(preset: ModelConfig) -> ModelConfig:
        return replace(
            preset,
            initializer_range=config.initializer_range,
            num_nextn_predict_layers=config.num_nextn_predict_layers,
        )

    return [name for name, preset in PRESETS.items() if freed(preset()) == config]
