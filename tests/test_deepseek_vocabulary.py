"""The real DeepSeek vocabulary through our own cuts, ids and template."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tokenizers
from deepseek_files import v3_tokenizer, v4_directory

from abyssal.tokens.bpe import pre_tokenizer
from abyssal.tokens.tokenizer import Tokenizer

# (id, name): facts of the published V3 file; the think marks are left out, since each publication has others
SPECIAL = {
    0: "<｜begin▁of▁sentence｜>", 1: "<｜end▁of▁sentence｜>", 2: "<｜▁pad▁｜>",
    128800: "<｜fim▁hole｜>", 128801: "<｜fim▁begin｜>", 128802: "<｜fim▁end｜>",
    128803: "<｜User｜>", 128804: "<｜Assistant｜>", 128805: "<|EOT|>",
    128806: "<｜tool▁calls▁begin｜>", 128807: "<｜tool▁calls▁end｜>",
    128808: "<｜tool▁call▁begin｜>", 128809: "<｜tool▁call▁end｜>",
    128810: "<｜tool▁outputs▁begin｜>", 128811: "<｜tool▁outputs▁end｜>",
    128812: "<｜tool▁output▁begin｜>", 128813: "<｜tool▁output▁end｜>", 128814: "<｜tool▁sep｜>",
}  # fmt: skip


def mixed_text(n_bytes: int) -> list[str]:
    """Code and English from the standard library, and runs of all that a cut could trip over. The same each time."""
    rng = random.Random(4)

    def run(letters: Sequence[str], longest: int) -> Callable[[], str]:
        return lambda: "".join(rng.choice(letters) for _ in range(rng.randint(1, longest)))

    kinds = [
        run([chr(i) for i in range(0x4E00, 0x9FA6)], 30),  # Chinese
        run([chr(i) for i in range(0x3040, 0x3100)], 30),  # kana
        run([chr(i) for i in range(0xAC00, 0xD7A4)], 9),  # Hangul, which no cut names
        run([chr(i) for i in range(0x21, 0x300)], 20),  # Latin and its signs
        run("0123456789²½Ⅻ٣४。，、！？々〆", 17),
        run(["😀", "👩\u200d👩\u200d👧", "🇨🇳", "❤\ufe0f", "\U0001f9d1\U0001f3fd", "e\u0301", "ﬁ"], 6),
        run(" \t\n\r\x0b\x0c\u00a0\u2003\u3000\u200b\ufeff", 12),
        run([*SPECIAL.values(), "<think>", "</think>", "<｜", "｜>", "▁of▁", "<|EOT", "\x00", "\ufffd"], 1),
        run([".split(x)\n", "don't", "a_b__c", "$x^2$", "C++/C#", "...!!\r\n\r\n", "_日本 ¿qué?\n\n  x"], 1),
    ]
    texts: list[str] = []
    size = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")) * 2:
        if size >= n_bytes * 3 // 4:
            break
        texts.append(path.read_text(encoding="utf-8", errors="replace")[:80_000])
        size += len(texts[-1].encode())
    while size < n_bytes:
        texts.append("".join(rng.choice(kinds)() for _ in range(400)))
        size += len(texts[-1].encode())
    return texts


@pytest.fixture(scope="module")
def v4() -> Tokenizer:
    return Tokenizer.load(v4_directory())


@pytest.mark.parametrize("n_bytes", [500_000, pytest.param(6_000_000, marks=pytest.mark.slow)])
def test_our_cuts_give_the_ids_of_the_published_file(v4: Tokenizer, n_bytes: int):
    backend = tokenizers.Tokenizer.from_file(str(v4_directory() / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizer(single_digits=True)
    assert backend.encode("12345").ids != v4.encode("12345")  # so a cut that differs is seen
    backend.pre_tokenizer = pre_tokenizer()
    texts = mixed_text(n_bytes)
    assert sum(len(text.encode()) for text in texts) >= n_bytes
    got = Tokenizer(backend).encode_batch(texts)
    assert got == v4.encode_batch(texts)
    assert sum(map(len, got)) > n_bytes / 6


@pytest.mark.parametrize("which", ["v3", "v4"])
def test_it_loads_with_its_published_ids_and_every_text_comes_back(which: str, request: pytest.FixtureRequest):
    tokenizer = v3_tokenizer() if which == "v3" else request.getfixturevalue("v4")
    assert {i: name for i, name in SPECIAL.items() if tokenizer.token_id(name) != i} == {}
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert (tokenizer.vocab_size, tokenizer.has_thinking) == ((128815, False) if which == "v3" else (129280, True))
    text = "".join(mixed_text(20_000))
    ids = tokenizer.encode(text)
    assert tokenizer.control_ids.isdisjoint(ids) and tokenizer.decode(ids) == text
