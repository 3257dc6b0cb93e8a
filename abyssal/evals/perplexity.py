"""Perplexity: how well a model foresees a text, in windows that are the same for every model with the same tokenizer.

Owns the windows and the held-out text that they come from unless another is given: the language reference that lies in
every Python installation (`pydoc_data.topics`), 465,000 characters that no stage of ours trains on, for corpora leave
out files of its size.
Letters: W windows, T tokens of one.
"""

from __future__ import annotations

import math
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from abyssal.data.corpus import documentation
from abyssal.loss.cross_entropy import token_logprobs
from abyssal.model.transformer import Transformer
from abyssal.tokens.tokenizer import Tokenizer

CALIBRATION = ("argparse.py", "difflib.py", "statistics.py", "typing.py", "random.py", "shutil.py", "subprocess.py")
MOST_CHARS_A_TOKEN = 20  # on average; a text is read no further than its windows can reach


class Perplexity(NamedTuple):
    """`loss` is the mean over `n_tokens` of -log p, in nats; perplexity is its exponential."""

    perplexity: float
    loss: float
    n_tokens: int
    tokens_per_s: float


def held_out_text() -> str:
    """Prose about Python with grammar and examples in it, the same under the same version of Python."""
    from pydoc_data.topics import topics  # half a megabyte that only this wants

    return "\n\n".join(topics[name] for name in sorted(topics))


def calibration_text() -> str:
    """Other prose about Python, for looking at a model before it is rounded: docstrings of some of its modules."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join(documentation((folder / name).read_text(encoding="utf-8")) for name in CALIBRATION)


def cut_windows(text: str, tokenizer: Tokenizer, *, length: int, most: int) -> Tensor:
    """(W, T) ids from the text's beginning, each window starting with the begin token where the model is used to it.

    What does not fill a window is left out.
    """
    begin = [tokenizer.bos_id] if tokenizer.adds_bos else []
    step = length - len(begin)
    if step < 2:
        raise ValueError(f"windows of {length} tokens foresee nothing; use 16 or more")
    ids = tokenizer.encode(text[: most * step * MOST_CHARS_A_TOKEN])
    n_windows = min(most, len(ids) // step)
    if n_windows < 1:
        raise ValueError(f"a text of {len(ids)} tokens fills no window of {length}; use shorter ones or more text")
    return torch.tensor([begin + ids[w * step : (w + 1) * step] for w in range(n_windows)])


@torch.inference_mode()
def perplexity(
    model: Transformer, windows_WT: Tensor, *, on_window: Callable[[int], None] = lambda n_done: None
) -> Perplexity:
    """Of every token but each window's first, given those before it in the window."""
    device = model.embed_tokens.weight.device
    model = model.inference_copy()
    began = time.perf_counter()
    total = 0.0
    for n_done, ids_T in enumerate(windows_WT.to(device), start=1):
        logits_TV = model.logits(model.hidden(ids_T[None]))[0]
        total -= float(token_logprobs(logits_TV[:-1], ids_T[1:]).double().sum())
        on_window(n_done)
    n_tokens = windows_WT[:, 1:].numel()
    loss = total / n_tokens
    if not math.isfinite(loss):
        raise FloatingPointError("the loss is no number: the weights overflow or hold NaN; load another checkpoint")
    return Perplexity(math.exp(loss), loss, n_tokens, n_tokens / (time.perf_counter() - began))
