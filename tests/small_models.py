"""Models small enough to run hundreds of times in a test, one for each shape the engine must serve."""

from __future__ import annotations

import torch

from abyssal.model.config import ModelConfig
from abyssal.model.transformer import Transformer

N_VOCAB = 61
# std 0.15 at width 32 spreads the logits: with the pretraining init all tokens would be nearly equally likely
SHARED = {"vocab_size": N_VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
          "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.15}
MLA = {"attention": "mla", "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MOE = {"feed_forward": "moe", "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
       "moe_intermediate_size": 16, "first_k_dense_replace": 1}
GQA = {"attention": "gqa", "num_key_value_heads": 2, "head_dim": 8, "qkv_bias": True}
KINDS = {
    "mla_moe": SHARED | MLA | MOE,
    "mla_moe_query_latent": SHARED | MLA | MOE | {"q_lora_rank": 24, "num_nextn_predict_layers": 1},
    "mla_dense": SHARED | MLA | {"feed_forward": "dense"},
    "gqa_dense": SHARED | GQA | {"feed_forward": "dense", "tie_word_embeddings": True},
    "gqa_dense_norms": SHARED | GQA | {"feed_forward": "dense", "qkv_bias": False, "qk_norm": True, "head_dim": 12},
}


def small_model(kind: str = "mla_moe", *, seed: int = 0, dtype: torch.dtype = torch.float32,
                **changes: object) -> Transformer:
    config = ModelConfig(**(KINDS[kind] | changes))
    return Transformer(config, dtype=dtype).init_weights(torch.Generator().manual_seed(seed))


def random_prompts(lengths: list[int], *, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, N_VOCAB, (n,), generator=generator).tolist() for n in lengths]


def thinking_model(kind: str = "mla_moe", *, opens_behind: int, think: int, never: list[int],
                   **changes: object) -> Transformer:
    """A model that opens its thinking behind one id, for that lights a feature that it alone has, and never says some
    ids: the marks that would end its thinking, say."""
    model = small_model(kind, **changes)
    with torch.no_grad():
        model.embed_tokens.weight[:, 1] = 0.0
        model.embed_tokens.weight[opens_behind, 1] = 20.0
        model.lm_head.weight[:, 1] = 0.0
        model.lm_head.weight[think, 1] = 3.0
        model.embed_tokens.weight[:, 2] = 5.0  # a feature of every id
        model.lm_head.weight[:, 2] = 0.0
        model.lm_head.weight[never, 2] = -20.0
    return model
