"""Any model as a start: a checkpoint of somebody else's, of any format, becomes the base of a run.

Its vocabulary is kept, and what the chat template needs and it lacks (<think>, turn marks) is added at its end, with
rows of their own in the tables. A vocabulary with ChatML's marks keeps ChatML. Owns what is added and how its rows
begin. Does not own reading the checkpoint (checkpoint/) nor the template (tokens/chat.py).
Letters: V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from abyssal.checkpoint.load import load_checkpoint, load_config
from abyssal.checkpoint.packaged import packaged_checkpoint
from abyssal.checkpoint.source import open_checkpoint
from abyssal.model.rope import rope_frequencies
from abyssal.model.transformer import Transformer
from abyssal.tokens.bpe import ASSISTANT, CHATML_END, END_THINK, THINK, USER
from abyssal.tokens.tokenizer import Tokenizer

TABLES = ("embed_tokens.weight", "lm_head.weight")
# an answer is compared as text, so text has to come back as it went in
ROUND_TRIP = ("a b", " Two  blanks,\n\tthen a line", "4+3*2-1 = 0", "所以 é")


def foreign_tokenizer(directory: Path, *, say: Callable[[str], None]) -> Tokenizer:
    """Its tokenizer, completed. What was added is said aloud, in one line."""
    path = packaged_checkpoint(directory, say=say)
    load_config(path)  # a model that cannot be loaded later is refused before any work
    found = their_tokenizer(path)
    for text in ROUND_TRIP:
        if found.decode(found.encode(text)) != text:
            raise ValueError(
                f"{path}: its tokenizer turns {text!r} into {found.decode(found.encode(text))!r}, so answers could not "
                f"be compared as text; start from a model whose tokenizer keeps text as it is (byte-level BPE)"
            )
    eos = found.named("eos_token") or (CHATML_END if found.is_chatml else None)
    if eos is None:
        raise ValueError(f"{path} names no end token; write eos_token into its tokenizer_config.json")
    turn_marks = () if found.is_chatml else (USER, ASSISTANT)
    eos = CHATML_END if found.is_chatml else eos  # what ends an answer there, whatever ends a text
    bos, pad = (found.named(key) or eos for key in ("bos_token", "pad_token"))
    known = set(found.control_names)
    tokenizer = found.with_control(
        [name for name in dict.fromkeys((bos, eos, pad, *turn_marks, THINK, END_THINK)) if name not in known],
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
    )
    added = [name for name in tokenizer.control_names if tokenizer.token_id(name) >= found.vocab_size]
    marks = "ChatML" if tokenizer.is_chatml else "DeepSeek's turn marks"
    new = f"added {' '.join(added)} with rows of their own" if added else "nothing was added"
    no_fim = "" if tokenizer.has_fim else "; no fill-in-the-middle, for which it has no marks"
    say(f"tokenizer of {directory}: {found.vocab_size} ids, {marks}, ends answers with {eos}; {new}{no_fim}")
    return tokenizer


def their_tokenizer(path: Path) -> Tokenizer:
    found = open_checkpoint(path).tokenizer()
    if found is None:
        raise FileNotFoundError(f"{path} has no tokenizer.json: copy the model's tokenizer files into it")
    return found


def foreign_model(directory: Path, tokenizer: Tokenizer, *, dtype: str, device: torch.device) -> Transformer:
    """Its model, with a row for every id of `tokenizer`, the completed one."""
    path = packaged_checkpoint(directory, say=lambda _: None)  # fetched when its tokenizer was asked for
    model, before = load_checkpoint(path, dtype=dtype, device=device).model, their_tokenizer(path)
    n_before = before.vocab_size
    if n_before > model.config.vocab_size:
        raise ValueError(
            f"{directory}: its tokenizer has {n_before} ids and its model rows for {model.config.vocab_size}; "
            f"copy the tokenizer that belongs to the model"
        )
    spelled = {tokenizer.token_id(name): before.encode(name) for name in tokenizer.control_names}
    return with_rows(model, n_known=n_before, spelled=[spelled[i] for i in range(n_before, tokenizer.vocab_size)])


@torch.no_grad()
def with_rows(model: Transformer, *, n_known: int, spelled: list[list[int]]) -> Transformer:
    """The same model with a row for each of the new ids, which follow the `n_known` old ones.

    `spelled` are the old ids of each one's spelling, such as those of "<", "think" and ">": its row begins as their
    mean. The mean of all rows would mean nothing, and SFT would have to raise it above every other token first.
    """
    if not spelled:
        return model
    n_ids = n_known + len(spelled)
    state = model.state_dict()
    n_rows = max(n_ids, model.config.vocab_size)
    config = replace(model.config, vocab_size=n_rows)
    for name in TABLES:
        if name in state:
            state[name] = grown(state[name], n_known=n_known, spelled=spelled, n_rows=n_rows)
    with torch.device("meta"):
        larger = Transformer(config, dtype=model.dtype)
    larger.load_state_dict(state, assign=True)
    larger.rope_frequencies = rope_frequencies(config).to(model.rope_frequencies.device)
    return larger.requires_grad_(True)


def grown(table_VD: Tensor, *, n_known: int, spelled: list[list[int]], n_rows: int) -> Tensor:
    out_VD = table_VD.new_zeros(n_rows, table_VD.shape[1])
    out_VD[: len(table_VD)] = table_VD
    for row, ids in enumerate(spelled, start=n_known):
        out_VD[row] = table_VD[ids].mean(0)
    return out_VD
