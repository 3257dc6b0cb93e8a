"""Nouns that cross rooms. Owns no behaviour beyond reading its own fields.

Letters used by the whole package: B batch, T tokens, S keys, D width, H heads, V vocabulary, E experts, K chosen
experts, L layers, P problems, G answers per problem, A answers in all (P x G).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

Role = Literal["system", "user", "assistant", "tool"]
Language = Literal["en", "zh"]
FinishReason = Literal["stop", "length", "aborted", "error"]


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """What the assistant asks of a tool. `arguments` is a JSON object as it was written; `id` pairs call and answer."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn. `thinking` is what the assistant wrote between <think> and </think>; None when it did not think.

    The assistant's may call tools; what one answers has the role "tool" and the `tool_call_id` of the call.
    """

    role: Role
    content: str
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


Conversation = list[Message]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question whose answer can be checked.

    `key` names the instance without regard to language or wording; the held-out split is a hash of it.
    `steps` are the states a worked solution writes down, in order; empty when nobody worked it out.
    `verifier` is "exact" (the same text), "answer" (the same text or, by math-verify, the same value), "instruction" (a
    rule in `metadata`), "request" (an open one, in `metadata`), "reasoning_gym:<task>", or "module:function" of the
    user's own.
    """

    prompt: str
    answer: str
    family: str = "user"
    level: int = 0
    language: Language = "en"
    key: str = ""
    verifier: str = "answer"
    steps: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)


class Score(NamedTuple):
    """What a verifier says. `value` in [0, 1], or None when it could not decide; then `error` says why."""

    value: float | None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw tokens. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.

    The noise of a token is a function of (seed, its position in the sequence) alone, so a sample does not depend on
    what else is in the batch.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is negative; use 0 for greedy")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is outside (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} is outside [0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} is negative; use 0 to switch it off")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} leaves nothing to generate")

    @property
    def cuts(self) -> bool:
        """Some ids may get no probability."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def is_plain(self) -> bool:
        """Draws from the model's own distribution."""
        return self.temperature == 1 and not self.cuts


@dataclass(frozen=True, kw_only=True)
class ThinkingLimits:
    """How much an answer may think, in ids drawn between <think> and </think>.

    `budget`: at most so many, exactly so many where thinking had to be cut; None is no limit. It ends with the ids of
    `landing`, which count, then </think>; a budget that is too short for them has </think> alone. `at_least`: neither
    </think> nor an end before so many. `stop_loops`: thinking that repeats itself is closed in the same way.
    """

    budget: int | None = None
    at_least: int = 0
    landing: tuple[int, ...] = ()
    stop_loops: bool = True

    def __post_init__(self) -> None:
        if self.budget is not None and self.budget < 0:
            raise ValueError(f"budget={self.budget} is negative; use 0 for no thinking and None for no limit")
        if self.at_least < 0:
            raise ValueError(f"at_least={self.at_least} is negative; use 0 for thinking as short as the model likes")
        if self.budget is not None and self.at_least > self.budget:
            raise ValueError(f"at_least={self.at_least} tokens of thinking do not fit into budget={self.budget}")


ClosedBy = Literal["model", "budget", "answer_now", "loop"]


class ThinkingReport(NamedTuple):
    """`n_tokens` ids were drawn as thinking. `closed_by` says who ended it; None where it never began or ended."""

    n_tokens: int
    closed_by: ClosedBy | None


@dataclass(frozen=True, kw_only=True)
class DrawnFrom:
    """The distribution an answer was drawn from, where that is not the model's own: softmax(logits / temperature) over
    the ids that top-k, top-p and min-p left.

    `logps` are log-probs under it, one per drawn id. `kept_ids` (X,) int32 are the ids left at each drawn id, one
    after another, `kept_counts` (n,) int64 how many at each; both None when nothing was cut.
    """

    temperature: float
    logps: list[float]
    kept_ids: torch.Tensor | None = None
    kept_counts: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What the engine returns for one prompt.

    `logps` are log-probs under the model's own distribution (temperature 1, nothing cut but ids that no tokenizer
    has), one per id in `ids`, however the ids were drawn: what users of an API expect, and what engine and trainer are
    compared by. A policy ratio is of `drawn_from.logps` where there are any. `ids` includes the end token when
    `finish_reason` is "stop". `experts` (n_computed, n_moe_layers, K) uint8 (int16 above 256 experts) are those chosen
    at each computed position (prompt, then all of `ids` but the last), or None for a dense model. `drawn_from` is None
    when the ids were drawn from the model's own distribution, or nobody asked the engine to tell. `error` says why
    `finish_reason` is "error": the request's own fault or bad luck, never a neighbour's. `thinking` is None where the
    engine knows no marks of it.
    """

    prompt_ids: list[int]
    ids: list[int]
    logps: list[float]
    finish_reason: FinishReason
    experts: torch.Tensor | None = None
    drawn_from: DrawnFrom | None = None
    error: str | None = None
    thinking: ThinkingReport | None = None


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One answer to one problem: the text as a message, and the tokens as they were drawn."""

    problem: Problem
    completion: Completion
    message: Message
