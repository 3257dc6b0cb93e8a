"""What is compared: every arm of the ablations as changes to a recipe, and what its paper says of it.

Owns names, changes and the papers' words. Does not own running (ablation_run.py) nor the tables (ablation_table.py).
An arm is its recipe's sections with some fields changed; arms of one stage see the same tokens (pretrain) or the same
number of problems and answers from the same base (zero). Optimizer rates and the speed of the balance bias come from a
scan with a seed of its own, so that no arm is favoured by a rate that was chosen for another.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from abyssal.stages.recipe import Recipe
from abyssal.typed_toml import from_dict

ROOT = Path(__file__).resolve().parents[1]
Stage = Literal["pretrain", "zero"]
Direction = Literal["better", "worse", "same", ""]
RECIPES: dict[Stage, Path] = {"pretrain": ROOT / "runs" / "ablations.toml", "zero": ROOT / "runs" / "ablations_rl.toml"}
SEEDS = (0, 1, 2)
SCAN_SEED = 100  # never among SEEDS: a rate must not be chosen on the runs that it is then judged by
# what the scan tries; the first speed of the bias is the recipe's own
MUON_LR, ADAMW_LR, BIAS_SPEED = (0.004, 0.008, 0.016), (2e-3, 4e-3, 8e-3, 16e-3), (1e-3, 5e-3)

Changes = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """`against` names the arm that it is compared with; one without is what the others are compared with."""

    name: str
    stage: Stage
    says: str  # the row's title
    changes: Changes = field(default_factory=dict)
    against: str = ""
    paper: str = ""  # what was reported, and where
    expects: Direction = ""  # of this arm beside `against`, as reported


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the scan chose."""

    muon: float
    adamw: float
    bias_speed: float


def pretrain_arms(rates: Rates) -> list[Arm]:
    muon = {"lr": rates.muon, "bias_speed": rates.bias_speed}

    def arm(name: str, says: str, *, paper: str, expects: Direction, **sections: dict[str, Any]) -> Arm:
        changes = {**sections, "pretrain": muon | sections.get("pretrain", {})}
        return Arm(name=name, stage="pretrain", says=says, changes=changes, against="v3", paper=paper, expects=expects)

    return [
        Arm(
            name="v3",
            stage="pretrain",
            says="as V3: MLA, 4 of 16 experts and 1 shared, bias balancing, MTP, Muon",
            changes={"pretrain": muon},
        ),
        arm(
            "aux_loss",
            "auxiliary loss (0.01) instead of the bias",
            pretrain={"balance_weight": 0.01, "bias_speed": 0.0},
            paper="loss 2.258 against 2.253 at 1B (V3 4.5.3); violation 0.72 against 0.04 (Loss-Free Balancing)",
            expects="worse",
        ),
        arm(
            "no_balance",
            "no balancing at all",
            pretrain={"balance_weight": 0.0, "bias_speed": 0.0},
            paper="routing collapses onto few experts (DeepSeekMoE 3.3)",
            expects="worse",
        ),
        arm(
            "no_mtp",
            "no MTP",
            model={"num_nextn_predict_layers": 0},
            pretrain={"mtp_weight": 0.0, "mtp_weight_late": 0.0},
            paper="Pile 0.729 with and without, HumanEval 26.8 to 20.7 (V3 table 4)",
            expects="same",
        ),
        arm(
            "mha",
            "MHA instead of MLA",
            model={"attention": "gqa", "num_key_value_heads": 4, "head_dim": 32},
            paper="BBH 37.9 against 39.0, MMLU 48.7 against 50.0 with 7 times the cache (V2 appendix D.2)",
            expects="worse",
        ),
        arm(
            "gqa",
            "GQA (2 of 4 heads) instead of MLA",
            model={"attention": "gqa", "num_key_value_heads": 2, "head_dim": 32},
            paper="below MHA, MMLU 41.2 against 45.2 (V2 appendix D.1), MHA below MLA (D.2)",
            expects="worse",
        ),
        arm(
            "dense",
            "dense of the same active size",
            model={"feed_forward": "dense"},
            paper="Pile loss 2.060 against 1.808 at 2B (DeepSeekMoE table 2)",
            expects="worse",
        ),
        arm(
            "no_shared",
            "no shared expert, 5 of 17 routed",
            model={"n_shared_experts": 0, "n_routed_experts": 17, "num_experts_per_tok": 5},
            paper="a shared expert helps on most benchmarks (DeepSeekMoE figure 3)",
            expects="worse",
        ),
        arm(
            "adamw",
            "AdamW instead of Muon",
            pretrain={"optimizer": "adamw", "adamw_lr": rates.adamw},
            paper="Muon needs 52 % of AdamW's training FLOPs (Moonlight)",
            expects="worse",
        ),
    ]


def scan_arms() -> list[Arm]:
    """One seed, the length of the real runs. The bias is tried at the recipe's rate, which is among Muon's."""

    def arm(name: str, **pretrain: Any) -> Arm:
        return Arm(name=name, stage="pretrain", says=name, changes={"pretrain": pretrain})

    return [
        *(arm(f"scan_muon_{lr:g}", lr=lr) for lr in MUON_LR),
        *(arm(f"scan_adamw_{lr:g}", optimizer="adamw", adamw_lr=lr) for lr in ADAMW_LR),
        *(arm(f"scan_bias_{speed:g}", bias_speed=speed) for speed in BIAS_SPEED[1:]),
    ]


