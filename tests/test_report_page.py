"""The report of a made-up run: complete, half done, hostile. What a reader must find on the page is looked for."""

import html
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from abyssal.evals.charts import (
    IntervalRow,
    Series,
    interval_chart,
    line_chart,
    linear_scale,
    log_scale,
    tick_label,
    value_label,
)
from abyssal.evals.page import write_report
from abyssal.evals.run_files import read_run

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>\" onload='x'"


def make_run(run_dir: Path, *, problem: str = "((3+4)*2-5)*3 mod 10 = ?") -> Path:
    """A finished run with plausible numbers in every file of the contract."""
    rng = random.Random(0)
    noise = lambda spread: rng.gauss(0, spread)  # noqa: E731
    run_dir.mkdir(parents=True)
    (run_dir / "recipe.toml").write_text('[pretrain]\nsteps = 400\nlr = 0.02\ncorpus = "python"\n')
    pretrain = []
    for step in range(400):
        loss = 0.4 + 5.5 * math.exp(-step / 40) + 0.6 * math.exp(-step / 200)
        entry = {
            "step": step, "loss": loss * (1 + noise(0.05)), "mtp_loss": 1.25 * loss * (1 + noise(0.05)),
            "balance_loss": 1e-4, "grad_norm": 0.4 + abs(noise(0.1)), "lr": 0.02 * min(1, step / 20),
            "tokens_per_s": 18000 + noise(900), "tokens": 1536, "memory_gb": 0.9, "time_s": 0.9,
            "max_violation": 0.2 + 1.5 * math.exp(-step / 50) + abs(noise(0.1)),
        }  # fmt: skip
        if step % 50 == 49:
            entry |= {"held_out_loss": loss * 1.04, "mtp_acceptance": 0.3 + 0.0009 * step}
        pretrain.append(entry)
    _stage(run_dir / "pretrain", pretrain)
    for name, start, mixed in (("zero", 0.32, 0.16), ("reason", 0.55, 0.05), ("align", 0.58, 0.02)):
        steps, samples = [], []
        for step in range(60):
            up = 1 - math.exp(-step / 25)
            accuracy = min(1, max(0, start + 0.28 * up + noise(0.03)))
            entry = {
                "step": step, "reward": accuracy + 0.09 + noise(0.01), "accuracy": accuracy, "format": 0.9 + 0.1 * up,
                "language": 1 - mixed, "zero_variance_share": 0.2 + 0.1 * up + noise(0.03),
                "length": 22 + 12 * up + noise(1), "length_thinking": 34 + 4 * up + noise(1),
                "accuracy_thinking": min(1, accuracy + 0.12), "think_share": min(1, 0.5 + 0.4 * up + noise(0.02)),
                "mixed_share": max(0, mixed + noise(0.02)), "truncated_share": max(0, 0.04 - 0.03 * up + noise(0.01)),
                "entropy": 0.42 - 0.2 * up, "kl": 0.03 * up, "clip_share": 0.01,
                "mismatch_max": 10 ** (-6 + noise(0.2)),
                "mismatch_mean": 10 ** (-7 + noise(0.1)), "flip_share": 0.0002 * rng.random(), "verifier_errors": 0,
                "rollout_s": 2.8, "reward_s": 0.1, "update_s": 1.6, "time_s": 4.6, "tokens": 8000, "lr": 1e-4,
                "grad_norm": 0.3 + abs(noise(0.05)), "max_violation": 0.3 + abs(noise(0.05)),
            }  # fmt: skip
            if step % 10 == 9:
                entry |= {"held_out_accuracy": accuracy - 0.01, "held_out_think_share": entry["think_share"]}
            steps.append(entry)
            samples.append({"step": step, "problem": problem, "thinking": "3+4=7\n7*2=4\n4-5=9", "content": "7"})
        _stage(run_dir / name, steps, samples)
    for name in ("cold_start", "reject", "distil"):
        steps = [
            {"step": s, "loss": 0.5 + math.exp(-s / 9), "lr": 1e-3, "tokens": 4000, "time_s": 1} for s in range(40)
        ]
        _stage(run_dir / name, steps)
    for name, seconds in (("distil/base", 2.0), ("distil/traces", 0.5)):
        _stage(run_dir / name, [{"step": s, "loss": 2.0, "tokens": 1000, "time_s": seconds} for s in range(20)])
    for name in ("student_rl", "on_policy"):
        steps = [
            {
                "step": s, "loss": 0.4 * math.exp(-s / 9), "tokens": 2000, "time_s": 3.5, "measure_s": 1.0,
                "length": 30.0, "think_share": 0.8,
            }
            for s in range(20)
        ]  # fmt: skip
        _stage(run_dir / name, steps)
    (run_dir / "tokenize").mkdir()
    (run_dir / "tokenize/done.json").write_text('{"time_s": 6.5, "tokens": 0}')
    _stage(run_dir / "eval", [{"step": 0, "time_s": 41.0, "tokens": 90000}])
    checkpoints = {}
    for name, accuracy, think, length, mixed in (
        ("base", 0.312, 0.52, 22.4, 0.14), ("zero", 0.581, 0.88, 35.1, 0.16), ("dev1", 0.44, 0.97, 36.0, 0.03),
        ("dev2", 0.602, 0.98, 36.4, 0.01), ("dev3", 0.595, 0.99, 36.2, 0.01), ("r1", 0.624, 0.99, 36.9, 0.008),
        ("student_base", 0.24, 0.45, 20.0, 0.2), ("student", 0.557, 1.0, 36.1, 0.011),
        ("student_rl", 0.353, 0.7, 30.0, 0.1), ("student_opd", 0.571, 1.0, 36.0, 0.01),
    ):  # fmt: skip
        active, total = (520_000, 520_000) if name.startswith("student") else (1_210_000, 2_140_000)
        overall = {
            "accuracy": accuracy, "ci_low": accuracy - 0.042, "ci_high": accuracy + 0.041, "think_share": think,
            "length": length, "length_thinking": length + 4, "accuracy_thinking": accuracy + 0.06,
            "mixed_share": mixed,
            "truncated_share": 0.01, "cons_at_k": accuracy + 0.07,
            "mtp_acceptance": None if name.startswith("student") else 0.71,
            "n_problems": 300, "k": 8, "active_params": active, "total_params": total,
        }  # fmt: skip
        if name != "base":
            overall["gain"] = {"value": accuracy - 0.312, "low": accuracy - 0.35, "high": accuracy - 0.27}
        if name in ("student", "student_rl", "student_opd"):
            value = accuracy - 0.24
            overall["gain_over_student_base"] = {"value": value, "low": value - 0.06, "high": value + 0.04}
        families = {
            family: {
                "accuracy": min(1, accuracy * scale), "ci_low": accuracy * scale - 0.06,
                "ci_high": accuracy * scale + 0.06, "n_problems": 75, "held_out": family == "nim",
            }
            for family, scale in (("chains", 1.2), ("expressions", 1.0), ("states", 0.9), ("nim", 0.6))
        }  # fmt: skip
        checkpoints[name] = {"overall": overall, "family": families}
    budget = {
        name: [
            {
                "budget": b, "accuracy": top * (1 - 0.8 * math.exp(-b / 14)), "cut_share": math.exp(-b / 30),
                "ci_low": top * (1 - 0.8 * math.exp(-b / 14)) - 0.04, "n_problems": 300, "truncated_share": 0.01,
                "ci_high": top * (1 - 0.8 * math.exp(-b / 14)) + 0.04, "thinking_tokens": min(b, 33.1),
            }
            for b in (0, 8, 16, 32, 64, 128)
        ]
        for name, top in (("zero", 0.58), ("r1", 0.624))
    }  # fmt: skip
    _write(run_dir / "eval/results.json", {"checkpoints": checkpoints, "budget": budget})
    answers = {
        "base": {"thinking": None, "content": "1", "correct": False},
        "zero": {"thinking": "3+4=7\n所以 7*2=14, 4\n4-5=9\n9*3=27, 7", "content": "7", "correct": True},
        "r1": {"thinking": "3+4 = 7\n7*2 = 14, so 4\n4-5 = -1, so 9\n9*3 = 27, so 7", "content": "7", "correct": True},
        "student": {"thinking": "3+4 = 7\n7*2 = 14, so 4\n4-5 = 9\n9*3 = 26", "content": "6", "correct": False},
    }
    traces = [{"problem": problem, "answer": "7", "family": "chains", "by_checkpoint": answers} for _ in range(5)]
    _write(run_dir / "eval/traces.json", traces)
    return run_dir


