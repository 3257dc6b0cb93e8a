"""Text to ids and back, for any tokenizer.json there is.

No text ever becomes a control token (plain_text.py), unless the caller asks for just that (`allow_control`). Does not
own where control tokens go: chat.py inserts them.
"""

from __future__ import annotations

import functools
import hashlib
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
from abyssal.tokens.pieces import Dialect
from abyssal.tokens.plain_text import PlainText, encoded, unlimited
from abyssal.tokens.recognise import dialect_of, marked, template_of
from abyssal.tokens.token_bytes import token_bytes
from abyssal.tokens.tokenizer_files import ROLES, read_backend, read_config, template_text, token_name, write_whole


class Tokenizer:
    """A vocabulary with control tokens that only `token_id` can name."""

    def __init__(self, backend: tokenizers.Tokenizer, *, config: dict[str, Any] | None = None) -> None:
        """`config` is the content of tokenizer_config.json; without it DeepSeek's names are taken."""
        self._backend = backend  # as it is saved: the flags other libraries read
        self._config = dict(config or {})
        spec = json.loads(backend.to_str())
        self._decoder = spec["decoder"]
        self._text = PlainText(spec, roles={self.named(role) for role in ROLES})
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Read tokenizer.json, and what the files beside it say of its tokens."""
        path = Path(directory)
        return cls(read_backend(path / "tokenizer.json"), config=read_config(path))

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
            **{role: name for role, name in zip(ROLES, (BOS, EOS, PAD), strict=True) if name in self._text.control},
            **self._config,
        }
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        if self.template is not None:
            config.setdefault("chat_template", self.template)
        write_whole(directory / "tokenizer.json", self._backend.to_str(pretty=True))
        write_whole(directory / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")

    def with_control(self, names: Sequence[str], **config: str) -> Tokenizer:
        """A copy that has these control tokens too, at the end where it did not know them, and this configuration."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.add_tokens([tokenizers.AddedToken(name, normalized=False, special=False) for name in names])
        return Tokenizer(backend, config=config)

    def encode(self, text: str, *, allow_control: bool = False) -> list[int]:
        """Text to ids, never to a control token: of "a<think>" the ids of a, <think and >.

        `allow_control` is for text that its author may steer with, such as a raw prompt of one's own: there what spells
        a control token becomes one, as in other libraries.
        """
        return self.encode_batch([text], allow_control=allow_control)[0]

    def encode_after(self, text: str) -> list[int]:
        """`encode` of text that stands behind other tokens. Another thing only where a vocabulary marks the first word
        of a text (Llama 2): there it is not marked again."""
        return self._text.encode([text], behind=True)[0]

    def encode_batch(self, texts: list[str], *, allow_control: bool = False) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        if allow_control:
            return encoded(self._open, texts)
        return self._text.encode(texts)

    def decode(self, ids: list[int], *, skip_special: bool = False) -> str:
        """Ids to text. Control tokens appear as they are spelled, or not at all with `skip_special`."""
        if skip_special:
            ids = [i for i in ids if i not in self.control_ids]
        return self._text.decode(ids)

    def token_id(self, name: str) -> int:
        """The id of a control token."""
        if name not in self._text.control:
            raise ValueError(f"this tokenizer has no control token {name!r}; use a DeepSeek one or train one")
        return self._text.control[name]

    def find(self, name: str) -> int | None:
        """The id of a control token, or None where there is no such token."""
        return self._text.control.get(name)

    def named(self, role: str) -> str | None:
        """The token that the files give a role: bos_token, eos_token, pad_token, unk_token."""
        return token_name(self._config.get(role))

    def role_id(self, role: str) -> int | None:
        """The id of the token with a role, in DeepSeek's spelling where the files name none; None without one."""
        default = dict(zip(ROLES, (BOS, EOS, PAD), strict=True)).get(role, "")
        return self.find(self.named(role) or default)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """As it is saved, for formats other than tokenizer.json. It reads control tokens in any text."""
        return self._backend

    @property
    def fingerprint(self) -> str:
        """Names what text becomes which ids."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    @functools.cached_property
    def template(self) -> str | None:
        """The chat template as Jinja, for other libraries: that of the files, else the one that the marks stand for."""
        return template_text(self._config.get("chat_template")) or template_of(marked(set(self._text.control)))

    @functools.cached_property
    def dialect(self) -> Dialect:
        """How conversations are written for the model that this tokenizer belongs to: read from its files."""
        special = {role: self._name_of(i) for role in (*ROLES, "unk_token") if (i := self.role_id(role)) is not None}
        template = template_text(self._config.get("chat_template"))
        found = dialect_of(template, special=special, control=self.control_names)
        if found is None:
            raise ValueError(
                "this tokenizer has no chat template and no marks for turns; write chat_template into its "
                "tokenizer_config.json, or continue plain text"
            )
        return found

    @functools.cached_property
    def end_ids(self) -> frozenset[int]:
        """What ends an answer: the end token, and what the dialect ends turns with."""
        ends = self.dialect.ends if self.speaks else ()
        return frozenset({self.eos_id, *(self.token_id(name) for name in ends if name in self._text.control)})

    @property
    def speaks(self) -> bool:
        """Whether conversations can be written with it at all."""
        return self.template is not None

    @functools.cached_property
    def bos_name(self) -> str:
        return self._name_of(self.bos_id)

    @functools.cached_property
    def eos_name(self) -> str:
        return self._name_of(self.eos_id)

    @property
    def control_ids(self) -> frozenset[int]:
        """All ids that no text can become."""
        return self._text.control_ids

    @functools.cached_property
    def bytes_of(self) -> list[bytes]:
        """What each id writes, in bytes; nothing for control tokens."""
        return token_bytes(self._backend, self._decoder, n_ids=self.vocab_size, control_ids=self.control_ids)

    @property
    def takes_blanks_before(self) -> set[str]:
        """Control tokens that swallow the blanks before them, as their file says."""
        return self._text.takes_blanks_before

    @property
    def takes_blanks_behind(self) -> set[str]:
        return self._text.takes_blanks_behind

    @property
    def control_names(self) -> list[str]:
        """As they are spelled."""
        return list(self._text.control)

    @property
    def is_chatml(self) -> bool:
        """Whether turns are marked as in ChatML, because the vocabulary has those marks and not DeepSeek's."""
        return USER not in self._text.control and {CHATML_START, CHATML_END} <= self._text.control.keys()

    @property
    def has_fim(self) -> bool:
        """Whether documents can be cut for fill-in-the-middle."""
        return {FIM_BEGIN, FIM_HOLE, FIM_END} <= self._text.control.keys()

    @property
    def has_thinking(self) -> bool:
        """Whether the vocabulary can mark thinking."""
        return {THINK, END_THINK} <= self._text.control.keys()

    @property
    def bos_id(self) -> int:
        """What begins a text; the end token where the files name none."""
        found = self.role_id("bos_token")
        return self.eos_id if found is None else found

    @functools.cached_property
    def adds_bos(self) -> bool:
        """Did plain text begin with the begin token in pretraining? In our own it did not."""
        if "add_bos_token" in self._config:
            return bool(self._config["add_bos_token"])
        return self._backend.encode("a").ids[:1] == [self.bos_id]  # newer files say it in their post-processor

    @property
    def eos_id(self) -> int:
        found = self.role_id("eos_token")
        if found is None:
            name = self.named("eos_token") or EOS
            raise ValueError(f"this tokenizer has no end token {name}; write eos_token into its tokenizer_config.json")
        return found

    @property
    def pad_id(self) -> int:
        """What fills a row; the end token where the files name none."""
        found = self.role_id("pad_token")
        return self.eos_id if found is None else found

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

    def _name_of(self, token: int) -> str:
        return next(name for name, i in self._text.control.items() if i == token)

    @functools.cached_property
    def _open(self) -> tokenizers.Tokenizer:
        """Reads control tokens wherever they are spelled. Made when first asked for: most never are."""
        return unlimited(tokenizers.Tokenizer.from_str(self._backend.to_str()))