def rl_arms() -> list[Arm]:
    def arm(name: str, says: str, *, paper: str, expects: Direction, against: str = "grpo", **zero: Any) -> Arm:
        return Arm(
            name=name, stage="zero", says=says, changes={"zero": zero}, against=against, paper=paper, expects=expects
        )

    return [
        Arm(name="grpo", stage="zero", says="GRPO: mean of each answer, deviation, clip 0.2, KL 0.001"),
        arm(
            "no_std",
            "not divided by the deviation",
            grpo={"divide_by_std": False},
            paper="as good, without favouring questions by their difficulty (Dr. GRPO 3.1)",
            expects="same",
        ),
        arm(
            "token_mean",
            "all tokens alike",
            grpo={"mean": "token"},
            paper="AIME 41 to 42 (DAPO table 1)",
            expects="better",
        ),
        arm(
            "clip_higher",
            "clip 0.2 below, 0.28 above",
            grpo={"clip_high": 0.28},
            paper="AIME 36 to 38, entropy stays up (DAPO table 1)",
            expects="better",
        ),
        arm(
            "clip_10",
            "clip 10",
            grpo={"clip_low": 10.0, "clip_high": 10.0},
            paper="a low clip loses the gradient of many tokens (R1)",
            expects="better",
        ),
        arm(
            "dynamic",
            "dynamic sampling",
            dynamic_sampling=True,
            paper="AIME 42 to 50 (DAPO table 1)",
            expects="better",
        ),
        arm(
            "no_kl",
            "no KL",
            grpo={"kl_weight": 0.0},
            paper="left out as not needed (DAPO 2.3, Dr. GRPO)",
            expects="same",
        ),
        arm(
            "v32",
            "V3.2: unbiased KL, off-policy mask 0.5, importance at most 2",
            grpo={"unbiased_kl": True, "off_policy_mask": 0.5, "importance_cap": 2.0},
            paper="steadier over long runs (V3.2 3.1)",
            expects="",
        ),
        Arm(
            name="bf16",
            stage="zero",
            says="GRPO in BF16, with router replay",
            changes={"zero": {"dtype": "bfloat16"}},
            against="grpo",
        ),
        arm(
            "bf16_no_replay",
            "the same without replay",
            against="bf16",
            dtype="bfloat16",
            grpo={"router_replay": False},
            paper="replay is needed for steady RL of MoE models (V3.2 3.1)",
            expects="worse",
        ),
    ]


def settings_of(arm: Arm) -> dict[str, Any]:
    """The sections of the recipe that the arm reads, as written, with its changes: what a log was made with."""
    with RECIPES[arm.stage].open("rb") as file:
        sections = merged(tomllib.load(file), arm.changes)
    if arm.stage == "zero":  # what its base was made with is the base's own affair
        return {"data": {"problems": sections["data"]["problems"]}, "zero": sections["zero"]}
    return {name: sections[name] for name in ("tokenizer", "data", "model", "pretrain")}


def recipe_of(arm: Arm) -> Recipe:
    with RECIPES[arm.stage].open("rb") as file:
        recipe: Recipe = from_dict(Recipe, merged(tomllib.load(file), arm.changes), "")
    return recipe


def shortened(arm: Arm, steps: int) -> Arm:
    """For a first try; 0 leaves it as it is."""
    return replace(arm, changes=merged(arm.changes, {arm.stage: {"steps": steps}})) if steps else arm


def merged(old: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = dict(old)
    for name, value in changes.items():
        inner = both.get(name)
        both[name] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return both


def chosen_rates(summaries: dict[str, dict[str, Any]]) -> Rates:
    """From the scan's summaries by arm. Rates by held-out loss; the bias by balance, which is what it is there for."""
    names = [arm.name for arm in scan_arms()]
    if missing := [name for name in names if name not in summaries]:
        raise ValueError(f"the scan lacks {', '.join(missing)}; run: python bench/ablations.py run --only scan")

    def best(names: dict[float, str], measure: str) -> float:
        return min(names, key=lambda value: summaries[names[value]][measure])

    biases = {BIAS_SPEED[0]: f"scan_muon_{recipe_lr():g}"} | {v: f"scan_bias_{v:g}" for v in BIAS_SPEED[1:]}
    return Rates(
        muon=best({lr: f"scan_muon_{lr:g}" for lr in MUON_LR}, "held_out_loss"),
        adamw=best({lr: f"scan_adamw_{lr:g}" for lr in ADAMW_LR}, "held_out_loss"),
        bias_speed=best(biases, "max_violation"),
    )


def recipe_lr() -> float:
    with RECIPES["pretrain"].open("rb") as file:
        lr: float = tomllib.load(file)["pretrain"]["lr"]
    return lr


def json_equal(a: Any, b: Any) -> bool:
    """Equal once written and read: tuples are lists there."""
    return bool(json.loads(json.dumps(a)) == json.loads(json.dumps(b)))
