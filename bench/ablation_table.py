"""README's tables of the ablations, from committed logs alone. Owns no arms and runs nothing.

Arms are compared seed by seed: the same seed means the same rows or problems in the same order, so what the arms have
in common falls out of the difference. Three seeds that agree in sign agree by chance one time in four; the tables show
the spread and leave what they do not decide undecided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablation_arms import (
    ADAMW_LR,
    BIAS_SPEED,
    MUON_LR,
    SCAN_SEED,
    SEEDS,
    Arm,
    Rates,
    chosen_rates,
    json_equal,
    pretrain_arms,
    recipe_lr,
    rl_arms,
    scan_arms,
    settings_of,
)
from ablation_run import log_path, read_log

Summary = dict[str, Any]
FOUND = {-1: "worse", 0: "undecided", 1: "better"}


@dataclass(frozen=True)
class Finished:
    """An arm with the log of every seed."""

    arm: Arm
    header: dict[str, Any]  # of the first seed
    summaries: list[Summary]

    def values(self, name: str) -> list[float]:
        found = [summary.get(name) for summary in self.summaries]
        return [float(value) for value in found if value is not None]


def ablation_lines(results: Path) -> list[str]:
    """Both tables, and beneath them what is missing."""
    scans = {
        arm.name: read_log(path)[1] for arm in scan_arms() if (path := log_path(results, arm, SCAN_SEED)).is_file()
    }
    try:
        rates: Rates | None = chosen_rates(scans)
    except ValueError:  # without its rates no arm of pretraining has run
        rates = None
    trained, missing = read_arms(results, [] if rates is None else pretrain_arms(rates))
    reinforced, missing_rl = read_arms(results, rl_arms())
    lines = pretrain_table(trained) + ["", scan_note(scans, rates)] if trained and rates else []
    lines += ([""] if lines else []) + rl_table(reinforced) if reinforced else []
    missing += missing_rl + ([] if rates else ["pretraining"])
    if missing:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    return lines


def read_arms(results: Path, arms: list[Arm]) -> tuple[dict[str, Finished], list[str]]:
    """Arms with all seeds, and the names of the others. Logs that cannot stand in one table are refused."""
    finished: dict[str, Finished] = {}
    missing: list[str] = []
    shared: dict[str, Any] = {}
    for arm in arms:
        paths = [log_path(results, arm, seed) for seed in SEEDS]
        if not all(path.is_file() for path in paths):
            missing.append(arm.name)
            continue
        logs = [read_log(path) for path in paths]
        for path, (header, _) in zip(paths, logs, strict=True):
            if not json_equal(header["settings"], settings_of(arm)):
                raise ValueError(f"{path} was made with other settings than {arm.name} has now; run it again")
            for what in ("data", "base"):
                if header.get(what) != shared.setdefault(what, header.get(what)):
                    raise ValueError(f"{path} and others of its table do not share their {what}; run it again")
        finished[arm.name] = Finished(arm, logs[0][0], [summary for _, summary in logs])
    for name in [name for name, entry in finished.items() if entry.arm.against and entry.arm.against not in finished]:
        missing.append(f"{name} (what it is compared with is not there)")
        del finished[name]
    return finished, missing


def pretrain_table(arms: dict[str, Finished]) -> list[str]:
    titles = (
        "pretraining", "parameters (active)", "cache a token", "held-out loss", "difference", "max violation",
        "dead experts", "the paper", "ours",
    )  # fmt: skip
    lines = header_of(titles)
    for entry in arms.values():
        facts, gaps = entry.header, differences(entry, arms, "held_out_loss")
        lines.append(
            row(
                entry.arm.says,
                f"{facts['parameters'] / 1e6:.2f}M ({facts['active'] / 1e6:.2f}M)",
                f"{facts['cache_bytes']:,} B",
                spread(entry.values("held_out_loss"), "{:.3f}".format),
                spread(gaps, "{:+.3f}".format),
                spread(entry.values("max_violation"), "{:.2f}".format),
                spread(entry.values("dead_share"), percent, " %"),
                entry.arm.paper or "–",
                verdict(gaps, lower_is_better=True, expects=entry.arm.expects) if gaps else "–",
            )
        )
    return lines


def rl_table(arms: dict[str, Finished]) -> list[str]:
    titles = (
        "GRPO", "held-out right", "difference", "thinks", "length", "entropy", "clipped", "mismatch", "problems drawn",
        "the paper", "ours",
    )  # fmt: skip
    lines = header_of(titles)
    for entry in arms.values():
        gaps = differences(entry, arms, "held_out_accuracy")
        lines.append(
            row(
                entry.arm.says,
                spread(entry.values("held_out_accuracy"), percent, " %"),
                spread(gaps, points, " points"),
                spread(entry.values("held_out_think_share"), percent, " %", brief=True),
                spread(entry.values("held_out_length"), "{:.0f}".format, brief=True),
                spread(entry.values("entropy"), "{:.3f}".format, brief=True),
                spread([100 * value for value in entry.values("clip_share")], "{:.2f}".format, " %", brief=True),
                spread(entry.values("mismatch_mean"), "{:.1e}".format, brief=True),
                spread(entry.values("problems_drawn"), "{:.0f}".format, brief=True),
                entry.arm.paper or "–",
                verdict(gaps, lower_is_better=False, expects=entry.arm.expects) if gaps else "–",
            )
        )
    return lines


def differences(entry: Finished, arms: dict[str, Finished], name: str) -> list[float]:
    """This arm less what it is compared with, seed by seed; empty for what others are compared with."""
    if not entry.arm.against:
        return []
    return [a - b for a, b in zip(entry.values(name), arms[entry.arm.against].values(name), strict=True)]


def verdict(gaps: list[float], *, lower_is_better: bool, expects: str) -> str:
    """What all seeds say together, beside what the paper found."""
    signs = {(gap < 0) - (gap > 0) if lower_is_better else (gap > 0) - (gap < 0) for gap in gaps}
    found = FOUND[signs.pop()] if len(signs) == 1 else "undecided"
    if not expects:
        return found
    if expects == "same":
        return "no difference shown, as there" if found == "undecided" else f"{found}, not as there"
    if found == "undecided":
        return found
    return f"{found}, as there" if found == expects else f"{found}: the other way round"


def scan_note(scans: dict[str, Summary], rates: Rates) -> str:
    """What the rates were chosen from, and whether one lies at the edge of what was tried."""

    def listed(prefix: str, values: tuple[float, ...]) -> str:
        return ", ".join(f"{value:g}: {scans[f'{prefix}_{value:g}']['held_out_loss']:.3f}" for value in values)

    violations = {BIAS_SPEED[0]: scans[f"scan_muon_{recipe_lr():g}"]["max_violation"]}
    violations |= {speed: scans[f"scan_bias_{speed:g}"]["max_violation"] for speed in BIAS_SPEED[1:]}
    edges = [
        f"{name} {value:g} is the {'least' if value == tried[0] else 'greatest'} tried"
        for name, value, tried in (("Muon's", rates.muon, MUON_LR), ("AdamW's", rates.adamw, ADAMW_LR))
        if value in (tried[0], tried[-1])
    ]
    return (
        f"Rates by the held-out loss of a scan with another seed: Muon {listed('scan_muon', MUON_LR)}; AdamW "
        f"{listed('scan_adamw', ADAMW_LR)}. Speed of the bias by its max violation: "
        + ", ".join(f"{speed:g}: {value:.2f}" for speed, value in violations.items())
        + "."
        + (f" At the edge of the scan: {'; '.join(edges)}." if edges else "")
    )


def spread(values: list[float], shown: Callable[[float], str], unit: str = "", *, brief: bool = False) -> str:
    """Mean and range: 2.011 (2.003 to 2.020)."""
    if not values:
        return "–"
    middle = f"{shown(sum(values) / len(values))}{unit}"
    return middle if brief else f"{middle} ({shown(min(values))} to {shown(max(values))})"


def percent(value: float) -> str:
    return f"{100 * value:.0f}"


def points(value: float) -> str:
    return f"{100 * value:+.1f}"


def header_of(titles: tuple[str, ...]) -> list[str]:
    return [row(*titles), "|---" * len(titles) + "|"]


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