def _stage(stage_dir: Path, steps: list[dict], samples: list[dict] | None = None) -> None:
    stage_dir.mkdir(exist_ok=True)
    (stage_dir / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (stage_dir / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples or []))
    (stage_dir / "done.json").write_text("{}")


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")


class Page(HTMLParser):
    """Which tags a browser would see, and whether they nest."""

    VOID = {"meta", "line", "circle", "rect", "polyline", "img", "br", "link"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> str:
    return text_of(write_report(make_run(tmp_path_factory.mktemp("out") / "laptop")))


def test_every_chapter_curve_and_number_is_there(whole):
    page = Page(whole)
    for chapter in ("results", "arms", "budget", "traces", "curves", "families", "cost", "recipe"):
        assert f'id="{chapter}"' in whole
    for stage in ("pretrain", "zero", "cold_start", "reason", "reject", "align", "distil"):
        assert f'id="stage-{stage}"' in whole
    for title in ("Loss (log scale)", "Reward", "Share of answers that think", "Accuracy given thinking",
                  "Mixed-language and cut-off answers", "Balance: max violation", "MTP: second token accepted",
                  "Entropy, nats a token", "KL to the reference",
                  "Expert flips between engine and trainer"):  # fmt: skip
        assert f'aria-label="{title}"' in whole, title
    assert "31.2 %" in whole and "58.1 %" in whole and "+26.9" in whole and "27.0–35.3" in whole
    assert "never trained on" in whole and "✗ wrong" in whole and "✓ right" in whole
    assert page.tags.count("svg") > 40


def test_reward_and_hidden_truth_stand_in_one_chart_from_where_they_begin(tmp_path):
    """A stage without them has no such chart; the reward model has a part of its own, named as one."""
    watched = [
        {"step": step, "reward": 0.5, "accuracy": 0.5, "loss": 0.1}
        | ({"preference_reward": 0.1 * step, "preference_truth": 0.3} if step >= 3 else {})
        for step in range(6)
    ]
    _stage(tmp_path / "zero", [{"step": 0, "reward": 0.5, "accuracy": 0.5, "loss": 0.1}])
    _stage(tmp_path / "align", watched)
    _stage(
        tmp_path / "align/reward_model",
        [{"step": 0, "loss": 0.69, "pair_accuracy": 0.5, "held_out_helpfulness_accuracy": 0.75}],
    )
    page = text_of(write_report(tmp_path))
    Page(page)
    (chart,) = re.findall(r'<svg[^>]*aria-label="Reward model against hidden truth.*?</svg>', page)
    hover = json.loads(html.unescape(re.search(r'data-hover="([^"]*)"', chart)[1]))
    assert {one["n"]: [x for x, _ in one["p"]] for one in hover["s"]} == {"reward": [3, 4, 5], "truth": [3, 4, 5]}
    assert page.count('aria-label="Pairs ordered rightly"') == 1
    assert '<h3 id="stage-align-reward_model">Reward model</h3>' in page


def section(page: str, name: str) -> str:
    return page.split(f'<section id="{name}">')[1].split("</section>")[0]


def test_the_students_arms_stand_side_by_side_with_the_seconds_they_had(whole):
    arms = section(whole, "arms")
    rows = [row for row in arms.split("<tr>")[1:] if "<td>" in row]
    assert [re.findall(r"<td>(.*?)</td>", row)[0] for row in rows] == [
        "student_base", "student", "student_rl", "student_opd",
    ]  # fmt: skip
    assert "40 s <small>of pretraining, for all" in rows[0] and "24.0 %" in rows[0]
    assert "50 s <small>10 s traces, 40 s SFT" in rows[1] and "drawn by r1: 20k" in rows[1]
    for row in rows[2:]:
        assert "<td>50 s</td>" in row  # 20 steps of 3.5 s, of which 1 s was measuring
    assert "35.3 %" in rows[2] and "+11.3" in rows[2] and "+5.3 to +15.3" in rows[2]


def test_what_thinking_buys_is_a_curve_with_its_axes_named(whole):
    budget = section(whole, "budget")
    assert "thinking budget, tokens" in budget and ">pass@1</text>" in budget
    assert budget.count('class="span"') == 2 * 6  # an interval a point
    assert budget.count("<tr>") == 1 + 2 * 6


def test_a_run_without_arms_and_budgets_shows_neither(tmp_path):
    run_dir = make_run(tmp_path / "laptop")
    results = json.loads((run_dir / "eval/results.json").read_text())
    results = {"checkpoints": {k: v for k, v in results["checkpoints"].items() if not k.startswith("student_")}}
    _write(run_dir / "eval/results.json", results)
    text = text_of(write_report(run_dir))
    Page(text)
    assert 'id="arms"' not in text and 'id="budget"' not in text and "RL alone" not in text.split("<section")[0]


def test_the_page_needs_nothing_from_outside(whole):
    assert not re.search(r"https?://|//cdn|@import|url\(|src=|<link", whole)
    assert "default-src 'none'" in whole
    assert len(whole) < 1_500_000


def test_time_and_tokens_are_sums_over_steps_unless_done_says_so(tmp_path):
    run = read_run(make_run(tmp_path / "laptop"))
    by_name = {stage.name: stage for stage in run.stages}
    assert by_name["pretrain"].total("tokens") == 400 * 1536
    assert by_name["pretrain"].total("time_s") == pytest.approx(360)
    assert by_name["tokenize"].total("time_s") == 6.5
    assert list(by_name)[:3] == ["tokenize", "pretrain", "zero"]


def test_what_a_model_or_a_user_wrote_stays_text(tmp_path):
    run_dir = make_run(tmp_path / "hostile", problem=ATTACK)
    results = json.loads((run_dir / "eval/results.json").read_text())
    results["checkpoints"][ATTACK] = results["checkpoints"]["r1"]
    results["checkpoints"]["r1"]["family"][ATTACK] = {"accuracy": 0.5}
    _write(run_dir / "eval/results.json", results)
    traces = json.loads((run_dir / "eval/traces.json").read_text())
    traces[0]["by_checkpoint"]["r1"] = {"thinking": ATTACK, "content": ATTACK + "{0}{x}", "correct": True}
    _write(run_dir / "eval/traces.json", traces)
    (run_dir / "recipe.toml").write_text(f"# {ATTACK}\n")
    page = Page(text_of(write_report(run_dir)))
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_a_run_under_way_still_gives_a_page(tmp_path):
    run_dir = make_run(tmp_path / "laptop")
    (run_dir / "eval/results.json").unlink()
    (run_dir / "eval/traces.json").write_text('[{"problem"')  # being written
    (run_dir / "zero/done.json").unlink()
    with (run_dir / "zero/metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "rew')
    text = text_of(write_report(run_dir))
    Page(text)
    assert 'id="results"' not in text and "under way" in text and "R1-Zero" in text
    assert not list(run_dir.glob("*.partial"))


def test_an_empty_run_says_so_and_no_run_is_an_error(tmp_path):
    text = text_of(write_report(tmp_path))
    assert "Nothing has been measured yet" in text
    Page(text)
    with pytest.raises(FileNotFoundError, match="no run at .*nowhere"):
        write_report(tmp_path / "nowhere")


def test_partial_results_show_a_dash_and_leave_empty_columns_out(tmp_path):
    (tmp_path / "eval").mkdir()
    _write(tmp_path / "eval/results.json", {"checkpoints": {
        "zero": {"overall": {"accuracy": 0.5, "length": 20.0}, "family": {"chains": 0.25}},
        "base": {"overall": {"accuracy": 0.25}}}})  # fmt: skip
    text = text_of(write_report(tmp_path))
    Page(text)
    assert text.index(">base<") < text.index(">zero<") and "–" in text
    assert "MTP accepted" not in text and "25.0 %" in text


def test_ticks_are_round_numbers_inside_the_range():
    assert linear_scale(0, 100, 0, 1, n_ticks=4).ticks == [0, 25, 50, 75, 100]
    assert linear_scale(0, 3, 0, 1, n_ticks=4, whole=True).ticks == [0, 1, 2, 3]
    assert log_scale(1e-8, 1e-5, 0, 1, n_ticks=4).ticks == pytest.approx([1e-8, 1e-7, 1e-6, 1e-5])
    assert linear_scale(0, 10, 50, 150, n_ticks=4).to_pixel(5) == 100
    assert log_scale(1, 100, 0, 200, n_ticks=4).to_pixel(10) == pytest.approx(100)


def test_labels():
    assert tick_label(0.25, [0, 0.25, 0.5], fmt="percent") == "25 %"
    assert tick_label(0.5, [0, 0.5, 1.0]) == "0.5" and tick_label(20000, [0, 20000]) == "20k"
    assert tick_label(1e-7, [1e-8, 1e-7], log=True) == "1e-7"
    assert [tick_label(t, [0, 5e-4, 1e-3]) for t in (0, 5e-4, 1e-3)] == ["0", "0.5e-3", "1.0e-3"]
    assert value_label(0.583, "percent").split() == ["58.3", "%"] and value_label(1_400_000, "plain") == "1.4M"


def test_a_line_goes_through_its_points_and_odd_values_do_not_break_it():
    chart = line_chart([Series(name="a", points=[(0, 1.0), (1, float("nan")), (2, 3.0)])], title="t")
    assert chart.count("<polyline") == 1 and "nan" not in chart
    assert line_chart([Series(name="a", points=[])], title="t") == ""
    constant = line_chart([Series(name="a", points=[(0, 1e-3), (1, 1e-3)])], title="t")
    assert re.findall(r'class="tick"[^>]*>([^<]*)<', constant)[:3] == ["0", "0.5e-3", "1.0e-3"]
    assert "<circle" in line_chart([Series(name="a", points=[(5, 0.0)])], title="one constant point")
    assert line_chart([Series(name="a", points=[(0, 0.0), (1, -1.0)])], title="no logarithm", log=True) == ""
    assert "&lt;b&gt;" in line_chart([Series(name="<b>", points=[(0, 1), (1, 2)])] * 2, title="<b>")


def test_smoothing_is_a_local_line_so_a_straight_line_stays_one_to_its_ends():
    straight = [(float(x), 2.0 * x) for x in range(50)]
    chart = line_chart([Series(name="a", points=straight)], title="t")
    raw, smooth = re.findall(r'<polyline class="(?:raw|line)"[^>]*points="([^"]*)"', chart)
    assert raw == smooth


def test_a_spike_survives_thinning():
    points = [(float(x), 1.0) for x in range(20_000)]
    points[7_777] = (7_777.0, 50.0)
    chart = line_chart([Series(name="a", points=points)], title="t")
    assert "7777.0,50.0" in chart and len(chart) < 40_000


def test_intervals_stand_where_they_should():
    rows = [IntervalRow(name="base", value=0.3, low=0.25, high=0.35), IntervalRow(name="zero", value=0.6)]
    chart = interval_chart(rows, title="Accuracy").replace("\N{NO-BREAK SPACE}", " ")
    assert "base: 30.0 % (25.0 % to 35.0 %)" in chart and "zero: 60.0 %" in chart
    assert chart.count('class="interval"') == 1 and interval_chart([], title="none") == ""
