"""The engine beside transformers' `generate`: tokens per second at 1 to 64 requests, and time to the first token.

    python bench/engine.py [--sizes 3M 11M 63M 135M] [--batches 1 4 16 64] [--dtypes float32 bfloat16] [--threads 2]

The same weights, prompts, dtype and threads, greedy answers of fixed length; figures are new tokens per second with the
prompt's time included, and the median ratio of pairs run in turn. Theirs is `generate` in the fastest of its expert
kernels, attention forms and caches, tried first at every batch. 3M to 63M have DeepSeek-V3's shape, 135M SmolLM2's.
Answers are shorter where theirs would take longer than `--seconds`; where --least tokens take three times that, it is
left out and says so.

"MTP, untrained" is the same model with an MTP module of random weights and `speculate="auto"`: what drafting costs
where it cannot pay; what it brings is in bench/speculation.py, on trained checkpoints. "cache hit" has all of the
prompt but the last block in the prefix cache. The share of memory bandwidth is that of one stream: the weights that one
token needs, times tokens per second, over what reading a large tensor reaches on this machine; small models live in the
CPU's cache and may exceed it.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import tyro
from common import (
    DTYPES,
    Size,
    append_result,
    fastest,
    logits_differ_by,
    make_ours,
    make_theirs,
    model_config,
    parameters,
    seconds,
    time_pairs,
)
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from abyssal.checkpoint.convert import config_to_hf
from abyssal.engine.engine import Engine
from abyssal.machine import keep_freed_memory, set_threads
from abyssal.model.config import ModelConfig
from abyssal.model.transformer import Transformer
from abyssal.types import SamplingParams

Sizes = Literal[Size, "135M"]
TRIAL_TOKENS = 6  # of an answer, when their settings are tried
BLOCK = 16


@dataclass(frozen=True, kw_only=True)
class Options:
    sizes: tuple[Sizes, ...] = get_args(Sizes)
    batches: tuple[int, ...] = (1, 4, 16, 64)
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    prompt_len: int = 32
    new_tokens: int = 64
    first_prompt: int = 256  # tokens of the prompt whose first token is waited for, and of those found in the cache
    cached_batches: tuple[int, ...] = (1, 16)  # requests whose prompts the cache has
    pairs: int = 5
    seconds: float = 8.0  # that one run of theirs may take
    least: int = 4  # tokens of an answer
    threads: int = 2
    save: bool = True  # append the results to results/engine.jsonl


def config_of(size: Sizes) -> ModelConfig:
    if size != "135M":
        return model_config(size)
    return ModelConfig(
        attention="gqa",
        feed_forward="dense",
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        intermediate_size=1536,
        tie_word_embeddings=True,
        rope_theta=1e5,
        rms_norm_eps=1e-5,
        max_position_embeddings=1024,
        initializer_range=0.02,
    )


def theirs_of(ours: Transformer, setting: str) -> PreTrainedModel:
    experts, attention = setting.split("+")
    if ours.config.feed_forward == "moe":
        return make_theirs(ours, dtype=ours.dtype, experts=experts, attention=attention)
    model = LlamaForCausalLM(LlamaConfig(**config_to_hf(ours.config) | {"attn_implementation": attention}))
    names = {f"model.{name}": tensor for name, tensor in ours.state_dict().items()}
    missing, left_over = model.load_state_dict(names, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not left_over, (missing, left_over)  # the head is the embedding
    return model.to(ours.dtype)


def with_mtp(ours: Transformer) -> Transformer:
    """The same model, and an MTP module of random weights."""
    config = replace(ours.config, num_nextn_predict_layers=1)
    model = Transformer(config, dtype=ours.dtype).init_weights(torch.Generator().manual_seed(1))
    model.load_state_dict(ours.state_dict(), strict=False)
    return model


def settings_of(config: ModelConfig) -> list[str]:
    experts = ("grouped_mm", "batched_mm", "eager") if config.feed_forward == "moe" else ("-",)
    return [f"{one}+{attention}" for one in experts for attention in ("sdpa", "eager")]


def our_answers(engine: Engine, prompts: list[list[int]], new_tokens: int) -> Callable[[], list[list[int]]]:
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens)
    return lambda: [completion.ids for completion in engine.generate(prompts, params)]


def their_answers(
    model: PreTrainedModel, ids_BT: Tensor, new_tokens: int, *, cache: str
) -> Callable[[], list[list[int]]]:
    model.eval()
    length = ids_BT.shape[1] + new_tokens

    def answers() -> list[list[int]]:
        out = model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            do_sample=False,
            max_length=length,
            min_length=length,
            cache_implementation=cache,
            pad_token_id=0,
            # their static cache would compile the model: minutes of warm-up that no comparison at this size repays
            disable_compile=True,
        )
        return out[:, ids_BT.shape[1] :].tolist()

    return answers


class Peer:
    """transformers' model of the same weights, in every setting that is tried."""

    def __init__(self, ours: Transformer, options: Options) -> None:
        self._models = {setting: theirs_of(ours, setting) for setting in settings_of(ours.config)}
        self._options = options
        self._best = f"{next(iter(self._models))}+dynamic"

    def best(self, ids_BT: Tensor) -> tuple[str, int]:
        """The fastest setting for these prompts, and how long answers may be: 0 if even the shortest take too long."""
        options = self._options
        tried = self.work(self._best, ids_BT, 2)
        tried()
        if (taken := seconds(tried)) > options.seconds / 4:  # what was best for fewer requests must do
            return self._best, self._affordable(taken / 2)
        work = {f"{setting}+dynamic": self.work(f"{setting}+dynamic", ids_BT, TRIAL_TOKENS) for setting in self._models}
        setting = fastest(work, repeats=1).rpartition("+")[0]
        forms = {f"{setting}+{c}": self.work(f"{setting}+{c}", ids_BT, TRIAL_TOKENS) for c in ("dynamic", "static")}
        self._best = fastest(forms, repeats=1)
        return self._best, self._affordable(seconds(forms[self._best]) / TRIAL_TOKENS)

    def _affordable(self, seconds_a_token: float) -> int:
        options = self._options
        if seconds_a_token * options.least > 3 * options.seconds:
            return 0
        return max(options.least, min(options.new_tokens, int(options.seconds / seconds_a_token)))

    def work(self, setting: str, ids_BT: Tensor, new_tokens: int) -> Callable[[], list[list[int]]]:
        form, _, cache = setting.rpartition("+")
        return their_answers(self._models[form], ids_BT, new_tokens, cache=cache)

    def model(self) -> PreTrainedModel:
        return next(iter(self._models.values()))


