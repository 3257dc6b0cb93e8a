"""Published config.json files, field by field, in the spelling they were published in."""

from __future__ import annotations

from typing import Any

NOISE: dict[str, Any] = dict(
    attention_bias=False, attention_dropout=0.0, hidden_act="silu", initializer_range=0.02, pretraining_tp=1,
    tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True,
)
MLA: dict[str, Any] = NOISE | dict(
    aux_loss_alpha=0.001, ep_size=1, kv_lora_rank=512, max_position_embeddings=163840, moe_layer_freq=1,
    qk_nope_head_dim=128, qk_rope_head_dim=64, rms_norm_eps=1e-6, rope_theta=10000, seq_aux=True, v_head_dim=128,
)
V2: dict[str, Any] = MLA | dict(
    architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", bos_token_id=100000, eos_token_id=100001,
    auto_map={"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, first_k_dense_replace=1, n_shared_experts=2,
    norm_topk_prob=False, num_experts_per_tok=6, scoring_func="softmax", vocab_size=102400,
    rope_scaling=dict(beta_fast=32, beta_slow=1, factor=40, mscale=0.707, mscale_all_dim=0.707,
                      original_max_position_embeddings=4096, type="yarn"),
)
QWEN2: dict[str, Any] = dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", attention_dropout=0.0, bos_token_id=151643,
    eos_token_id=151643, hidden_act="silu", initializer_range=0.02, max_position_embeddings=131072,
    sliding_window=4096, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True, use_mrope=False,
    use_sliding_window=False, vocab_size=152064,
)
LLAMA_31: dict[str, Any] = NOISE | dict(
    architectures=["LlamaForCausalLM"], model_type="llama", bos_token_id=128000, eos_token_id=128001, mlp_bias=False,
    max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0, vocab_size=128256,
    rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_type="llama3",
                      original_max_position_embeddings=8192),
)
OFFICIAL: dict[str, dict[str, Any]] = {
    "deepseek_moe_16b": NOISE | dict(
        architectures=["DeepseekForCausalLM"], model_type="deepseek", bos_token_id=100000, eos_token_id=100001,
        aux_loss_alpha=0.001, first_k_dense_replace=1, hidden_size=2048, intermediate_size=10944,
        max_position_embeddings=4096, moe_intermediate_size=1408, moe_layer_freq=1, n_routed_experts=64,
        n_shared_experts=2, norm_topk_prob=False, num_attention_heads=16, num_experts_per_tok=6,
        num_hidden_layers=28, num_key_value_heads=16, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=10000,
        scoring_func="softmax", seq_aux=True, vocab_size=102400,
    ),
    "v2_lite": V2 | dict(
        hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, n_group=1, n_routed_experts=64,
        num_attention_heads=16, num_hidden_layers=27, num_key_value_heads=16, q_lora_rank=None,
        routed_scaling_factor=1.0, topk_group=1, topk_method="greedy",
    ),
    "v2": V2 | dict(
        hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536, n_group=8, n_routed_experts=160,
        num_attention_heads=128, num_hidden_layers=60, num_key_value_heads=128, q_lora_rank=1536,
        routed_scaling_factor=16.0, topk_group=3, topk_method="group_limited_greedy",
    ),
    "v3": MLA | dict(
        architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", bos_token_id=0, eos_token_id=1,
        first_k_dense_replace=3, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, n_group=8,
        n_routed_experts=256, n_shared_experts=1, norm_topk_prob=True, num_attention_heads=128,
        num_experts_per_tok=8, num_hidden_layers=61, num_key_value_heads=128, num_nextn_predict_layers=1,
        q_lora_rank=1536, routed_scaling_factor=2.5, scoring_func="sigmoid", topk_group=4, topk_method="noaux_tc",
        vocab_size=129280,
        rope_scaling=dict(beta_fast=32, beta_slow=1, factor=40, mscale=1.0, mscale_all_dim=1.0,
                          original_max_position_embeddings=4096, type="yarn"),
    ),
    "moonlight": MLA | dict(
        architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", bos_token_id=163584, eos_token_id=163586,
        first_k_dense_replace=1, hidden_size=2048, intermediate_size=11264, max_position_embeddings=8192,
        moe_intermediate_size=1408, n_group=1, n_routed_experts=64, n_shared_experts=2, norm_topk_prob=True,
        num_attention_heads=16, num_experts_per_tok=6, num_hidden_layers=27, num_key_value_heads=16,
        num_nextn_predict_layers=0, q_lora_rank=None, rms_norm_eps=1e-5, rope_theta=50000.0,
        routed_scaling_factor=2.446, scoring_func="sigmoid", topk_group=1, topk_method="noaux_tc", vocab_size=163840,
    ),
    "r1_distill_qwen_1_5b": QWEN2 | dict(
        hidden_size=1536, intermediate_size=8960, max_window_layers=21, num_attention_heads=12, num_hidden_layers=28,
        num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=10000, vocab_size=151936,
    ),
    "r1_distill_qwen_7b": QWEN2 | dict(
        hidden_size=3584, intermediate_size=18944, max_window_layers=28, num_attention_heads=28, num_hidden_layers=28,
        num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=10000,
    ),
    "r1_distill_qwen_14b": QWEN2 | dict(
        hidden_size=5120, intermediate_size=13824, max_window_layers=48, num_attention_heads=40, num_hidden_layers=48,
        num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=131072,
    ),
    "r1_distill_qwen_32b": QWEN2 | dict(
        hidden_size=5120, intermediate_size=27648, max_window_layers=64, num_attention_heads=40, num_hidden_layers=64,
        num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=131072,
    ),
    "r1_distill_llama_8b": LLAMA_31 | dict(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8,
    ),
    "r1_distill_llama_70b": LLAMA_31 | dict(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=80, num_key_value_heads=8,
        head_dim=128,
    ),
    "smollm2_135m": NOISE | dict(
        architectures=["LlamaForCausalLM"], model_type="llama", bos_token_id=1, eos_token_id=2, pad_token_id=2,
        hidden_size=576, intermediate_size=1536, max_position_embeddings=8192, mlp_bias=False, num_attention_heads=9,
        num_hidden_layers=30, num_key_value_heads=3, rms_norm_eps=1e-5, rope_interleaved=False, rope_scaling=None,
        rope_theta=100000, tie_word_embeddings=True, vocab_size=49152,
    ),
}  # fmt: skip
R1_0528_QWEN3_8B: dict[str, Any] = dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", attention_bias=False, attention_dropout=0.0,
    bos_token_id=151643, eos_token_id=151645, head_dim=128, hidden_act="silu", hidden_size=4096,
    initializer_range=0.02, intermediate_size=12288, max_position_embeddings=131072, max_window_layers=36,
    num_attention_heads=32, num_hidden_layers=36, num_key_value_heads=8, rms_norm_eps=1e-6, rope_theta=1000000,
    rope_scaling=dict(attn_factor=0.8782488562869419, factor=4.0, original_max_position_embeddings=32768,
                      rope_type="yarn"),
    sliding_window=None, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True, use_sliding_window=False,
    vocab_size=151936,
)  # fmt: skip
MISTRAL_7B_V03: dict[str, Any] = dict(
    architectures=["MistralForCausalLM"], model_type="mistral", attention_dropout=0.0, bos_token_id=1, eos_token_id=2,
    hidden_act="silu", hidden_size=4096, initializer_range=0.02, intermediate_size=14336,
    max_position_embeddings=32768, num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8,
    rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False, torch_dtype="bfloat16",
    use_cache=True, vocab_size=32768,
)  # fmt: skip
