"""What the benchmarks share: three V3-shaped models, the same weights in transformers, paired timing, results on disk.

Owns no measurement. Each benchmark times ours and theirs alternately (A B A B ...) in one process, so that whatever
else the machine does falls on both; the figure that counts is the median of the pairs' ratios.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from abyssal.checkpoint.convert import config_to_hf
from abyssal.model.config import ModelConfig
from abyssal.model.transformer import Transformer, count_parameters

Size = Literal["3M", "11M", "63M"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
RESULTS = Path(__file__).parent / "results"


def model_config(size: Size) -> ModelConfig:
    """DeepSeek-V3 in small: MLA with a query latent, one dense layer, then shared and fine-grained routed experts."""
    widths: dict[str, Any] = {
        "3M": dict(
            vocab_size=2048,
            hidden_size=160,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=448,
            q_lora_rank=96,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            v_head_dim=32,
            n_routed_experts=16,
            moe_intermediate_size=80,
        ),
        "11M": dict(
            vocab_size=4096,
            hidden_size=256,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=704,
            q_lora_rank=128,
            kv_lora_rank=128,
            qk_nope_head_dim=48,
            v_head_dim=48,
            n_routed_experts=16,
            moe_intermediate_size=112,
        ),
        "63M": dict(
            vocab_size=9216,
            hidden_size=512,
            num_hidden_layers=8,
            num_attention_heads=8,
            intermediate_size=1408,
            q_lora_rank=256,
            kv_lora_rank=192,
            qk_nope_head_dim=48,
            v_head_dim=48,
            n_routed_experts=32,
            moe_intermediate_size=128,
        ),
    }[size]
    return ModelConfig(
        attention="mla",
        feed_forward="moe",
        max_position_embeddings=1024,
        qk_rope_head_dim=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        initializer_range=0.02,
        **widths,
    )


def make_ours(config: ModelConfig, *, dtype: torch.dtype, seed: int = 0) -> Transformer:
    """Random weights, rounded to BF16 so that both sides hold exactly the same numbers whatever dtype they keep."""
    model = Transformer(config, dtype=dtype).init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def make_theirs(ours: Transformer, *, dtype: torch.dtype, experts: str, attention: str) -> DeepseekV3ForCausalLM:
    """transformers' model with the same weights, kept in `dtype`. Raises when a tensor is missing or left over."""
    spelling = config_to_hf(ours.config) | {"experts_implementation": experts, "attn_implementation": attention}
    config = DeepseekV3Config(**spelling)
    model = DeepseekV3ForCausalLM(config).to(dtype)
    names = {name: name if name.startswith("lm_head.") else f"model.{name}" for name in ours.state_dict()}
    model.load_state_dict({names[name]: tensor for name, tensor in ours.state_dict().items()}, strict=True)
    return model


def logits_differ_by(ours: Transformer, theirs: DeepseekV3ForCausalLM, ids_BT: torch.Tensor) -> float:
    """Largest difference of logits, as a share of the largest logit: the two sides really compute the same thing."""
    with torch.no_grad():
        a, b = ours.logits(ours.hidden(ids_BT)), theirs(ids_BT).logits.float()
    return float((a - b).abs().max() / b.abs().max())


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Tokens per second of both, pair by pair."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))

    @property
    def spread(self) -> tuple[float, float]:
        ratios = [a / b for a, b in zip(self.ours, self.theirs, strict=True)]
        return min(ratios), max(ratios)


def time_pairs(ours: Callable[[], object], theirs: Callable[[], object], *, n_pairs: int, n_tokens: int) -> Paired:
    """One untimed run of each, then A B A B ..."""
    ours()
    theirs()
    a, b = [], []
    for _ in range(n_pairs):
        a.append(n_tokens / seconds(ours))
        b.append(n_tokens / seconds(theirs))
    return Paired(ours=a, theirs=b)


def fastest(candidates: dict[str, Callable[[], object]], *, repeats: int = 2, who: str = "transformers") -> str:
    """The name of the quickest of `who`'s settings; each runs once to warm up. One that raises is out, and says so."""
    times = {}
    for name, work in candidates.items():
        try:
            work()
            times[name] = min(seconds(work) for _ in range(repeats))
        except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
            print(f"  {who} {name}: not possible here ({str(error).splitlines()[0]})")
    print(f"  {who}: " + ", ".join(f"{name} {1000 * t:.0f} ms" for name, t in times.items()))
    return min(times, key=times.__getitem__)


def machine() -> dict[str, Any]:
    """Where a figure was measured, for the line in results/."""
    model_name = flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line]
        fields = {name.strip(): value.strip() for name, value in lines}
        model_name = fields.get("model name", "")
        flags = " ".join(f for f in fields.get("flags", "").split() if f.startswith(("avx", "amx")))
    return {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "cpu": model_name,
        "flags": flags,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def append_result(name: str, result: dict[str, Any]) -> None:
    """One JSON line to results/NAME.jsonl."""
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({**machine(), **result}) + "\n")


def parameters(config: ModelConfig) -> tuple[int, int]:
    """(all, active) without making the weights."""
    with torch.device("meta"):
        return count_parameters(Transformer(config))
