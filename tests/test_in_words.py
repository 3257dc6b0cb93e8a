"""Figures as people read them."""

from __future__ import annotations

import pytest

from abyssal.plan.in_words import (
    bytes_text,
    count_text,
    deviation_text,
    flops_text,
    percent_text,
    seconds_text,
    usd_text,
)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (bytes_text(80e9), "80 GB"),
        (bytes_text(1_234_000), "1.23 MB"),
        (bytes_text(999_900_000), "1 GB"),
        (bytes_text(512), "512 B"),
        (count_text(14.8e12), "14.8T"),
        (count_text(2_664_000), "2.66M"),
        (count_text(640), "640"),
        (flops_text(432e12), "432 TFLOP/s"),
        (usd_text(5_576_000), "$5.58M"),
        (usd_text(87_072), "$87.1K"),
        (usd_text(12.5), "$12.50"),
        (usd_text(0.02641), "$0.0264"),
        (seconds_text(0.01476), "14.8 ms"),
        (seconds_text(2.5e-5), "25 us"),
        (seconds_text(19.926), "19.9 s"),
        (seconds_text(200), "3 min 20 s"),
        (seconds_text(90_000), "25 h"),
        (seconds_text(4_600_000), "53.2 days"),
        (percent_text(0.43734), "43.7 %"),
        (deviation_text(1.1, 1.0), "+10.0 %"),
        (deviation_text(1.0, 0.0), "–"),
    ],
)
def test_figures_as_people_read_them(said: str, text: str):
    assert said == text
