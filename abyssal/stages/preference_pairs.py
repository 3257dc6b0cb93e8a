"""Preference pairs for a run: half ranked among the policy's own answers, half a good answer beside a spoiled one.

No person labels anything: the hidden truth ranks, and a share of the training labels is turned round, as people would.
Held-out pairs come from held-out requests and have true labels. pairs.jsonl appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from abyssal.data.jsonl import read_jsonl
from abyssal.data.preferences import Pair, ranked_pair, request_at, spoiled_pair
from abyssal.data.problems import ProblemSource, Split
from abyssal.engine.engine import Engine
from abyssal.reward.open_request import heads_of
from abyssal.rollout import sample_answers
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Message, Problem, SamplingParams

PROMPTS_AT_ONCE = 64  # whose answers are drawn in one go: more fill the engine, and nothing else depends on it


def draw_pairs(
    engine: Engine,
    tokenizer: Tokenizer,
    source: ProblemSource,
    *,
    split: Split,
    first: int,
    requests: int,
    answers: int,
    sampled_share: float,
    flip_share: float,
    max_tokens: int,
    seed: int,
) -> list[Pair]:
    """One pair a head and request; requests whose sampled answers are all as good get a spoiled pair instead."""
    problems = [request_at(source, seed, first + i, split) for i in range(requests)]
    noise = [random.Random(f"pairs {seed} {split} {first + i}") for i in range(requests)]
    asked = [i for i in range(requests) if noise[i].random() < sampled_share]
    said: dict[int, list[Message]] = {}
    params = SamplingParams(max_tokens=max_tokens)
    for start in range(0, len(asked), PROMPTS_AT_ONCE):
        part = asked[start : start + PROMPTS_AT_ONCE]
        rollouts = sample_answers(
            engine, tokenizer, [problems[i] for i in part], answers_per_problem=answers, params=params,
            seed=seed + first + start,
        )  # fmt: skip
        for place, rollout in enumerate(rollouts):
            if rollout.completion.finish_reason == "stop":  # an answer cut off is none
                said.setdefault(part[place // answers], []).append(rollout.message)
    return [
        pair
        for i, problem in enumerate(problems)
        for pair in pairs_of(problem, said.get(i, []), noise[i], flip_share=flip_share)
    ]


def pairs_of(problem: Problem, answers: list[Message], rng: random.Random, *, flip_share: float) -> list[Pair]:
    pairs = []
    for head in heads_of(problem):
        pair = ranked_pair(problem, head, answers, rng) or spoiled_pair(problem, head, rng)
        pairs.append(pair.turned() if rng.random() < flip_share else pair)
    return pairs


def write_pairs(path: Path, pairs: dict[str, list[Pair]]) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for split, of_split in pairs.items():
            for pair in of_split:
                file.write(json.dumps({"split": split} | entry_of(pair), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def entry_of(pair: Pair) -> dict[str, Any]:
    entry = asdict(pair)
    for side in ("chosen", "rejected"):  # answers that call no tools
        entry[side] = {key: entry[side][key] for key in ("role", "content", "thinking")}
    return entry


def read_pairs(path: Path) -> dict[str, list[Pair]]:
    """Pairs by split."""
    pairs: dict[str, list[Pair]] = {"train": [], "held_out": []}
    for where, entry in read_jsonl(path):
        try:
            pairs[entry.pop("split")].append(pair_of(entry))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where}: not a pair ({error}); delete {path} and run again") from None
    return pairs


def pair_of(entry: dict[str, Any]) -> Pair:
    chosen, rejected = Message(**entry.pop("chosen")), Message(**entry.pop("rejected"))
    return Pair(chosen=chosen, rejected=rejected, truths=tuple(entry.pop("truths")), **entry)