def prompts_of(config: ModelConfig, batch: int, length: int, *, seed: int = 1) -> Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def throughput(ours: Transformer, peer: Peer, batch: int, options: Options) -> list[dict[str, Any]]:
    ids_BT = prompts_of(ours.config, batch, options.prompt_len)
    setting, new_tokens = peer.best(ids_BT)
    if not new_tokens:
        print(f"  batch {batch}: transformers is too slow here to be waited for")
        return []
    engines = {"plain": Engine(ours, eos_ids=(), max_batch=batch, record_experts=False)}
    if ours.config.feed_forward == "moe":
        engines["MTP, untrained"] = Engine(
            with_mtp(ours), eos_ids=(), max_batch=batch, record_experts=False, speculate="auto"
        )
    return beside(engines, peer.work(setting, ids_BT, new_tokens), ids_BT, new_tokens, setting, options)


def cached_throughput(ours: Transformer, peer: Peer, batch: int, options: Options) -> list[dict[str, Any]]:
    """Prompts that were there before. Theirs has no cache between calls and computes them again."""
    ids_BT = prompts_of(ours.config, batch, options.first_prompt)
    setting, new_tokens = peer.best(ids_BT)
    if not new_tokens:
        return []
    engine = Engine(
        ours, eos_ids=(), max_batch=batch, record_experts=False, prefix_cache=True, block_size=BLOCK
    )  # time_pairs' untimed run fills it
    work = peer.work(setting, ids_BT, new_tokens)
    return beside({"cache hit": engine}, work, ids_BT, new_tokens, setting, options)


def beside(
    engines: dict[str, Engine],
    their_work: Callable[[], list[list[int]]],
    ids_BT: Tensor,
    new_tokens: int,
    setting: str,
    options: Options,
) -> list[dict[str, Any]]:
    """Each engine's row: tokens per second in pairs with theirs."""
    (batch, prompt_len), found = ids_BT.shape, []
    for name, engine in engines.items():
        our_work = our_answers(engine, ids_BT.tolist(), new_tokens)
        same = [a == b for x, y in zip(our_work(), their_work(), strict=True) for a, b in zip(x, y, strict=True)]
        paired = time_pairs(our_work, their_work, n_pairs=options.pairs, n_tokens=batch * new_tokens)
        found.append({
            "what": "tokens", "ours": name, "batch": batch, "prompt_len": prompt_len, "new_tokens": new_tokens,
            "theirs_setting": setting, "same_tokens": sum(same) / len(same), "ours_tokens_per_s": paired.ours,
            "theirs_tokens_per_s": paired.theirs, "ratio": paired.ratio, "ratio_min": paired.spread[0],
            "ratio_max": paired.spread[1],
        })  # fmt: skip
        rates = [f"{statistics.median(who):.0f}" for who in (paired.ours, paired.theirs)]
        print(f"  batch {batch}, {name}: {' and '.join(rates)} tokens/s")
    return found


