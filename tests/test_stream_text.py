"""Text that comes in pieces is the text of the whole, and shows nothing of a stop string, however it is cut."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.engine.stop_strings import StopStrings
from abyssal.engine.stream_text import StreamText, text_of
from abyssal.engine.vocabulary import Vocabulary

CONTROL, THINK, END_THINK = 256, 257, 258


def vocabulary(more: list[bytes]) -> Vocabulary:
    """256 bytes, three control tokens, and longer tokens."""
    return Vocabulary(
        bytes_of=[*(bytes([i]) for i in range(256)), b"", b"", b"", *more],
        end_ids=frozenset({CONTROL}),
        control_ids=frozenset({CONTROL, THINK, END_THINK}),
        think_id=THINK,
        end_think_id=END_THINK,
    )


def first_stop(written: bytes, stop: tuple[str, ...]) -> tuple[str, int] | None:
    """The plain twin: the string that ends first, of those the longest, and where it begins."""
    for end in range(len(written) + 1):
        there = [string for string in stop if written[:end].endswith(string.encode())]
        if there:
            string = max(there, key=lambda one: len(one.encode()))
            return string, end - len(string.encode())
    return None


LETTERS = st.text("ab\n所é😀", min_size=1, max_size=4)
STOPS = st.lists(LETTERS, max_size=5).map(tuple)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40) | st.text("ab\n所é😀", max_size=20).map(str.encode), STOPS, st.data())
def test_every_way_of_cutting_streams_the_text_of_the_whole(written: bytes, stop: tuple[str, ...], data: st.DataObject):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(written)), max_size=8)))
    pieces = [written[start:end] for start, end in zip([0, *cuts], [*cuts, len(written)], strict=True)]
    known = vocabulary(pieces)
    stream = StreamText(known, stop=stop)
    shown = ""
    found = first_stop(written, stop)
    text = (written if found is None else written[: found[1]]).decode(errors="replace")
    for token in range(259, 259 + len(pieces)):
        shown += stream.feed(token)
        assert text.startswith(shown)  # nothing is taken back, and nothing of a stop string is shown
    shown += stream.end()
    assert shown == text and stream.stop == (None if found is None else found[0])
    assert text_of(list(written), known, stop=stop) == text  # byte by byte


def test_nothing_is_held_back_longer_than_need_be():
    known = vocabulary([b"ab", b"abc", "é".encode()[:1], "é".encode()[1:]])
    stream = StreamText(known, stop=("abd", "bce"))
    assert [stream.feed(token) for token in (259, 260, 120)] == ["", "aba", "bcx"]
    assert [stream.feed(token) for token in (261, 262)] == ["", "é"]
    assert stream.feed(259) == "" and stream.end() == "ab"


def test_a_string_within_a_token_cuts_it_there():
    known = vocabulary([b"one END two"])
    stream = StreamText(known, stop=("END", "D t"))
    assert stream.feed(259) == "one " and stream.stop == "END"
    assert stream.feed(97) == stream.end() == ""  # what comes later is not said


def test_control_tokens_part_texts_and_thinking_may_spell_a_stop_string():
    known = vocabulary([b"END"])
    assert text_of([THINK, 97, 259, END_THINK, 98, 259, 99], known, stop=("END",)) == "aENDb"
    assert text_of([97, 259, END_THINK, 98, 259], known, stop=("END",), prompt_ids=[THINK, 97]) == "aENDb"
    assert text_of([*b"E", CONTROL, *b"ND"], known, stop=("END",)) == "END"
    assert text_of([*"é".encode()[:1], CONTROL, 97], known) == "\ufffda"


class Counted(list):
    """A list that counts how often it is read."""

    n_read = 0

    def __getitem__(self, index):
        self.n_read += 1
        return super().__getitem__(index)


def test_sixteen_long_strings_that_are_nearly_there_cost_a_step_a_byte():
    strings = StopStrings(["a" * 500 + letter for letter in "bcdefghijklmnopq"])
    strings._shorter = Counted(strings._shorter)
    state = 0
    for byte in b"a" * 5000:
        state = strings.step(state, byte)
    assert strings.depth[state] == 500 and strings._shorter.n_read <= 5000
    assert strings.found[strings.step(state, ord("q"))] == "a" * 500 + "q"
