"""The tokenizer inside a GGUF file <-> ours: tokens, their kinds, merges and roles. How text is cut is gguf_cuts.py's.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import tokenizers
from gguf import TokenType
from tokenizers import AddedToken, decoders, models, processors

from abyssal.checkpoint.gguf_cuts import apply_cut, cut_named, name_of_cut
from abyssal.tokens.tokenizer import Tokenizer

KEY, TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"
CONTROL = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
# GGUF's name of a role -> that of tokenizer_config.json
ROLES = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
MARKS = (("<|", "|>"), ("<｜", "｜>"))  # a token between these is never text, whatever its flags say


def tokenizer_from_gguf(metadata: dict[str, Any]) -> Tokenizer | None:
    """None when the file has no vocabulary; a ValueError when it has one that we cannot read exactly."""
    model = metadata.get(f"{KEY}model", "no_vocab")
    if model in ("no_vocab", "none"):
        return None
    if model != "gpt2":
        raise ValueError(f"{KEY}model={_short(model)} is not supported; gpt2, byte-level BPE, is")
    cut = cut_named(_need(metadata, "pre", str))
    tokens: list[str] = _need(metadata, "tokens", list)
    kinds = _kinds(metadata, len(tokens))
    merges = [tuple(merge.split(" ")) for merge in _need(metadata, "merges", list)]
    if not all(len(merge) == 2 and all(merge) for merge in merges):
        raise ValueError(f"{KEY}merges holds something that is no pair")
    vocab = {token: i for i, token in enumerate(tokens) if kinds[i] != TokenType.UNUSED}
    if len(vocab) + kinds.count(TokenType.UNUSED) != len(tokens):
        raise ValueError(f"{KEY}tokens has one token twice")
    roles = {name: _role(metadata, role, tokens) for role, name in ROLES.items()}
    eos = roles["eos_token"]
    if eos is None:
        raise ValueError(f"the metadata lacks {KEY}eos_token_id")
    roles |= {name: roles[name] or eos for name in ("bos_token", "pad_token")}

    backend = tokenizers.Tokenizer(_bpe(vocab, merges, ignore_merges=cut.ignore_merges))
    apply_cut(cut, backend)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    written = _written(backend, vocab, merges, ignore_merges=cut.ignore_merges)
    control = {token: kinds[i] != TokenType.USER_DEFINED for token, i in vocab.items() if kinds[i] in CONTROL}
    # a user-defined token that text leads to anyway is an ordinary one, kept whole by other readers
    control = {token: special for token, special in control.items() if special or token not in written}
    control |= {token: True for token in roles.values() if token is not None}
    for token in sorted(control.keys() & written):
        raise ValueError(f"{KEY}tokens: text can become the control token {token[:40]!r}")
    backend.add_tokens([AddedToken(token, normalized=False, special=special) for token, special in control.items()])
    config: dict[str, Any] = {name: token for name, token in roles.items() if token is not None}
    config["add_bos_token"] = bool(metadata.get(f"{KEY}add_bos_token", cut.adds_bos))
    if isinstance(metadata.get(TEMPLATE), str):
        config["chat_template"] = metadata[TEMPLATE]
    return Tokenizer(backend, config=config)


def tokenizer_to_gguf(tokenizer: Tokenizer, n_rows: int) -> dict[str, Any]:
    """Metadata for a model with `n_rows` rows of embeddings; rows without a token get one that says so."""
    backend = tokenizer.backend
    spec = json.loads(backend.to_str())
    if spec["model"]["type"] != "BPE" or spec["model"].get("byte_fallback"):
        raise ValueError(f"a tokenizer of type {spec['model']['type']} has no place in GGUF here; byte-level BPE has")
    if tokenizer.vocab_size > n_rows:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids and the model rows for {n_rows}")
    tokens = [f"[PAD{i}]" for i in range(n_rows)]
    kinds = [TokenType.UNUSED] * n_rows
    for token, i in backend.get_vocab(with_added_tokens=True).items():
        tokens[i], kinds[i] = token, TokenType.NORMAL
    for index, added in backend.get_added_tokens_decoder().items():
        marked = any(added.content.startswith(start) and added.content.endswith(end) for start, end in MARKS)
        kinds[index] = TokenType.CONTROL if added.special or marked else TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    metadata: dict[str, Any] = {
        f"{KEY}model": "gpt2",
        f"{KEY}pre": name_of_cut(backend),
        f"{KEY}tokens": tokens,
        f"{KEY}token_type": [int(kind) for kind in kinds],
        f"{KEY}merges": merges,
        f"{KEY}add_bos_token": tokenizer.adds_bos,
    }
    for role, name in ROLES.items():
        if (of_role := tokenizer.role_id(name)) is not None:
            metadata[f"{KEY}{role}_token_id"] = of_role
    template = tokenizer.template
    return metadata if template is None else metadata | {TEMPLATE: template}


def _bpe(vocab: dict[str, int], merges: list[tuple[str, ...]], *, ignore_merges: bool) -> models.BPE:
    try:
        return models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges)  # type: ignore[arg-type]
    except BaseException as error:  # a bare Exception for a merge of unknown tokens, a panic for the rest
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise ValueError(f"{KEY}merges do not fit {KEY}tokens ({error})") from None


def _written(
    backend: tokenizers.Tokenizer, vocab: dict[str, int], merges: list[tuple[str, ...]], *, ignore_merges: bool
) -> set[str]:
    """Tokens that text can become, by merges or, where whole pieces are looked up, at once."""
    written = {left + right for left, right in merges} | {token for token in vocab if len(token) == 1}
    if ignore_merges:
        cut = backend.pre_tokenizer
        assert cut is not None
        written |= {token for token in vocab if len(cut.pre_tokenize_str(token)) == 1 and token.isascii()}
    return written


def _kinds(metadata: dict[str, Any], n_tokens: int) -> list[int]:
    kinds = metadata.get(f"{KEY}token_type")
    if kinds is None:
        return [int(TokenType.NORMAL)] * n_tokens
    if not isinstance(kinds, np.ndarray) or kinds.dtype.kind not in "iu" or len(kinds) != n_tokens:
        raise ValueError(f"{KEY}token_type does not hold one number for each of {n_tokens} tokens")
    return kinds.tolist()


def _role(metadata: dict[str, Any], role: str, tokens: list[str]) -> str | None:
    i = metadata.get(f"{KEY}{role}_token_id")
    if i is None:
        return None
    if not isinstance(i, int) or not 0 <= i < len(tokens):
        raise ValueError(f"{KEY}{role}_token_id={_short(i)} is none of {len(tokens)} tokens")
    return tokens[i]


def _need(metadata: dict[str, Any], key: str, kind: type) -> Any:
    value = metadata.get(f"{KEY}{key}")
    if not isinstance(value, kind):
        raise ValueError(f"the metadata lacks {KEY}{key}, or it is of the wrong type")
    return value


def _short(value: Any) -> str:
    return repr(value)[:40]
