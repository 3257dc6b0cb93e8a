"""Text to ids and back, and the tokenizer files of a checkpoint directory.

Owns the promise that no text ever becomes a control token. Does not own where control tokens go: chat.py inserts them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from abyssal.tokens.bpe import (
    ASSISTANT,
    BOS,
    CHATML_END,
    CHATML_START,
    END_THINK,
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    PAD,
    THINK,
    USER,
)
from abyssal.tokens.chat import chat_template


class Tokenizer:
    """A byte-level BPE with control tokens that only `token_id` can name."""

    def __init__(self, backend: tokenizers.Tokenizer, *, config: dict[str, Any] | None = None) -> None:
        """`config` is the content of tokenizer_config.json; without it DeepSeek's names are taken."""
        self._backend = backend  # as it is saved: the flags other libraries read
        self._config = dict(config or {})
        added = backend.get_added_tokens_decoder()
        self._control = {token.content: i for i, token in added.items()}
        self._control_ids = frozenset(added)
        self._plain = _treating_control_as_text(backend)
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Read tokenizer.json, and tokenizer_config.json where there is one."""
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; name the directory of a checkpoint or of a trained tokenizer")
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises a bare Exception for anything it cannot read
            raise ValueError(f"{path} is not a tokenizer file ({error}); copy or train it again") from None
        config_path = path.with_name("tokenizer_config.json")
        if not config_path.is_file():
            return cls(backend)
        try:
            return cls(backend, config=json.loads(config_path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ValueError(f"{config_path} is not JSON ({error}); copy or train it again") from None

    def save(self, directory: str | os.PathLike[str], *, model_max_length: int | None = None) -> None:
        """Write the two files, each whole or not at all; `transformers.AutoTokenizer` loads the directory.

        Beside a config.json of type qwen2, though, transformers 5 puts Qwen's own pre-tokenizer in place of ours.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,  # documents are packed with the end token only, so plain text starts without bos
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            **self._config,
        }
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        if USER in self._control or self.is_chatml:
            config["chat_template"] = chat_template(chatml=self.is_chatml)
        _write_whole(directory / "tokenizer.json", self._backend.to_str(pretty=True))
        _write_whole(directory / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")

    def with_control(self, names: Sequence[str], **config: str) -> Tokenizer:
        """A copy that has these control tokens too, at the end where it did not know them, and this configuration."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.add_tokens([tokenizers.AddedToken(name, normalized=False, special=False) for name in names])
        return Tokenizer(backend, config=config)

    def encode(self, text: str) -> list[int]:
        """Text to ids, never to a control token: of "a<think>" the ids of a, <think and >."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        try:
            encodings = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:  # what the library says of a string that has no UTF-8 form
            for text in texts:
                _check_utf8(text)
            raise
        all_ids: list[list[int]] = [encoding.ids for encoding in encodings]
        assert all(self._control_ids.isdisjoint(ids) for ids in all_ids), "text became a control token"
        return all_ids

    def decode(self, ids: list[int], *, skip_special: bool = False) -> str:
        """Ids to text. Control tokens appear as they are spelled, or not at all with `skip_special`."""
        if skip_special:
            ids = [i for i in ids if i not in self._control_ids]
        return self._plain.decode(ids, skip_special_tokens=False)

    def token_id(self, name: str) -> int:
        """The id of a control token."""
        if name not in self._control:
            raise ValueError(f"this tokenizer has no control token {name!r}; use a DeepSeek one or train one")
        return self._control[name]

    @property
    def control_ids(self) -> frozenset[int]:
        """All ids that no text can become."""
        return self._control_ids

    @property
    def control_names(self) -> list[str]:
        """As they are spelled."""
        return list(self._control)

    @property
    def is_chatml(self) -> bool:
        """Whether turns are marked as in ChatML, because the vocabulary has those marks and not DeepSeek's."""
        return USER not in self._control and {CHATML_START, CHATML_END} <= self._control.keys()

    @property
    def has_fim(self) -> bool:
        """Whether documents can be cut for fill-in-the-middle."""
        return {FIM_BEGIN, FIM_HOLE, FIM_END} <= self._control.keys()

    @property
    def bos_id(self) -> int:
        return self.token_id(self._configured("bos_token", BOS))

    @property
    def adds_bos(self) -> bool:
        """Did plain text begin with the begin token in pretraining? In our own it did not."""
        return bool(self._config.get("add_bos_token", False))

    @property
    def eos_id(self) -> int:
        return self.token_id(self._configured("eos_token", EOS))

    @property
    def pad_id(self) -> int:
        return self.token_id(self._configured("pad_token", PAD))

    @property
    def think_id(self) -> int:
        return self.token_id(THINK)

    @property
    def end_think_id(self) -> int:
        return self.token_id(END_THINK)

    @property
    def user_id(self) -> int:
        return self.token_id(USER)

    @property
    def assistant_id(self) -> int:
        return self.token_id(ASSISTANT)

    @property
    def fim_begin_id(self) -> int:
        return self.token_id(FIM_BEGIN)

    @property
    def fim_hole_id(self) -> int:
        return self.token_id(FIM_HOLE)

    @property
    def fim_end_id(self) -> int:
        return self.token_id(FIM_END)

    def _configured(self, key: str, default: str) -> str:
        named = self._config.get(key) or default
        return named["content"] if isinstance(named, dict) else named  # older files spell a token out as a dict


def _check_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text with half a surrogate pair at {error.start}; write the whole character") from None


def _treating_control_as_text(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that never matches a control token in its input; the library spares only those marked special."""
    spec = json.loads(backend.to_str())
    for token in spec["added_tokens"]:
        token["special"] = True
    plain = tokenizers.Tokenizer.from_str(json.dumps(spec))
    plain.no_truncation()  # some published files carry a limit, which would cut text without a word
    plain.no_padding()
    plain.encode_special_tokens = True
    return plain


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}; free some space and run again") from None
