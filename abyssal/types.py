"""Nouns that cross rooms. Owns no behaviour beyond reading its own fields.

Letters used by the whole package: B batch, T tokens, S keys, D width, H heads, V vocabulary, E experts, K chosen
experts, L layers, P problems, G answers per problem, A answers in all (P x G).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

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


StructureKind = Literal["json", "schema", "regex", "choice", "tools"]


@dataclass(frozen=True)
class Structure:
    """What an answer has to be: its draws are confined to it (engine/grammar.py).

    "json" is an object, "schema" what a JSON schema (a value or its text) describes, "regex" a text that the expression
    matches as a whole (digits, letters and blanks of its classes are ASCII), "choice" one of a list of texts, "tools"
    calls in a model's own form (tokens/tool_structure.py). Thinking that the prompt has opened stays free; `may_think`
    says that the model may open it by itself.
    """

    kind: StructureKind
    value: Any = None  # a str once it is made, so that equal ones are one key
    may_think: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(StructureKind):
            raise ValueError(f"a structure of kind {self.kind!r} is unknown; use one of {get_args(StructureKind)}")
        if (self.value is None) != (self.kind == "json"):
            raise ValueError(f"a structure of kind {self.kind!r} has value {self.value!r}; all but 'json' need one")
        if self.kind == "regex" and not isinstance(self.value, str):
            raise ValueError(f"a regular expression is a text, not {self.value!r}")
        if self.kind == "json" or isinstance(self.value, str):
            return
        try:
            text = json.dumps(self.value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"the value of a structure {self.kind!r} is no JSON ({error}); correct it") from None
        object.__setattr__(self, "value", text)


MAX_STOPS, MAX_STOP_BYTES = 16, 512
MAX_TOP_LOGPROBS = 20
MAX_BIASES, MAX_BIAS = 1024, 100.0
MAX_REPETITION = 100.0
MAX_PENALTY = 2.0  # of presence and frequency, as OpenAI bounds them


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw tokens. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.

    The noise of a token is a function of (seed, its position in the sequence) alone, so a sample does not depend on
    what else is in the batch.
    What comes first: `repetition_penalty` on all ids of prompt and answer (1 is off), `presence_penalty` and
    `frequency_penalty` on those of the answer, `logit_bias` by id; then masks, temperature, top-k, top-p, min-p.
    `stop` ends an answer at the first of these strings that it spells, thinking left out.
    `top_logprobs`: so many of the likeliest ids at each place are told, with their log-probs.
    `structure` confines the answer; cut by max_tokens it is the beginning of a whole one.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    structure: Structure | None = None

    def __post_init__(self) -> None:
        for name in ("top_k", "max_tokens", "seed", "top_logprobs"):
            if not _is_int(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r} is not a whole number")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} is no number from 0 up; use 0 for greedy")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is outside (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} is outside [0, 1]")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k={self.top_k} is outside 0..2147483647; use 0 to switch it off")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} leaves nothing to generate")
        if not 1 / MAX_REPETITION <= self.repetition_penalty <= MAX_REPETITION:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} is outside "
                f"[{1 / MAX_REPETITION:g}, {MAX_REPETITION:g}]; use 1 for none"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -MAX_PENALTY <= getattr(self, name) <= MAX_PENALTY:
                raise ValueError(f"{name}={getattr(self, name)} is outside [-{MAX_PENALTY:g}, {MAX_PENALTY:g}]")
        if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise ValueError(f"top_logprobs={self.top_logprobs} is outside 0..{MAX_TOP_LOGPROBS}")
        self._check_bias()
        self._check_stop()

    def _check_bias(self) -> None:
        if len(self.logit_bias) > MAX_BIASES:
            raise ValueError(f"logit_bias has {len(self.logit_bias)} ids; give at most {MAX_BIASES}")
        for i, value in self.logit_bias.items():
            if not _is_int(i) or i < 0:
                raise ValueError(f"logit_bias names {i!r}, which is no id of a token")
            if not -MAX_BIAS <= value <= MAX_BIAS:
                raise ValueError(f"logit_bias of id {i} is {value}, outside [-{MAX_BIAS:g}, {MAX_BIAS:g}]")

    def _check_stop(self) -> None:
        if self.stop and self.structure is not None:
            raise ValueError(f"stop={self.stop!r} would cut an answer that has a structure; leave one of the two out")
        if not isinstance(self.stop, tuple):
            raise ValueError(f"stop={self.stop!r} is no tuple of strings; one string is (text,)")
        if len(self.stop) > MAX_STOPS:
            raise ValueError(f"stop has {len(self.stop)} strings; give at most {MAX_STOPS}")
        for text in self.stop:
            n_bytes = len(text.encode())
            if not 1 <= n_bytes <= MAX_STOP_BYTES:
                raise ValueError(f"a stop string of {n_bytes} bytes; give 1 to {MAX_STOP_BYTES}")

    @property
    def penalises(self) -> bool:
        """Some ids are drawn less often, or more, for having been there."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def reshapes(self) -> bool:
        """Draws from other logits than the model's."""
        return self.penalises or bool(self.logit_bias)

    @property
    def cuts(self) -> bool:
        """Some ids may get no probability."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def draws_freely(self) -> bool:
        """What is drawn changes no draw behind it but by what the model reads, and nobody looks at it at once."""
        as_usual = SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            max_tokens=self.max_tokens,
            seed=self.seed,
        )
        return self == as_usual

    @property
    def is_plain(self) -> bool:
        """Draws from the model's own distribution."""
        return self.temperature == 1 and not self.cuts and not self.reshapes and self.structure is None


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


class RequestError(RuntimeError):
    """A request ended with an error, and somebody needed its answer."""


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
    engine knows no marks of it. `stop` is the stop string that ended it: `ids` are all that were drawn, those that
    spell it too, and a token may hold more than its last letter. `top_logprobs` has an entry for each of `ids`, the
    likeliest first: {id: log-prob} of the model's own distribution.
    """

    prompt_ids: list[int]
    ids: list[int]
    logps: list[float]
    finish_reason: FinishReason
    experts: torch.Tensor | None = None
    drawn_from: DrawnFrom | None = None
    error: str | None = None
    thinking: ThinkingReport | None = None
    stop: str | None = None
    top_logprobs: list[dict[int, float]] | None = None

    def checked(self) -> Completion:
        """Itself. What ended with an error is no answer, and raises it."""
        if self.error is not None:
            raise RequestError(f"a request of {len(self.prompt_ids)} tokens ended with an error: {self.error}")
        return self


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One answer to one problem: the text as a message, and the tokens as they were drawn."""

    problem: Problem
    completion: Completion
    message: Message


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
