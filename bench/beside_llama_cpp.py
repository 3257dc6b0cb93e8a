"""The engine beside llama.cpp on a dense model: tokens per second at 1 to 64 requests, at equal precision.

    python bench/beside_llama_cpp.py [--model smollm2] [--batches 1 4 16 64] [--precisions F32 BF16] [--threads 2]

llama.cpp is built by hand, for the CPU at hand, from the source package of its Python binding; nothing here needs it:

    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAVA_BUILD=OFF" \\
        pip install --no-binary llama-cpp-python llama-cpp-python

Both read the GGUF file that `abyssal export` writes of the model, in that precision. Theirs is their C interface: all
prompts in one batch, then a step of one token for every sequence and the likeliest taken, in the fastest of its
settings (flash attention on and off, its cache in F16 and F32), tried first. Ours is `Engine.generate`. The same
prompts, greedy answers of fixed length, threads; new tokens per second with the prompts' time included, and the median
ratio of pairs run in turn.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from common import append_result, fastest, time_pairs

from abyssal.checkpoint.gguf_write import write_gguf
from abyssal.checkpoint.packaged import packaged_checkpoint
from abyssal.checkpoint.source import open_checkpoint
from abyssal.engine.engine import Engine
from abyssal.lm import load
from abyssal.machine import keep_freed_memory, set_threads
from abyssal.types import SamplingParams

try:
    import llama_cpp
except ImportError:
    raise SystemExit(f"llama.cpp is not installed. {__doc__}") from None

DTYPES = {"F32": "float32", "BF16": "bfloat16"}
CACHES = {"F32": 0, "F16": 1}  # ggml's numbers of types
FLASH = {"flash": 1, "plain": 0}  # llama_flash_attn_type


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str = "smollm2"  # dense, of a kind that GGUF describes
    batches: tuple[int, ...] = (1, 4, 16, 64)
    precisions: tuple[Literal["F32", "BF16"], ...] = ("F32", "BF16")
    prompt_len: int = 32
    new_tokens: int = 64
    pairs: int = 5
    threads: int = 2
    save: bool = True  # append the results to results/llama_cpp.jsonl


class LlamaCpp:
    """A model and a context of theirs for `batch` sequences."""

    def __init__(self, model: Any, *, batch: int, length: int, threads: int, flash: int, cache: int) -> None:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = batch * (-(-length // 256) * 256), batch
        settings.n_batch, settings.n_ubatch = max(batch * length, 512), 512
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type, settings.type_k, settings.type_v = flash, cache, cache
        self._context = llama_cpp.llama_init_from_model(model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp refuses flash_attn_type={flash} with a cache of ggml type {cache}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(batch * length, 0, 1)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)

    def answers(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Greedy answers of `new_tokens` each."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        drawn = self._step([(row, i, token) for row, prompt in enumerate(prompts) for i, token in enumerate(prompt)])
        answers = [[token] for token in drawn]
        for n in range(1, new_tokens):
            drawn = self._step([(row, len(prompts[row]) + n - 1, token) for row, token in enumerate(drawn)])
            for answer, token in zip(answers, drawn, strict=True):
                answer.append(token)
        return answers

    def _step(self, entries: list[tuple[int, int, int]]) -> list[int]:
        """The likeliest next id of each sequence. Entries are (sequence, position, id), sequence by sequence."""
        batch, last = self._batch, []
        batch.n_tokens = len(entries)
        for i, (row, position, token) in enumerate(entries):
            ends = i + 1 == len(entries) or entries[i + 1][0] != row
            batch.token[i], batch.pos[i], batch.seq_id[i][0], batch.n_seq_id[i] = token, position, row, 1
            batch.logits[i] = ends
            if ends:
                last.append(i)
        if status := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status} for {len(entries)} tokens")
        return [int(np.argmax(self._logits(i))) for i in last]

    def _logits(self, i: int) -> np.ndarray[Any, Any]:
        pointer = llama_cpp.llama_get_logits_ith(self._context, i)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), shape=(self._vocab_size,))


def load_theirs(file: Path) -> Any:
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp does not load {file}")
    return model


def measure(file: Path, precision: str, batch: int, options: Options) -> dict[str, Any]:
    lm = load(file, dtype=DTYPES[precision])
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(lm.tokenizer.vocab_size, (batch, options.prompt_len), generator=generator).tolist()
    engine = Engine(lm.model, eos_ids=(), max_batch=batch, record_experts=False)
    params = SamplingParams(temperature=0.0, max_tokens=options.new_tokens)
    their_model, length = load_theirs(file), options.prompt_len + options.new_tokens

    def theirs(setting: str, new_tokens: int) -> Callable[[], list[list[int]]]:
        flash, cache = setting.split("+")
        one = LlamaCpp(
            their_model, batch=batch, length=length, threads=options.threads, flash=FLASH[flash], cache=CACHES[cache]
        )
        opened.append(one)
        return lambda: one.answers(prompts, new_tokens)

    opened: list[LlamaCpp] = []
    settings = [f"{flash}+{cache}" for flash, cache in itertools.product(FLASH, CACHES)]
    setting = fastest({each: theirs(each, 8) for each in settings}, repeats=1, who="llama.cpp")
    their_work = theirs(setting, options.new_tokens)

    def our_work() -> list[list[int]]:
        return [completion.ids for completion in engine.generate(prompts, params)]

    same = [a == b for x, y in zip(our_work(), their_work(), strict=True) for a, b in zip(x, y, strict=True)]
    paired = time_pairs(our_work, their_work, n_pairs=options.pairs, n_tokens=batch * options.new_tokens)
    for one in opened:
        one.close()
    llama_cpp.llama_model_free(their_model)
    return {
        "model": options.model, "precision": precision, "batch": batch, "prompt_len": options.prompt_len,
        "new_tokens": options.new_tokens, "llama_cpp_python": llama_cpp.__version__, "theirs_setting": setting,
        "same_tokens": sum(same) / len(same), "pairs": options.pairs, "ours_tokens_per_s": paired.ours,
        "theirs_tokens_per_s": paired.theirs, "ratio": paired.ratio, "ratio_min": paired.spread[0],
        "ratio_max": paired.spread[1],
    }  # fmt: skip


def main(options: Options) -> None:
    set_threads(options.threads)
    keep_freed_memory()
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    source = open_checkpoint(packaged_checkpoint(options.model, say=print))
    with tempfile.TemporaryDirectory() as folder:
        for precision in options.precisions:
            file = Path(folder) / f"{precision}.gguf"
            write_gguf(source, file, quant=precision)
            for batch in options.batches:
                row = measure(file, precision, batch, options)
                gc.collect()
                ours, theirs = (statistics.median(row[f"{who}_tokens_per_s"]) for who in ("ours", "theirs"))
                print(
                    f"{options.model} {precision}, {batch:2} requests: {ours:6.1f} and {theirs:6.1f} tokens/s, ratio "
                    f"{row['ratio']:.2f} ({row['ratio_min']:.2f}..{row['ratio_max']:.2f}), same tokens "
                    f"{100 * row['same_tokens']:.0f} %, theirs {row['theirs_setting']}",
                    flush=True,
                )
                if options.save:
                    append_result("llama_cpp", row)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
