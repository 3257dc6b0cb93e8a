"""Ablations: arms differ in what they say and in nothing else, and the tables say what the logs say."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from ablation_arms import (  # noqa: E402
    ADAMW_LR,
    BIAS_SPEED,
    SCAN_SEED,
    SEEDS,
    Arm,
    Rates,
    chosen_rates,
    pretrain_arms,
    recipe_of,
    rl_arms,
    scan_arms,
    settings_of,
    shortened,
)
from ablation_run import cache_bytes, dead_share, is_finished, log_path, read_log, thinned, write_log  # noqa: E402
from ablation_table import ablation_lines, verdict  # noqa: E402

from abyssal.model.transformer import Transformer, count_parameters  # noqa: E402

RATES = Rates(muon=0.004, adamw=2e-3, bias_speed=1e-3)
PRETRAIN = {arm.name: arm for arm in pretrain_arms(RATES)}
RL = {arm.name: arm for arm in rl_arms()}


def sizes(name: str) -> tuple[int, int]:
    with torch.device("meta"):
        return count_parameters(Transformer(recipe_of(PRETRAIN[name]).model))


def test_dense_and_no_shared_expert_have_the_same_active_size_within_two_percent():
    total, active = sizes("v3")
    assert abs(sizes("dense")[1] / active - 1) < 0.02
    assert abs(sizes("no_shared")[1] / active - 1) < 0.02
    assert abs(sizes("no_shared")[0] / total - 1) < 0.02
    assert sizes("dense")[0] < 0.6 * total  # or it would be no comparison of sparse with dense


def test_every_pretraining_arm_sees_the_same_tokens_each_once():
    for arm in [*PRETRAIN.values(), *scan_arms()]:
        recipe = recipe_of(arm)
        assert recipe.pretrain.steps * recipe.pretrain.rows * recipe.pretrain.row_len == recipe.data.tokens == 491_520
        assert recipe.pretrain.eval_rows * recipe.pretrain.row_len == recipe.data.held_out_tokens
        assert settings_of(arm)["data"] == settings_of(PRETRAIN["v3"])["data"]


def test_the_cache_of_mla_mha_and_gqa_in_bytes():
    # 3 layers of 2 bytes: MLA keeps 64 + 16 numbers, MHA keys and values of 4 heads of 32, GQA of 2
    assert [cache_bytes(recipe_of(PRETRAIN[name]).model) for name in ("v3", "mha", "gqa")] == [480, 1536, 768]


def test_an_arm_differs_from_its_reference_in_the_named_fields_alone():
    known: dict[str, Arm] = PRETRAIN | RL
    for arm in known.values():
        if arm.against:
            ours, theirs = flat(asdict(recipe_of(arm))), flat(asdict(recipe_of(known[arm.against])))
            assert set(ours) == set(theirs)
            differs = {key for key in ours if ours[key] != theirs[key]}
            assert differs, arm.name
            assert differs <= set(flat(dict(arm.changes))), arm.name


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return out


def test_rates_are_the_scan_s_best():
    summaries: dict[str, dict[str, Any]] = {
        arm.name: {"held_out_loss": 2.0, "max_violation": 0.5} for arm in scan_arms()
    }
    summaries["scan_muon_0.016"]["held_out_loss"] = 1.9
    summaries[f"scan_adamw_{ADAMW_LR[1]:g}"]["held_out_loss"] = 1.8
    summaries[f"scan_bias_{BIAS_SPEED[1]:g}"] = {"held_out_loss": 9.0, "max_violation": 0.1}  # judged by balance alone
    assert chosen_rates(summaries) == Rates(muon=0.016, adamw=ADAMW_LR[1], bias_speed=BIAS_SPEED[1])
    del summaries["scan_muon_0.016"]
    with pytest.raises(ValueError, match="scan_muon_0.016"):
        chosen_rates(summaries)


def test_the_scan_s_seed_is_none_of_the_arms():
    assert SCAN_SEED not in SEEDS and len(set(SEEDS)) == 3


def test_dead_experts_and_none():
    loads = [torch.tensor([40, 40, 40, 40]), torch.tensor([79, 79, 1, 1])]  # fair share 40: dead below 4
    assert dead_share(loads) == 2 / 8
    assert dead_share([]) is None


def test_a_thinned_log_keeps_its_last_line_and_only_what_is_named():
    lines = [{"step": i, "loss": 1.23456789, "lr": 1.0} for i in range(100)]
    kept = thinned(lines, ("loss", "held_out_loss"))
    assert kept[-1] == {"step": 99, "loss": 1.235}
    assert len(kept) <= 40


def test_a_log_made_with_other_settings_counts_as_none(tmp_path: Path):
    arm = PRETRAIN["v3"]
    write_log(log_path(tmp_path, arm, 0), {"settings": settings_of(arm)}, [], {"held_out_loss": 2.0})
    assert is_finished(tmp_path, arm, 0)
    assert not is_finished(tmp_path, shortened(arm, 3), 0)
    assert not is_finished(tmp_path, arm, 1)


def test_a_broken_log_is_named(tmp_path: Path):
    (tmp_path / "0.jsonl").write_text('{"arm": "v3"}\n{"step": 1', encoding="utf-8")
    with pytest.raises(ValueError, match="0.jsonl is no log"):
        read_log(tmp_path / "0.jsonl")


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """The scan, three arms of pretraining and two of RL; seed s adds s / 100 to every loss."""
    for arm in scan_arms():
        loss = 1.5 if arm.name in ("scan_muon_0.008", "scan_adamw_0.004") else 2.0
        summary = {"held_out_loss": loss, "max_violation": 0.1 if "bias" in arm.name else 0.4}
        write_log(log_path(tmp_path, arm, SCAN_SEED), {"settings": settings_of(arm)}, [], summary)
    known = {arm.name: arm for arm in pretrain_arms(Rates(muon=0.008, adamw=0.004, bias_speed=0.005))} | RL
    for seed in SEEDS:
        for name, loss in (("v3", 1.0), ("no_balance", 1.5), ("gqa", 1.0 if seed else 0.9)):
            summary = {"held_out_loss": loss + seed / 100, "max_violation": 0.25, "dead_share": 0.5}
            write(tmp_path, known[name], seed, summary, data="d", parameters=1_500_000, active=700_000, cache_bytes=480)
        for name, right in (("grpo", 0.5), ("dynamic", 0.45)):
            summary = {"held_out_accuracy": right + seed / 10, "entropy": 0.1, "problems_drawn": 160}
            write(tmp_path, known[name], seed, summary, base="b")
    return tmp_path


def write(results: Path, arm: Arm, seed: int, summary: dict[str, Any], **header: Any) -> None:
    write_log(log_path(results, arm, seed), {"settings": settings_of(arm), **header}, [], summary)


def test_the_tables_say_what_the_logs_say(logs: Path):
    lines = ablation_lines(logs)
    cells = {line.split(" | ")[0].lstrip("| "): line.split(" | ") for line in lines if line.startswith("| ")}
    none, gqa = cells["no balancing at all"], cells["GQA (2 of 4 heads) instead of MLA"]
    assert none[1:7] == ["1.50M (0.70M)", "480 B", "1.510 (1.500 to 1.520)", "+0.500 (+0.500 to +0.500)",
                         "0.25 (0.25 to 0.25)", "50 % (50 to 50)"]  # fmt: skip
    assert none[8] == "worse, as there |"
    assert gqa[4] == "-0.033 (-0.100 to +0.000)" and gqa[8] == "undecided |"
    dynamic = cells["dynamic sampling"]
    assert dynamic[1:3] == ["55 % (45 to 65)", "-5.0 points (-5.0 to -5.0)"]
    assert dynamic[10] == "worse: the other way round |"
    assert "Speed of the bias by its max violation: 0.001: 0.40, 0.005: 0.10." in "\n".join(lines)
    assert lines[-1].startswith("Not run yet: aux_loss, no_mtp,") and "grpo" not in lines[-1]


def test_nothing_run_is_said_and_not_an_empty_table(tmp_path: Path):
    assert "pretraining" in ablation_lines(tmp_path)[-1] and "grpo" in ablation_lines(tmp_path)[-1]


def test_a_log_of_other_settings_does_not_get_into_the_table(logs: Path):
    write(logs, RL["dynamic"], 2, {"held_out_accuracy": 1.0}, base="b")
    path = log_path(logs, RL["dynamic"], 2)
    path.write_text(path.read_text(encoding="utf-8").replace('"steps": 20', '"steps": 400', 1), encoding="utf-8")
    with pytest.raises(ValueError, match="dynamic/2.jsonl was made with other settings"):
        ablation_lines(logs)


def test_arms_of_another_base_do_not_get_into_the_table(logs: Path):
    write(logs, RL["dynamic"], 0, {"held_out_accuracy": 1.0}, base="another")
    with pytest.raises(ValueError, match="do not share their base"):
        ablation_lines(logs)


def test_verdicts():
    assert verdict([0.1, 0.2, 0.1], lower_is_better=True, expects="worse") == "worse, as there"
    assert verdict([0.1, 0.2, 0.1], lower_is_better=False, expects="worse") == "better: the other way round"
    assert verdict([0.1, -0.2, 0.1], lower_is_better=True, expects="worse") == "undecided"
    assert verdict([0.1, -0.2, 0.1], lower_is_better=True, expects="same") == "no difference shown, as there"
    assert verdict([0.1, 0.2, 0.1], lower_is_better=True, expects="same") == "worse, not as there"
    assert verdict([0.0, 0.0, 0.0], lower_is_better=True, expects="") == "undecided"
