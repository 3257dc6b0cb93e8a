"""What this project's own training keeps in memory on one device: autograd's tensors, casts, the optimizer's scratch.

Counted from the code, module by module; a test lets the code run and counts what autograd saved. Owns no times and no
layouts: parallel training keeps less, as `operation.py` counts it.
Letters: N tokens, D width, H heads, Q and V head widths, C latent, R rotated part, F inner width, P expert rows, K
chosen, E experts.
"""

from __future__ import annotations

from collections import defaultdict

from abyssal.model.config import ModelConfig
from abyssal.plan.layout import NUMBER_BYTES
from abyssal.plan.machine_file import Precision
from abyssal.plan.parameters import Weight, weights_of_layer

NOT_MUON = ("embed_tokens", "lm_head", "gate.weight")  # as in stages/state.py
SHORT = 512 * 512  # query-key pairs up to which attention is written out on a CPU, as in model/attention.py
LOGITS_AT_ONCE = 2  # beside what the loss keeps: its own gradient and the logits'
MUON_AT_ONCE = (
    7  # copies of a stack of matrices in Newton-Schulz: momentum's, stacked, scaled, product, result, in FP32
)


def layer_kept_bytes(
    config: ModelConfig, layer: int, *, n_rows: int, row_len: int, precision: Precision, on_cpu: bool
) -> float:
    """Of one block, from its forward to its backward."""
    n, wide, d = n_rows * row_len, NUMBER_BYTES[precision], config.hidden_size
    attention = _mla if config.attention == "mla" else _gqa
    kept = 2 * _norm(n, d, wide) + attention(config, n_rows, row_len, wide, on_cpu)
    if not config.is_moe(layer):
        return kept + 4 * wide * n * config.intermediate_size + _casts(config, layer, wide)
    width, k, n_experts = config.moe_intermediate_size, config.num_experts_per_tok, config.n_routed_experts
    rows = expert_rows(config, n, on_cpu=on_cpu, wide=wide)
    kept += wide * rows * (d + 4 * width)  # what experts read, gate and up, silu(gate), their product
    kept += wide * n * k * d  # their results, for the gradient of the router's weights
    kept += 4 * n * (n_experts + 4 * k) + 4 * rows + (0 if wide == 4 else 4 * n * d)  # scores, choices, FP32 input
    kept += 4 * wide * n * config.n_shared_experts * width
    return kept + _casts(config, layer, wide)


def head_kept_bytes(config: ModelConfig, *, n_tokens: int, precision: Precision) -> float:
    """Of final norm, head and loss: the logarithms of all probabilities in FP32."""
    wide = NUMBER_BYTES[precision]
    cast = 0.0 if wide == 4 else wide * config.vocab_size * config.hidden_size
    chosen = wide * n_tokens * config.hidden_size  # the rows that have a target
    return _norm(n_tokens, config.hidden_size, wide) + chosen + 4.0 * n_tokens * config.vocab_size + cast


def mtp_kept_bytes(config: ModelConfig, *, n_rows: int, row_len: int, precision: Precision, on_cpu: bool) -> float:
    """Of one MTP module: two norms, the joined pair, its block, head and loss."""
    n, wide, d = n_rows * row_len, NUMBER_BYTES[precision], config.hidden_size
    block = layer_kept_bytes(
        config, config.num_hidden_layers, n_rows=n_rows, row_len=row_len, precision=precision, on_cpu=on_cpu
    )
    joined = 2 * _norm(n, d, wide) + (0.0 if wide == 4 else wide * 2 * d * d)
    return joined + block + head_kept_bytes(config, n_tokens=n, precision=precision)


def head_scratch_bytes(config: ModelConfig, *, n_tokens: int) -> float:
    """While the loss goes backward, beside what it kept."""
    return 4.0 * LOGITS_AT_ONCE * n_tokens * config.vocab_size


def optimizer_state_numbers(tensors: list[Weight], optimizer: str) -> int:
    """Muon keeps a momentum for each matrix inside blocks; AdamW two moments for everything else, or for all."""
    trained = [w for w in tensors if w.is_trained]
    if optimizer != "muon":
        return 2 * sum(w.n for w in trained)
    return sum(w.n if is_muon(w) else 2 * w.n for w in trained)


