"""Prompts -> answers with log-probs, P x G at a time; and how far the engine that drew them is from the trainer.

Does not score: rewards meet rollouts in the stages.
Letters: P problems, G answers per problem, B rows, T tokens, V vocabulary, M MoE layers, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from abyssal.engine import Engine
from abyssal.engine.sampler import derive_seed
from abyssal.model.moe import Routing
from abyssal.model.transformer import Transformer
from abyssal.tokens.chat import ThinkingMode, parse, render
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Completion, Message, Problem, Rollout, SamplingParams


def sample_answers(
    engine: Engine,
    tokenizer: Tokenizer,
    problems: list[Problem],
    *,
    answers_per_problem: int,
    params: SamplingParams,
    seed: int,
    system: str | None = None,
    thinking: ThinkingMode = "auto",
) -> list[Rollout]:
    """P x G rollouts, answers to one problem side by side. `params.seed` gives way to one of (seed, problem, g)."""
    if answers_per_problem < 1:
        raise ValueError(f"answers_per_problem={answers_per_problem} must be at least 1")
    prompts: list[list[int]] = []
    each: list[SamplingParams] = []
    for p, problem in enumerate(problems):
        conversation = [Message(role="user", content=problem.prompt)]
        if system is not None:
            conversation.insert(0, Message(role="system", content=system))
        ids = render(conversation, tokenizer, add_generation_prompt=True, thinking=thinking).ids
        for g in range(answers_per_problem):
            prompts.append(ids)
            each.append(replace(params, seed=derive_seed(seed, p, g)))
    completions = engine.generate(prompts, each)
    return [
        Rollout(
            problem=problems[i // answers_per_problem],
            completion=completion,
            message=parse(completion.ids, tokenizer, thinking_open=thinking == "on"),
        )
        for i, completion in enumerate(completions)
    ]


class Agreement(NamedTuple):
    """Engine against trainer. `max` and `mean` are gaps |log-prob - log-prob| over the `n_compared` drawn tokens (of
    `n_tokens`) before which both chose the same experts everywhere; `n_flipped` of `n_choices` (position, layer) pairs
    have another set of experts. Gaps are 0 when nothing could be compared."""

    max: float
    mean: float
    n_tokens: int
    n_compared: int
    n_flipped: int
    n_choices: int

    @property
    def flip_share(self) -> float:
        return self.n_flipped / self.n_choices if self.n_choices else 0.0


@torch.no_grad()
def agreement(model: Transformer, completions: list[Completion], *, tokens_per_batch: int = 16384) -> Agreement:
    """Compute the log-probs again as training does (no cache, all tokens at once) and compare."""
    gaps: list[Tensor] = []
    n_tokens = n_flipped = n_choices = 0
    for batch in _batches(completions, tokens_per_batch):
        lengths = [len(c.prompt_ids) + len(c.ids) - 1 for c in batch]  # the last token drawn was never an input
        device = model.embed_tokens.weight.device
        width = -(-max(lengths) // 8) * 8  # FP32 products give a row the same bits where rows come in fours
        ids_BT = torch.zeros(len(batch), width, dtype=torch.int64)
        for row, (c, length) in enumerate(zip(batch, lengths, strict=True)):
            ids_BT[row, :length] = torch.tensor((c.prompt_ids + c.ids)[:length])
        routings: list[Routing] = []
        # padding stands behind each row, where causal attention cannot see it
        hidden_BTD = model.hidden(ids_BT.to(device), routings=routings)
        experts_BTMK = None
        if routings:
            experts_BTMK = torch.stack([r.experts_NK for r in routings], dim=1).unflatten(0, ids_BT.shape).cpu()
        for row, (c, length) in enumerate(zip(batch, lengths, strict=True)):
            start = len(c.prompt_ids) - 1  # the position that predicts the first drawn token
            logps_TV = model.logits(hidden_BTD[row, start:length]).log_softmax(-1).cpu()
            logps_T = logps_TV.gather(-1, torch.tensor(c.ids)[:, None])[:, 0]
            gap_T = (logps_T - torch.tensor(c.logps)).abs()
            if experts_BTMK is not None and c.experts is not None:
                ours_TMK = experts_BTMK[row, :length].sort(-1).values
                flipped_TM = (ours_TMK != c.experts.long().sort(-1).values).any(-1)
                n_flipped += int(flipped_TM.sum())
                n_choices += flipped_TM.numel()
                same_so_far_T = flipped_TM.any(-1).cumsum(0) == 0
                gap_T = gap_T[same_so_far_T[start:]]
            n_tokens += len(c.ids)
            gaps.append(gap_T)
    gap_X = torch.cat(gaps) if gaps else torch.empty(0)
    return Agreement(
        max=float(gap_X.max()) if len(gap_X) else 0.0,
        mean=float(gap_X.mean()) if len(gap_X) else 0.0,
        n_tokens=n_tokens,
        n_compared=len(gap_X),
        n_flipped=n_flipped,
        n_choices=n_choices,
    )


def _batches(completions: list[Completion], tokens_per_batch: int) -> Iterator[list[Completion]]:
    """Answered completions by length, so that little is padded, in batches of at most so many padded tokens."""
    batch: list[Completion] = []
    for c in sorted((c for c in completions if c.ids), key=lambda c: len(c.prompt_ids) + len(c.ids)):
        if batch and (len(batch) + 1) * (len(c.prompt_ids) + len(c.ids) - 1) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(c)
    if batch:
        yield batch
