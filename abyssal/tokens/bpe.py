"""Byte-level BPE: how a vocabulary is learned from text, and DeepSeek's rules for cutting text before it is merged.

Owns the names and order of the control tokens and the pre-tokenizer. Does not own encoding (tokenizer.py) or what the
control tokens mean in a conversation (chat.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
THINK, END_THINK = "<think>", "</think>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
CHATML_START, CHATML_END = "<|im_start|>", "<|im_end|>"  # Qwen's and SmolLM's; no vocabulary of ours has them
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
OUTPUTS_BEGIN, OUTPUTS_END = "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"
OUTPUT_BEGIN, OUTPUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
TOOL_SEP = "<｜tool▁sep｜>"
TOOL_TOKENS = (
    CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, OUTPUTS_BEGIN, OUTPUTS_END, OUTPUT_BEGIN, OUTPUT_END, TOOL_SEP,
)  # fmt: skip
CONTROL_TOKENS = (
    BOS, EOS, PAD, THINK, END_THINK, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, *TOOL_TOKENS, "<|EOT|>",
)  # fmt: skip

# "special" is what other libraries drop when they decode with skip_special_tokens. As in DeepSeek's own file only the
# sentence marks are: a dropped <think> would run the thinking into the answer.
DROPPED_WHEN_DECODED = (BOS, EOS, PAD)

DIGITS = r"\p{N}{1,3}"
SINGLE_DIGITS = r"\p{N}"
CJK_AND_KANA = "[一-龥぀-ゟ゠-ヿ]+"
GENERAL = "|".join(
    (
        r"[!-/:-@\[-`{-~][A-Za-z]+",  # one ASCII punctuation mark with the ASCII word behind it: .split, _name
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",  # a word, with the space (or other blank) before it
        r" ?[\p{P}\p{S}]+[\r\n]*",  # punctuation, with a space before and the newlines behind it
        r"\s*[\r\n]+",  # blank lines and the indentation before them
        r"\s+(?!\S)",  # trailing blanks; the last blank before a word stays with the word
        r"\s+",
    )
)


def pre_tokenizer(*, single_digits: bool = False) -> pre_tokenizers.PreTokenizer:
    """The three cuts one after another, then bytes as printable characters. "a 12345" -> a, Ġ, 123, 45."""
    digits = SINGLE_DIGITS if single_digits else DIGITS
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in (digits, CJK_AND_KANA, GENERAL)]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train_bpe(texts: Iterable[str], *, vocab_size: int, single_digits: bool = True) -> tokenizers.Tokenizer:
    """Learn merges from `texts`; control tokens take the first ids, the 256 bytes the next.

    With `single_digits` no token of several digits is learned, so a number is always read digit by digit; the tokenizer
    that is returned cuts as DeepSeek's does either way. Text with few distinct words ends with fewer than `vocab_size`.
    """
    smallest = len(CONTROL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} has no room for control tokens and bytes; use at least {smallest}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer(single_digits=single_digits)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(name, normalized=False, special=True) for name in CONTROL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    backend.pre_tokenizer = pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)

    spec = json.loads(backend.to_str())  # the trainer marks every control token special, and has no option for it
    for token in spec["added_tokens"]:
        token["special"] = token["content"] in DROPPED_WHEN_DECODED
    return tokenizers.Tokenizer.from_str(json.dumps(spec))
