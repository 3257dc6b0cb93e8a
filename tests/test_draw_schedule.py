"""The picture is drawn to time: what stands in it is what the timeline says."""

from __future__ import annotations

import re
from collections import Counter
from xml.etree import ElementTree

import pytest

from abyssal.plan.draw_schedule import LEFT, RIGHT, draw_schedule
from abyssal.plan.simulate import StageSeconds, simulate

V3_LIKE = StageSeconds(
    forward_seconds=3,
    backward_input_seconds=3,
    backward_weight_seconds=2,
    overlapped_pair_seconds=6,
    send_seconds=0.25,
    forward_experts_seconds=1,
    backward_experts_seconds=1,
)
PLAIN = StageSeconds(forward_seconds=1, backward_input_seconds=1, backward_weight_seconds=1)
BOX = re.compile(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-[\d.]+z")


def boxes(svg: str) -> dict[str, list[tuple[float, ...]]]:
    """Class -> (x, y, width, height) of its rectangles. Those of the legend are in a group, and are left out."""
    paths = ElementTree.fromstring(svg).findall("{http://www.w3.org/2000/svg}path")
    return {
        path.get("class", ""): [tuple(float(number) for number in box) for box in BOX.findall(path.get("d", ""))]
        for path in paths
    }


def texts(svg: str, kind: str) -> list[str]:
    elements = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return [element.text or "" for element in elements if element.get("class") == kind]


def test_two_ranks_by_hand():
    """Nine units over 927 pixels: 103 a unit. Rank 1 idles for the first, and from 7 to 9."""
    svg = draw_schedule(simulate("1f1b", n_stages=2, n_micro_batches=2, times=PLAIN), width=LEFT + RIGHT + 927)
    found = boxes(svg)
    assert [x for x, *_ in found["forward"]] == pytest.approx([LEFT, LEFT + 103, LEFT + 103, LEFT + 412])
    assert [width for _, _, width, _ in found["backward"]] == pytest.approx([206 - 0.8] * 4)
    idle = [(round((x - LEFT) / 103), round((width + 0.8) / 103)) for x, _, width, _ in found["idle"]]
    assert idle == [(2, 2), (6, 1), (0, 1), (7, 2)]
    assert texts(svg, "number") == ["0", "1", "0", "1", "0", "0", "1", "1"]
    assert texts(svg, "title") == ["1F1B on 2 ranks, 2 micro-batches"]
    assert texts(svg, "summary") == ["step 9 s · bubble 3 s a rank, 33.3 % of all time"]
    assert texts(svg, "key") == ["forward", "backward", "bubble"]


def test_everything_that_happens_is_drawn_once_within_its_lane():
    line = simulate("dualpipe", n_stages=4, n_micro_batches=12, times=V3_LIKE)
    svg = draw_schedule(line)
    found = boxes(svg)
    drawn = Counter({kind: len(rows) for kind, rows in found.items()})
    jobs = Counter(job.kind for job in line.jobs)
    for kind in jobs:
        assert drawn[kind] + drawn[f"{kind} paler"] == jobs[kind]
    assert drawn["forward"] == drawn["forward paler"] == 24  # six of each direction on each of four ranks
    n_pairs = sum(len(slot) == 2 for order in line.schedule.orders for slot in order)
    assert (len(found["pair"]), len(found["hidden_experts"])) == (n_pairs, n_pairs)
    assert all(LEFT <= x and x + width <= 960 - RIGHT for rows in found.values() for x, _, width, _ in rows)
    assert {height for kind in ("forward", "backward") for *_, height in found[kind]} == {
        22.0,
        11.0,
    }  # alone, in a pair


def test_the_summary_says_how_much_is_hidden():
    """A rank's one pair hides 2 of all-to-all, and of four messages of 0.25 that it gets one comes early enough."""
    line = simulate("dualpipe", n_stages=2, n_micro_batches=4, times=V3_LIKE)
    assert line.hidden_share == 0.25
    (summary,) = texts(draw_schedule(line), "summary")
    assert summary.endswith("communication hidden 25.0 %: 2.25 s of 9 s a rank")


def test_one_scale_for_several_pictures():
    line = simulate("1f1b", n_stages=2, n_micro_batches=2, times=PLAIN)
    alone, halved = boxes(draw_schedule(line)), boxes(draw_schedule(line, until_seconds=18))
    assert halved["forward"][1][0] - LEFT == pytest.approx((alone["forward"][1][0] - LEFT) / 2, abs=0.01)


def test_numbers_stand_only_where_they_can_be_read():
    few = draw_schedule(simulate("1f1b", n_stages=2, n_micro_batches=4, times=PLAIN))
    many = draw_schedule(simulate("1f1b", n_stages=2, n_micro_batches=200, times=PLAIN))
    assert len(texts(few, "number")) == 16
    assert texts(many, "number") == []
    assert len(boxes(many)["backward"]) == 400


def test_a_number_stands_where_the_longest_could():
    """Ten pixels a unit: a forward has room for one figure and not for two, a backward for two."""
    ten = simulate("none", n_stages=1, n_micro_batches=10, times=PLAIN)
    twenty = simulate("none", n_stages=1, n_micro_batches=20, times=PLAIN)
    scale = {"width": LEFT + RIGHT + 600, "until_seconds": 60}
    assert [len(texts(draw_schedule(line, **scale), "number")) for line in (ten, twenty)] == [20, 20]
    assert texts(draw_schedule(twenty, **scale), "number") == [str(n) for n in range(20)]  # of backwards alone


def test_light_and_dark():
    """Alone it follows the system; in a page, what the page has chosen."""
    svg = draw_schedule(simulate("none", n_stages=1, n_micro_batches=1, times=PLAIN))
    assert "@media(prefers-color-scheme:dark)" in svg and ":root[data-theme=dark] .schedule" in svg
    used = set(re.findall(r"var\((--\w+)\)", svg))
    assert used == set(re.findall(r"(--\w+):#", svg.partition("@media")[0]))
    assert texts(svg, "summary") == ["step 3 s · bubble 0 s a rank, 0.0 % of all time"]
