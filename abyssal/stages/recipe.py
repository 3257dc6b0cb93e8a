"""The recipe: one TOML for the whole way, read into the frozen dataclasses that stand beside their readers.

An unknown key is an error that names its neighbours. The resolved recipe is saved with the run.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abyssal.evals.tasks import EvalConfig
from abyssal.machine import Precision
from abyssal.model.config import ModelConfig
from abyssal.plan.layout import Layout
from abyssal.plan.plan_config import PlanConfig
from abyssal.stages.extend import ExtendConfig
from abyssal.stages.on_policy import OnPolicyConfig
from abyssal.stages.pretrain import PretrainConfig
from abyssal.stages.reward_model import RewardModelConfig
from abyssal.stages.rl import RlConfig
from abyssal.stages.sft import SftConfig
from abyssal.stages.tokenize import DataConfig, TokenizerConfig
from abyssal.stages.traces import TracesConfig
from abyssal.typed_toml import from_dict


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    name: str = "run"
    out: str = "out"  # the run directory is <out>/<name>
    base: str = ""  # a checkpoint of any format to start from, tokenizer included; "": the [model] of the recipe
    seed: int = 0
    device: str = "auto"
    threads: int = 0  # CPU threads; 0: every core
    dtype: Precision = "auto"  # what a section's dtype = "auto" means: BF16 where the hardware multiplies it, else FP32


@dataclass(frozen=True, kw_only=True)
class TracedSftConfig:
    """A stage that samples traces, keeps the good ones and fine-tunes on them."""

    traces: TracesConfig = field(default_factory=TracesConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    general: int = 0  # conversations of general data beside the traces (`reject`: instructions with right answers)
    requests: int = 0  # conversations of open requests, answered as data.web.careless_share says: `align` has to tell
    data: str = ""  # a JSONL of `messages` that is trained on too; with traces.problems = 0, on nothing else

    def __post_init__(self) -> None:
        if not (self.traces.problems or self.general or self.requests or self.data):
            raise ValueError("traces.problems=0 and no data leave nothing to learn; name a JSONL of traces in `data`")


@dataclass(frozen=True, kw_only=True)
class RlDataConfig:
    """A user's own problems: JSONL of `prompt` and `answer`, and a reward as `module:function`."""

    train: str = ""
    held_out: str = ""
    reward_limit_s: float = 10.0  # for one answer; later than that it is undecided


@dataclass(frozen=True, kw_only=True)
class Recipe:
    run: RunConfig = field(default_factory=RunConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig
    student: ModelConfig
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    extend: ExtendConfig = field(default_factory=ExtendConfig)
    zero: RlConfig = field(default_factory=RlConfig)
    cold_start: TracedSftConfig = field(default_factory=TracedSftConfig)
    reason: RlConfig = field(default_factory=RlConfig)
    reject: TracedSftConfig = field(default_factory=TracedSftConfig)
    align: RlConfig = field(default_factory=RlConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    student_pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    distil: TracedSftConfig = field(default_factory=TracedSftConfig)
    student_rl: RlConfig = field(default_factory=lambda: RlConfig(steps=0))  # steps 0: passed over
    on_policy: OnPolicyConfig = field(default_factory=lambda: OnPolicyConfig(steps=0))
    rl_data: RlDataConfig = field(default_factory=RlDataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    parallel: Layout = field(default_factory=Layout)  # over which devices, and what is kept in which type
    plan: PlanConfig = field(default_factory=PlanConfig)

    def __post_init__(self) -> None:
        if self.student_pretrain.row_len % self.pretrain.row_len:
            raise ValueError(
                f"student_pretrain.row_len={self.student_pretrain.row_len} is no multiple of pretrain.row_len="
                f"{self.pretrain.row_len}: it would cut the problems, which stand whole in rows of that length"
            )
        for name in ("zero", "reason", "align"):
            if getattr(self, name).seconds == 0:
                raise ValueError(f"{name}.seconds=0: only the student's arms can take as long as distil; use inf")

        for stage in ("zero", "reason"):
            if share := getattr(self, stage).preference_share:
                raise ValueError(
                    f"{stage}.preference_share={share}: rules alone reward {stage}; give it to align, the last stage"
                )

    @property
    def directory(self) -> Path:
        return Path(self.run.out) / self.run.name


def with_precision(section: Any, precision: str) -> Any:
    """A recipe, or a section of one, in which every dtype = "auto" is `precision`."""
    changes = {}
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if f.name == "dtype" and value == "auto":
            changes[f.name] = precision
        elif dataclasses.is_dataclass(value):
            changes[f.name] = with_precision(value, precision)
    return dataclasses.replace(section, **changes)


def read_recipe(path: str | Path) -> Recipe:
    """A Recipe from TOML, or a ValueError naming the file and the key."""
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"recipe {path} does not exist; runs/ holds the ones that come with the project"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    try:
        return from_dict(Recipe, content, "")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