def first_token(ours: Transformer, peer: Peer, options: Options) -> list[dict[str, Any]]:
    """From a prompt to its first token: computed whole, and with all but the last block in the cache. Theirs has no
    cache between calls."""
    length = options.first_prompt
    ids_BT = prompts_of(ours.config, 1, length)
    setting, new_tokens = peer.best(ids_BT)
    if not new_tokens:
        return []
    their_work = peer.work(setting, ids_BT, 1)
    tails = iter(range(1 << 30))

    def our_work(engine: Engine) -> Callable[[], object]:
        def answer() -> object:
            prompt = ids_BT[0].tolist()
            tail = torch.Generator().manual_seed(next(tails))  # another end each time: the last block is never there
            prompt[-BLOCK:] = torch.randint(ours.config.vocab_size, (BLOCK,), generator=tail).tolist()
            return engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=1))

        return answer

    found = []
    for name, cached in (("cold", False), ("cache hit", True)):
        settings: dict[str, Any] = dict(max_batch=1, block_size=BLOCK, record_experts=False, prefix_cache=cached)
        work = our_work(Engine(ours, eos_ids=(), **settings))
        paired = time_pairs(work, their_work, n_pairs=options.pairs, n_tokens=1)
        found.append({
            "what": "first token", "ours": name, "batch": 1, "prompt_len": length, "theirs_setting": setting,
            "ours_ms": [1000 / rate for rate in paired.ours], "theirs_ms": [1000 / rate for rate in paired.theirs],
            "ratio": paired.ratio, "ratio_min": paired.spread[0], "ratio_max": paired.spread[1],
        })  # fmt: skip
    return found


def bandwidth() -> float:
    """Bytes a second that this many threads read from memory."""
    numbers = torch.ones(1 << 27, dtype=torch.float32)  # 512 MB: no cache holds it
    return numbers.nbytes / min(seconds(numbers.sum) for _ in range(6))


def measure(size: Sizes, dtype: str, options: Options, bytes_per_s: float) -> list[dict[str, Any]]:
    config = config_of(size)
    total, active = parameters(config)
    print(f"{size}, {dtype}: {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active")
    ours = make_ours(config, dtype=DTYPES[dtype])
    peer = Peer(ours, options)
    differ = logits_differ_by(ours, peer.model(), prompts_of(config, 1, 32))
    rows = [row for batch in options.batches for row in throughput(ours, peer, batch, options)]
    rows += [row for batch in options.cached_batches for row in cached_throughput(ours, peer, batch, options)]
    rows += first_token(ours, peer, options)
    about = {"size": size, "dtype": dtype, "parameters": total, "active": active, "pairs": options.pairs}
    for row in rows:
        row |= about | {"logits_differ_by": differ, "bandwidth": bytes_per_s}
        if row["what"] == "tokens" and row["batch"] == 1 and row["ours"] == "plain":
            read = active * DTYPES[dtype].itemsize * statistics.median(row["ours_tokens_per_s"])
            row["bandwidth_share"] = read / bytes_per_s
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'size':>5} {'dtype':>8} {'what':>27} {'ours':>9} {'theirs':>9} {'ratio':>6}   range         bandwidth"]
    for row in rows:
        how = "" if row["ours"] == "plain" else f", {row['ours']}"
        what = f"{row['batch']} requests{how}" if row["what"] == "tokens" else f"first of {row['prompt_len']}{how}"
        unit = "tokens_per_s" if row["what"] == "tokens" else "ms"
        ours, theirs = (statistics.median(row[f"{who}_{unit}"]) for who in ("ours", "theirs"))
        share = f"{100 * row['bandwidth_share']:.0f} %" if "bandwidth_share" in row else ""
        lines.append(
            f"{row['size']:>5} {row['dtype']:>8} {what:>27} {ours:9.{1 if unit == 'ms' else 0}f} "
            f"{theirs:9.{1 if unit == 'ms' else 0}f} {row['ratio']:6.2f}   "
            f"{row['ratio_min']:.2f}..{row['ratio_max']:.2f}   {share:>6}"
        )
    return lines


def main(options: Options) -> None:
    set_threads(options.threads)
    keep_freed_memory()  # as our commands do; it helps both sides, which share this process
    bytes_per_s = bandwidth()
    print(f"{options.threads} threads read {bytes_per_s / 1e9:.1f} GB/s")
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        for size in options.sizes:
            found = measure(size, dtype, options, bytes_per_s)
            for row in found if options.save else []:
                append_result("engine", row)
            rows += found
            gc.collect()
    print("\n".join(["", *table(rows)]))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