def optimizer_scratch_bytes(tensors: list[Weight], optimizer: str) -> float:
    """Muon stacks all matrices of one shape: several copies of the largest stack, and products of the smaller side."""
    if optimizer != "muon":
        return 0.0
    stacks: dict[tuple[int, ...], float] = defaultdict(float)
    for weight in tensors:
        if is_muon(weight):
            rows, columns = weight.shape[-2:]
            gram = min(rows, columns) ** 2 / (rows * columns)
            stacks[rows, columns] += 4.0 * weight.n * (MUON_AT_ONCE + 2 * gram)
    return max(stacks.values(), default=0.0)


def is_muon(weight: Weight) -> bool:
    """As stages/state.py shares parameters out."""
    return weight.is_trained and len(weight.shape) >= 2 and not any(part in weight.name for part in NOT_MUON)


def expert_rows(config: ModelConfig, n_tokens: int, *, on_cpu: bool, wide: float) -> float:
    """Rows of all experts together. On a CPU each expert's are filled up to a multiple (model/moe.py), so that half of
    one is lost on average."""
    assigned = n_tokens * config.num_experts_per_tok
    if not on_cpu:
        return assigned
    mean = assigned // config.n_routed_experts
    power = 1 << (mean // 16).bit_length() >> 1
    multiple = min(max(power, 8 if wide == 4 else 1), 64)
    return assigned + config.n_routed_experts * (multiple - 1) / 2


def _norm(n: int, width: int, wide: float) -> float:
    """Its input in FP32, the same scaled, in FP32, and its result, which a product keeps as its input."""
    return (4 + 4 + wide) * n * width + 4 * n


def _mla(config: ModelConfig, n_rows: int, row_len: int, wide: float, on_cpu: bool) -> float:
    n, heads, latent = n_rows * row_len, config.num_attention_heads, config.kv_lora_rank
    query, value = config.qk_head_dim, config.v_head_dim
    entry = latent + config.qk_rope_head_dim
    kept = 0.0
    if config.q_lora_rank is not None:
        kept += _norm(n, config.q_lora_rank, wide)
    if config.latent_norm:  # its input is part of what keys' and values' down-projection gave, its result is joined
        kept += 4 * n * latent + (4 if wide == 4 else 4 + wide) * n * entry
    in_float64 = on_cpu and wide == 4
    kept += (8 if in_float64 else wide) * n * entry  # latent and rotated key: what the up-projection reads
    if in_float64:
        kept += 8.0 * heads * (config.qk_nope_head_dim + value) * latent  # the up-projection's weights, cast
    return kept + _core(n_rows, row_len, heads, heads, query, value, wide, on_cpu) + wide * n * heads * value


def _gqa(config: ModelConfig, n_rows: int, row_len: int, wide: float, on_cpu: bool) -> float:
    n, heads, groups, width = (
        n_rows * row_len, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
    )  # fmt: skip
    norms = (8 * n * (heads + groups) * width) if config.qk_norm else 0.0
    return norms + _core(n_rows, row_len, heads, groups, width, width, wide, on_cpu) + wide * n * heads * width


def _core(
    n_rows: int, row_len: int, heads: int, groups: int, query: int, value: int, wide: float, on_cpu: bool
) -> float:
    """Queries, keys and values head by head; written out also all weights, fused the result, values as wide as keys."""
    n = n_rows * row_len
    if on_cpu and row_len * row_len <= SHORT:
        return wide * n * (heads * query + groups * (query + value) + heads * row_len)
    core = 8 if on_cpu and wide == 4 else wide
    padded = max(query, value)
    return core * n * (heads * query + groups * (query + padded) + heads * padded) + 4 * n * heads


def _casts(config: ModelConfig, layer: int, wide: float) -> float:
    """Products in BF16 keep their weights as cast. (model/linear.py)"""
    if wide == 4:
        return 0.0
    return wide * sum(w.n for w in weights_of_layer(config, layer) if len(w.shape) >= 2 and w.part != "router")
