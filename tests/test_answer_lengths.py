"""Answer lengths from a mean and a limit: the uniform case by hand, and what must hold for all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.plan.answer_lengths import AnswerLengths

LENGTHS = st.tuples(st.floats(0.01, 0.99), st.floats(8, 65536)).map(
    lambda pair: AnswerLengths(mean_tokens=pair[0] * pair[1], max_tokens=pair[1])
)


def test_a_mean_of_half_the_limit_is_uniform():
    lengths = AnswerLengths(mean_tokens=50, max_tokens=100)
    assert lengths.running_share(25) == pytest.approx(0.75)
    assert lengths.longest_tokens(1) == pytest.approx(50)
    assert lengths.longest_tokens(3) == pytest.approx(75, rel=1e-3)  # the largest of n uniform numbers: n / (n + 1)


def test_a_short_mean_is_exponential():
    lengths = AnswerLengths(mean_tokens=10, max_tokens=1000)
    assert lengths.running_share(10) == pytest.approx(0.3679, rel=1e-3)  # 1 / e


def test_among_thousands_some_reach_the_limit():
    """R1-Zero: 8,192 answers of 9,000 tokens in the mean, cut at 32,768."""
    assert AnswerLengths(mean_tokens=9000, max_tokens=32768).longest_tokens(8192) > 0.99 * 32768


@given(LENGTHS)
def test_the_mean_comes_back(lengths: AnswerLengths):
    n_pieces = 4000
    width = lengths.max_tokens / n_pieces
    mean = sum(lengths.running_share((i + 0.5) * width) * width for i in range(n_pieces))
    assert mean == pytest.approx(lengths.mean_tokens, rel=1e-3)


@given(LENGTHS, st.integers(1, 10_000))
def test_tokens_are_counted_once_and_more_answers_wait_longer(lengths: AnswerLengths, n_answers: int):
    drawn = sum(s.n_steps * s.running for s in lengths.stretches(n_answers))
    assert drawn == pytest.approx(n_answers * lengths.mean_tokens, rel=0.05)
    assert lengths.longest_tokens(n_answers + 1) >= lengths.longest_tokens(n_answers) - 1e-6
    assert lengths.longest_tokens(n_answers) <= lengths.max_tokens * (1 + 1e-9)


@pytest.mark.parametrize("mean, longest", [(0, 10), (11, 10), (-1, 10)])
def test_impossible_means_are_refused(mean: float, longest: float):
    with pytest.raises(ValueError, match="must be above 0 and at most the longest"):
        AnswerLengths(mean_tokens=mean, max_tokens=longest)
