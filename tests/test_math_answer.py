import os
import signal

import pytest

from abyssal.reward.math_answer import MathVerifier, decided_as_text, last_boxed, normalise, same_text
from abyssal.types import Score


@pytest.fixture(scope="module")
def maths():
    with MathVerifier(time_limit_s=20.0) as verifier:
        yield verifier


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (" 7\n", "7"),
        ("7.", "7"),
        ("<answer>0.75</answer>", "0.75"),
        (r"So it is \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"first \boxed{1}, no: \boxed{2}", "2"),
        ("$x$", "x"),
        ("$1$ and $2$", "$1$ and $2$"),
        ("b  a\nd c", "b a d c"),
        ("１２。", "12"),
        ("−3", "-3"),
        ("x²", "x²"),
        ("", ""),
    ],
)
def test_normal_form(written, meant):
    assert normalise(written) == meant


def test_a_box_counts_its_braces_and_must_close():
    assert last_boxed(r"\boxed{\{1,2\}}") == r"\{1,2\}"
    assert last_boxed(r"\boxed{\frac{1}{2}") is None


def test_text_equality_is_of_the_normal_form_and_keeps_case():
    assert same_text("b a d c", " b a d c.") == Score(1.0)
    assert same_text("A b", "a b") == Score(0.0)
    assert same_text("6", "2*3") == Score(0.0)


@pytest.mark.parametrize(
    ("reference", "answer", "verdict"),
    [
        ("7", "7", True),
        ("7", "07", True),
        ("12", "13", False),
        ("a b c d", "b a c d", False),
        ("7", "7 8", False),
        ("Paris", "Lyon", False),
        ("7", "", False),
        ("1/2", "0.5", None),  # the rest needs algebra
        ("ab", "ba", None),
        ("1000", "1e3", None),
        ("7", "The answer is 7", None),
    ],
)
def test_what_the_text_alone_decides(reference, answer, verdict):
    assert decided_as_text(reference, answer) is verdict


def test_what_the_text_decides_starts_no_process():
    verifier = MathVerifier()
    assert verifier.compare("7", "8") == Score(0.0) and verifier.compare("7", "7.") == Score(1.0)
    assert verifier.worker.process is None


@pytest.mark.parametrize(
    ("reference", "answer", "value"),
    [
        ("1/2", "0.5", 1.0),
        ("x^2+2x+1", "(x+1)^2", 1.0),
        ("x^2+2x+1", "(x+2)^2", 0.0),
        (r"\{1,2\}", "{2,1}", 1.0),
        ("(1,2)", "(2,1)", 0.0),
        (r"\sqrt{8}", r"2\sqrt{2}", 1.0),
        ("3/4", r"So it is \boxed{\frac{3}{4}}.", 1.0),
        ("0.75", "<answer>3/4</answer>", 1.0),
        ("7", "The answer is 7.", 1.0),
        ("7", "The answer is 8.", 0.0),
        ("1000", "1,000", 1.0),
        ("1200", "1.2*10^3", 1.0),
        ("-5", "x = -5", 1.0),
        ("-5", "It is -5.", 1.0),
        ("7", "we can't say", 0.0),
        ("Paris", "It is Lyon!", 0.0),
    ],
)
def test_equal_as_mathematics(maths, reference, answer, value):
    assert maths.compare(reference, answer) == Score(value)


@pytest.mark.parametrize("answer", ["7+5", "so 7+5", "3*4", "15-3", r"3 \times 4"])
def test_arithmetic_left_undone_is_no_answer(maths, answer):
    """math-verify says 7+5 equals 12; a policy would learn to repeat the question."""
    assert maths.compare("12", answer) == Score(0.0)


def test_a_reference_that_cannot_be_read_is_an_error_and_not_a_wrong_answer(maths):
    score = maths.compare(r"\frac{1}{", "3.5")
    assert score.value is None and "cannot read the reference" in score.error


def test_reasoning_gym_scores_with_its_own_function(maths):
    entry = {"question": "?", "answer": "#B A#", "metadata": {"source_dataset": "ab"}}
    assert maths.score_gym("ab", "#B A#", entry) == Score(1.0)
    assert maths.score_gym("ab", "A# #B", entry) == Score(0.0)
    score = maths.score_gym("no_such_task", "1", entry)
    assert score.value is None and "no_such_task" in score.error


def test_a_hang_is_ended_reported_and_survived():
    with MathVerifier(time_limit_s=0.5) as verifier:
        verifier.compare("1/2", "0.5")  # the first comparison pays for warming up, whatever it says
        before = verifier.worker.n_restarts
        score = verifier.compare("7", "9^{9^{9^{9}}}")
        assert score.value is None and "more than 0.5 s" in score.error
        assert verifier.worker.n_restarts == before + 1
        verifier.time_limit_s = 20.0
        assert verifier.compare("1/2", "0.5") == Score(1.0)


def test_a_dead_worker_is_reported_and_replaced():
    with MathVerifier(time_limit_s=20.0) as verifier:
        assert verifier.compare("1/2", "0.5") == Score(1.0)
        process = verifier.worker.process
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        score = verifier.compare("1/2", "0.5")
        assert score.value is None and "died" in score.error
        assert verifier.compare("1/2", "0.5") == Score(1.0)
        last = verifier.worker.process
    assert last.poll() is not None  # close() leaves nothing running
