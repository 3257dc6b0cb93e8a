"""How text is cut before it is merged, under the names llama.cpp gives to the ways there are.

GGUF keeps tokens and merges, but of the cut only a name. A name that is not known here is an error: with another cut
the model would read ids it never saw, and nothing would look wrong.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

from abyssal.tokens.bpe import CJK_AND_KANA, DIGITS, GENERAL, SINGLE_DIGITS

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")  # digits one by one
# cased letters as DeepSeek's first tokenizer lists them. Spelled as escapes: editors like to normalise some of these
CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
CJK_AND_MORE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
PUNCTUATION = "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
# marks of ASCII, as DeepSeek's own file spells the class that GENERAL begins with
MARKS_SPELLED_OUT, MARKS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]""", r"[!-/:-@\[-`{-~]"


class Cut(NamedTuple):
    """`patterns` split one after another. `ignore_merges`: a piece that is a token is taken whole. `nfc`: text is
    composed first, which llama.cpp leaves out. `adds_bos` counts where the file itself does not say."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    nfc: bool = False
    adds_bos: bool = False


CUTS = {
    "gpt-2": Cut((GPT2,)),
    "smollm": Cut((SINGLE_DIGITS, GPT2)),
    "llama-bpe": Cut((LLAMA3,), ignore_merges=True, adds_bos=True),
    "qwen2": Cut((QWEN2,), nfc=True),
    "deepseek-r1-qwen": Cut((QWEN2,), nfc=True),
    "deepseek-v3": Cut((DIGITS, CJK_AND_KANA, GENERAL)),
    "deepseek-llm": Cut(
        (r"[\r\n]", rf"\s?[{CASED}]+", rf"\s?{PUNCTUATION}", r"\s+$", CJK_AND_MORE, SINGLE_DIGITS)
    ),
    "default": Cut((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}


def cut_named(name: str) -> Cut:
    if name not in CUTS:
        raise ValueError(f"tokenizer.ggml.pre={name!r} is a cut of text not known here; known are {', '.join(CUTS)}")
    return CUTS[name]


def name_of_cut(backend: tokenizers.Tokenizer) -> str:
    """The name under which llama.cpp cuts text as this tokenizer does."""
    spec = json.loads(backend.to_str())
    found = _patterns(spec["pre_tokenizer"])
    ignore_merges = bool(spec["model"].get("ignore_merges"))
    composes = _composes(spec["normalizer"])
    for name, cut in CUTS.items():
        if (cut.patterns, cut.ignore_merges) == (found, ignore_merges) and composes in (False, cut.nfc):
            return name
    raise ValueError(
        f"how this tokenizer cuts text has no name in GGUF ({json.dumps(spec['pre_tokenizer'])[:120]}); known are "
        f"{', '.join(CUTS)}"
    )


def apply_cut(cut: Cut, backend: tokenizers.Tokenizer) -> None:
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in cut.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    if cut.nfc:
        backend.normalizer = normalizers.NFC()


def _patterns(stage: dict[str, Any] | None) -> tuple[str, ...] | None:
    """What a pre-tokenizer splits by before it turns text into bytes; None when it does anything else."""
    if stage is None:
        return None
    patterns: list[str] = []
    stages = stage["pretokenizers"] if stage["type"] == "Sequence" else [stage]
    *splits, last = stages or [{"type": "none"}]
    for split in splits:
        pattern = _pattern(split)
        if pattern is None:
            return None
        patterns.append(pattern)
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    return (*patterns, GPT2) if last["use_regex"] else tuple(patterns)


def _pattern(split: dict[str, Any]) -> str | None:
    if split["type"] == "Digits":
        return SINGLE_DIGITS if split["individual_digits"] else r"\p{N}+"
    is_plain = split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    if not is_plain or "Regex" not in split["pattern"]:
        return None
    pattern: str = split["pattern"]["Regex"]
    return pattern.replace("\r", r"\r").replace("\n", r"\n").replace(MARKS_SPELLED_OUT, MARKS)


def _composes(normalizer: dict[str, Any] | None) -> bool | None:
    """NFC or nothing; None for anything else."""
    if normalizer is None or normalizer == {"type": "Sequence", "normalizers": []}:
        return False
    return True if normalizer == {"type": "NFC"} else None
