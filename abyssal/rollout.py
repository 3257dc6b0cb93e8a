"""Prompts -> answers with log-probs, P x G at a time; and how far the engine that drew them is from the trainer.

Does not score: rewards meet rollouts in the stages.
Letters: P problems, G answers per problem, B rows, T tokens, V vocabulary, M MoE layers, K chosen experts,
X tokens of a batch.
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
from abyssal.tokens.chat import ThinkingMode, opens_thinking, parse, render
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
    """P x G rollouts, answers to one problem side by side. `params.seed` gives way to one of (seed, problem, g).

    An answer that ended with an error is none to learn from or to grade: it is raised.
    """
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
    completions = [completion.checked() for completion in engine.generate(prompts, each)]
    return [as_rollout(problems[i // answers_per_problem], c, tokenizer) for i, c in enumerate(completions)]


def as_rollout(problem: Problem, completion: Completion, tokenizer: Tokenizer) -> Rollout:
    thinking_open = opens_thinking(completion.prompt_ids, tokenizer)
    message = parse(completion.ids, tokenizer, thinking_open=thinking_open)
    return Rollout(problem=problem, completion=completion, message=message)


class Agreement(NamedTuple):
    """Engine against trainer: gaps |log-prob - log-prob| of drawn tokens, 0 when nothing could be compared.

    `max` and `mean` are over `n_compared` of `n_tokens`. With router replay the trainer computes on the engine's
    experts and all tokens are compared; without, those before which both chose the same experts everywhere.
    `free_max` and `free_mean` are over all tokens with the trainer choosing for itself, and then `n_flipped` of
    `n_choices` (position, layer) pairs have another set of experts.
    """

    max: float
    mean: float
    n_tokens: int
    n_compared: int
    n_flipped: int
    n_choices: int
    free_max: float
    free_mean: float

    @property
    def flip_share(self) -> float:
        return self.n_flipped / self.n_choices if self.n_choices else 0.0


@torch.no_grad()
def agreement(
    model: Transformer,
    completions: list[Completion],
    *,
    replay: bool = False,
    vocab_size: int | None = None,
    tokens_per_batch: int = 16384,
) -> Agreement:
    """Compute the log-probs again as training does (no cache, all tokens at once) and compare.

    `vocab_size` is the engine's. Replay costs a second pass over the batches in which a choice differs, and no other.
    """
    free: list[Tensor] = []
    compared: list[Tensor] = []
    n_flipped = n_choices = 0
    for batch in _batches(completions, tokens_per_batch):
        routings: list[Routing] = []
        free_gaps = _gaps(model, batch, vocab_size=vocab_size, routings=routings)
        flips = _flips(batch, routings)
        n_batch_flips = sum(int(flipped_TM.sum()) for flipped_TM in flips)
        n_flipped += n_batch_flips
        n_choices += sum(flipped_TM.numel() for flipped_TM in flips)
        free += free_gaps
        if not replay:
            for c, gap_T, flipped_TM in zip(batch, free_gaps, flips, strict=True):
                same_so_far_T = flipped_TM.any(-1).cumsum(0) == 0
                compared.append(gap_T[same_so_far_T[len(c.prompt_ids) - 1 :]])
        elif routings and any(c.experts is None for c in batch):
            raise ValueError("replay needs completions that carry experts; build the engine with record_experts=True")
        elif n_batch_flips:
            compared += _gaps(model, batch, vocab_size=vocab_size, replay=True)
        else:
            compared += free_gaps
    (largest, mean), (free_largest, free_mean) = _summary(compared), _summary(free)
    return Agreement(
        max=largest,
        mean=mean,
        n_tokens=sum(map(len, free)),
        n_compared=sum(map(len, compared)),
        n_flipped=n_flipped,
        n_choices=n_choices,
        free_max=free_largest,
        free_mean=free_mean,
    )


def _gaps(
    model: Transformer,
    batch: list[Completion],
    *,
    vocab_size: int | None,
    replay: bool = False,
    routings: list[Routing] | None = None,
) -> list[Tensor]:
    """|log-prob - log-prob| of each drawn token, one (T,) a completion."""
    lengths = [len(c.prompt_ids) + len(c.ids) - 1 for c in batch]  # the last token drawn was never an input
    device = model.embed_tokens.weight.device
    width = -(-max(lengths) // 8) * 8  # FP32 products give a row the same bits where rows come in fours
    ids_BT = torch.zeros(len(batch), width, dtype=torch.int64)
    for row, (c, length) in enumerate(zip(batch, lengths, strict=True)):
        ids_BT[row, :length] = torch.tensor((c.prompt_ids + c.ids)[:length])
    experts_BTMK = None
    if replay:
        recorded = [c.experts for c in batch if c.experts is not None]
        experts_BTMK = torch.full((*ids_BT.shape, *recorded[0].shape[1:]), -1)
        for row, (experts_TMK, length) in enumerate(zip(recorded, lengths, strict=True)):
            experts_BTMK[row, :length] = experts_TMK.long()
        experts_BTMK = experts_BTMK.to(device)
    # padding stands behind each row, where causal attention cannot see it
    hidden_BTD = model.hidden(ids_BT.to(device), routings=routings, experts_BTMK=experts_BTMK)
    gaps = []
    for row, (c, length) in enumerate(zip(batch, lengths, strict=True)):
        start = len(c.prompt_ids) - 1  # the position that predicts the first drawn token
        logps_TV = model.logits(hidden_BTD[row, start:length])[:, :vocab_size].log_softmax(-1).cpu()
        logps_T = logps_TV.gather(-1, torch.tensor(c.ids)[:, None])[:, 0]
        gaps.append((logps_T - torch.tensor(c.logps)).abs())
    return gaps


def _flips(batch: list[Completion], routings: list[Routing]) -> list[Tensor]:
    """Where another set of experts was chosen, one (T, M) a completion; nothing to flip where nothing was recorded."""
    flips = []
    own_XMK = torch.stack([r.experts_NK for r in routings], dim=1).cpu() if routings else None
    for row, c in enumerate(batch):
        n_computed = len(c.prompt_ids) + len(c.ids) - 1
        if own_XMK is None or c.experts is None:
            flips.append(torch.zeros(n_computed, 0, dtype=torch.bool))
            continue
        own_TMK = own_XMK.unflatten(0, (len(batch), -1))[row, :n_computed]
        flips.append((own_TMK.sort(-1).values != c.experts.long().sort(-1).values).any(-1))
    return flips


def _summary(gaps: list[Tensor]) -> tuple[float, float]:
    """Largest and mean."""
    gap_X = torch.cat(gaps) if gaps else torch.empty(0)
    return (float(gap_X.max()), float(gap_X.mean())) if len(gap_X) else (0.0, 0.0)


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
