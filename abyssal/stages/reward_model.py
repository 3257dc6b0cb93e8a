"""The preference reward model of `align`: dev3's body, two heads, Bradley-Terry on pairs. (R1 section 3.1)

Helpfulness reads the question and the final answer, never the thinking; safety reads the whole response. Accuracy is
measured on held-out pairs for each head, and a model near chance stops the run: its reward would be noise.
Letters: N pairs; 2N stands for every chosen answer, then every rejected one.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from abyssal.checkpoint.save_reward import load_reward_model, save_reward_model
from abyssal.data.preferences import Pair
from abyssal.data.problems import ProblemSource
from abyssal.engine.engine import Engine
from abyssal.loss.bradley_terry import bradley_terry
from abyssal.machine import Precision, compute_dtype
from abyssal.model.reward_head import RewardModel
from abyssal.model.transformer import Transformer
from abyssal.optim.clip import clip_gradients
from abyssal.optim.schedule import learning_rate
from abyssal.record import memory_gb
from abyssal.reward.open_request import HEADS
from abyssal.stages.preference_pairs import draw_pairs, read_pairs, write_pairs
from abyssal.stages.preference_scores import Scores, pair_ids, scored
from abyssal.stages.schedule_points import RecorderAt, due
from abyssal.stages.state import apply_step, build_optimizers
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """Read only where align.preference_share is above 0. R1: 66,000 pairs for helpfulness, 106,000 prompts for safety,
    one epoch."""

    requests: int = 600  # to train on: a pair each, two where safety has a say
    held_out_requests: int = 400
    answers: int = 4  # of the policy to a request, of which two that differ in truth make a pair
    sampled_share: float = 0.5  # of requests that the policy answers itself; the others get a good and a spoiled answer
    flip_share: float = 0.07  # of training labels that are wrong, as people's are
    max_tokens: int = 64
    epochs: int = 2
    pairs: int = 32  # per step
    lr: float = 1e-3
    warmup: int = 5
    clip: float = 1.0
    row_len: int = 256
    rows_per_pass: int = 32
    eval_every: int = 20
    least_accuracy: float = 0.6  # on held-out pairs, of each head
    dtype: Precision = "auto"

    def __post_init__(self) -> None:
        SamplingParams(max_tokens=self.max_tokens)
        for name in ("requests", "held_out_requests", "answers", "epochs", "pairs", "rows_per_pass"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("sampled_share", "flip_share", "least_accuracy"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is a share; give a number from 0 to 1")
        if self.flip_share >= 0.5:
            raise ValueError(f"flip_share={self.flip_share}: with half the labels wrong nothing can be learned")


def train_reward_model(
    directory: Path,
    *,
    config: RewardModelConfig,
    policy: Transformer,
    tokenizer: Tokenizer,
    source: ProblemSource,
    first: int,
    seed: int,
    recorder_at: RecorderAt,
) -> dict[str, Any]:
    """Leaves pairs.jsonl and checkpoint/ in `directory`, done.json last; what was measured of each head.

    Killed while drawing pairs or while training it does that part again, with the same noise, to the same bits.
    """
    done = directory / "done.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    directory.mkdir(parents=True, exist_ok=True)
    pairs_path = directory / "pairs.jsonl"
    if not pairs_path.is_file():
        write_pairs(pairs_path, all_pairs(config, policy, tokenizer, source, first=first, seed=seed))
    pairs = read_pairs(pairs_path)
    dtype = compute_dtype(config.dtype, policy.embed_tokens.weight.device)
    model = RewardModel.from_policy(policy, len(HEADS), dtype=dtype)
    seen = fit(model, config=config, tokenizer=tokenizer, pairs=pairs, seed=seed, recorder_at=recorder_at)
    check_above_floor(seen, config)
    save_reward_model(directory / "checkpoint", model, tokenizer, heads=HEADS, facts={"heads": seen})
    facts = {"stage": "reward_model", "pairs": {split: len(some) for split, some in pairs.items()}, "heads": seen}
    partial = done.with_name(done.name + ".partial")
    partial.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, done)
    return facts


def all_pairs(
    config: RewardModelConfig,
    policy: Transformer,
    tokenizer: Tokenizer,
    source: ProblemSource,
    *,
    first: int,
    seed: int,
) -> dict[str, list[Pair]]:
    engine = Engine(
        policy, eos_ids=[tokenizer.eos_id], max_batch=256, record_experts=False, vocab_size=tokenizer.vocab_size
    )

    def draw(split: Literal["train", "held_out"], requests: int, flip_share: float) -> list[Pair]:
        return draw_pairs(
            engine,
            tokenizer,
            source,
            split=split,
            first=first,
            requests=requests,
            answers=config.answers,
            sampled_share=config.sampled_share,
            flip_share=flip_share,
            max_tokens=config.max_tokens,
            seed=seed,
        )

    return {
        "train": draw("train", config.requests, config.flip_share),
        "held_out": draw("held_out", config.held_out_requests, 0.0),
    }


def fit(
    model: RewardModel,
    *,
    config: RewardModelConfig,
    tokenizer: Tokenizer,
    pairs: dict[str, list[Pair]],
    seed: int,
    recorder_at: RecorderAt,
) -> dict[str, dict[str, float]]:
    """Train in place; what `measured` says of the result."""
    optimizers = build_optimizers(model, kind="adamw", lr=0.0, adamw_lr=config.lr, weight_decay=0.0)
    order: list[int] = []
    for epoch in range(config.epochs):
        order += random.Random(f"reward model {seed} {epoch}").sample(range(len(pairs["train"])), len(pairs["train"]))
    batches = [order[k : k + config.pairs] for k in range(0, len(order), config.pairs)]
    scores = Scores(model, tokenizer, row_len=config.row_len, rows_per_pass=config.rows_per_pass)
    seen: dict[str, dict[str, float]] = {}
    with recorder_at(0) as recorder:
        for step, batch in enumerate(batches):
            began = time.perf_counter()
            ids, heads_N = pair_ids([pairs["train"][i] for i in batch], tokenizer)
            scores_2N = scored(
                model, ids, pad_id=tokenizer.pad_id, row_len=config.row_len, rows_per_pass=config.rows_per_pass
            ).gather(1, heads_N.repeat(2)[:, None].to(model.score.weight.device))[:, 0]
            chosen_N, rejected_N = scores_2N.chunk(2)
            loss = bradley_terry(chosen_N, rejected_N)
            loss.backward()
            grad_norm = clip_gradients(model.parameters(), config.clip)
            lr = learning_rate(step, len(batches), warmup=config.warmup, shape="cosine")
            apply_step(optimizers, lr)
            metrics: dict[str, Any] = {
                "loss": loss.detach(),
                "pair_accuracy": (chosen_N > rejected_N).float().mean(),
                "grad_norm": grad_norm,
                "lr": lr * config.lr,
                "tokens": sum(map(len, ids)),
                "memory_gb": memory_gb(),
            }
            if due(step, config.eval_every, len(batches)):
                seen = measured(scores, pairs["held_out"])
                metrics |= {f"held_out_{head}_accuracy": facts["accuracy"] for head, facts in seen.items()}
            metrics["time_s"] = time.perf_counter() - began
            recorder.step(step, len(batches), metrics)
        recorder.log("; ".join(said_of(head, facts) for head, facts in seen.items()))
    return seen


def measured(scores: Scores, pairs: list[Pair]) -> dict[str, dict[str, float]]:
    """By head: the share of pairs ordered rightly, in all and by source; mean and deviation of scores and truths."""
    out: dict[str, dict[str, float]] = {}
    for head in HEADS:
        of_head = [pair for pair in pairs if pair.head == head]
        if len(of_head) < 2:
            raise ValueError(
                f"only {len(of_head)} held-out pairs for {head}; raise reward_model.held_out_requests, or its accuracy "
                f"says nothing"
            )
        responses = [(p.prompt, p.chosen) for p in of_head] + [(p.prompt, p.rejected) for p in of_head]
        scores_2N = scores.of(head, responses)
        chosen_N, rejected_N = scores_2N.chunk(2)
        right_N = (chosen_N > rejected_N).float()
        truths_2N = torch.tensor([p.truths[0] for p in of_head] + [p.truths[1] for p in of_head])
        facts = {
            "accuracy": float(right_N.mean()),
            "pairs": len(of_head),
            "mean": float(scores_2N.mean()),
            "std": float(scores_2N.std(correction=0)),
            "truth_mean": float(truths_2N.mean()),
            "truth_std": float(truths_2N.std(correction=0)),
        }
        for source in ("sampled", "spoiled"):
            chosen = torch.tensor([pair.source == source for pair in of_head])
            if chosen.any():
                facts |= {f"accuracy_{source}": float(right_N[chosen].mean()), f"pairs_{source}": int(chosen.sum())}
        out[head] = facts
    return out


def check_above_floor(seen: dict[str, dict[str, float]], config: RewardModelConfig) -> None:
    for head, facts in seen.items():
        if facts["accuracy"] < config.least_accuracy or math.isclose(facts["std"], 0.0):
            raise ValueError(
                f"the reward model's {said_of(head, facts)}, below least_accuracy={config.least_accuracy}: a reward "
                f"near chance is noise; raise reward_model.requests or .epochs, or set align.preference_share to 0"
            )


def said_of(head: str, facts: dict[str, float]) -> str:
    """`helpfulness orders 93 % of 250 held-out pairs rightly`"""
    return f"{head} orders {100 * facts['accuracy']:.0f} % of {facts['pairs']} held-out pairs rightly"


def load_scores(
    directory: Path, *, config: RewardModelConfig, tokenizer: Tokenizer, device: torch.device
) -> tuple[Scores, dict[str, dict[str, float]]]:
    """A trained reward model from its directory, with what was measured of each head."""
    model, facts = load_reward_model(
        directory / "checkpoint", dtype=compute_dtype(config.dtype, device), device=device
    )
    model.requires_grad_(False)
    return Scores(model, tokenizer, row_len=config.row_len, rows_per_pass=config.rows_per_pass), facts["heads"]
