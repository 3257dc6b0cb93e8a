import pytest

from abyssal.tokens.bpe import CONTROL_TOKENS, pre_tokenizer, train_bpe

TEXT = ["def add(x, y):\n    return x + y\n", "12 + 345 = 357, so 12 and 345", "深度求索 means deep seeking"] * 20


def cut(text: str) -> list[str]:
    """The pieces as text; the library shows bytes as characters, so they are taken from the original by offset."""
    return [text[start:end] for _, (start, end) in pre_tokenizer().pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("in 12345 days", ["in", " ", "123", "45", " days"]),
        ("x²=1", ["x", "²", "=", "1"]),
        ("我爱 Python 語言", ["我爱", " Python", " ", "語言"]),
        ("ひらがなカナ漢字", ["ひらがなカナ漢字"]),
        ("a.split(_name)", ["a", ".split", "(_", "name", ")"]),
        ("if x:\n\n    y", ["if", " x", ":\n\n", "   ", " y"]),
        ("wait ... what?!\r\nYes", ["wait", " ...", " what", "?!\r\n", "Yes"]),
        ("end   ", ["end", "   "]),
        ("  \n  next", ["  \n", " ", " next"]),
        ("cafe\u0301 £5", ["cafe\u0301", " £", "5"]),
        ("don't", ["don", "'t"]),
        ("~tilde /path @home `code", ["~tilde", " /", "path", " @", "home", " `", "code"]),
    ],
)
def test_text_is_cut_as_deepseek_cuts_it(text, pieces):
    assert cut(text) == pieces


def test_control_tokens_take_the_first_ids_and_the_bytes_the_next():
    backend = train_bpe(TEXT, vocab_size=320)
    assert [backend.id_to_token(i) for i in range(len(CONTROL_TOKENS))] == list(CONTROL_TOKENS)
    assert CONTROL_TOKENS[:3] == ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
    after = len(CONTROL_TOKENS)
    assert all(len(backend.id_to_token(i)) == 1 for i in range(after, after + 256))


def test_numbers_are_read_digit_by_digit_unless_asked_otherwise():
    text = ["12345 12345"] * 50
    assert train_bpe(text, vocab_size=400).encode("12345").tokens == ["1", "2", "3", "4", "5"]
    assert train_bpe(text, vocab_size=400, single_digits=False).encode("12345").tokens == ["123", "45"]


def test_both_ways_of_training_save_the_same_three_cuts():
    one, other = (train_bpe(TEXT, vocab_size=300, single_digits=single) for single in (True, False))
    want = [piece for piece, _ in pre_tokenizer().pre_tokenize_str("a 12345")]
    for backend in (one, other):
        assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("a 12345")] == want


def test_training_twice_gives_the_same_file():
    assert train_bpe(TEXT, vocab_size=330).to_str() == train_bpe(iter(TEXT), vocab_size=330).to_str()


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size=100 .* at least 276"):
        train_bpe(TEXT, vocab_size=100)
