"""The recipe: one TOML for the whole way, read into the frozen dataclasses that stand beside their readers.

An unknown key is an error that names its neighbours. The resolved recipe is saved with the run.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from abyssal.evals.tasks import EvalConfig
from abyssal.machine import Precision
from abyssal.model.config import ModelConfig
from abyssal.stages.extend import ExtendConfig
from abyssal.stages.on_policy import OnPolicyConfig
from abyssal.stages.pretrain import PretrainConfig
from abyssal.stages.reward_model import RewardModelConfig
from abyssal.stages.rl import RlConfig
from abyssal.stages.sft import SftConfig
from abyssal.stages.tokenize import DataConfig, TokenizerConfig
from abyssal.stages.traces import TracesConfig


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


def from_dict(kind: type[Any], content: dict[str, Any], where: str) -> Any:
    """Fill a dataclass from nested dicts, checking every name and type."""
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := [key for key in content if key not in known]:
        raise ValueError(f"unknown key {where}{unknown[0]!s}; {where or 'a recipe'} has {', '.join(sorted(known))}")
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in content
    ]
    if missing:
        raise ValueError(f"{where}{missing[0]} is missing; give it a value")
    return kind(**{key: _value(hints[key], value, f"{where}{key}") for key, value in content.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{where}={value!r} must be a table")
        return from_dict(typing.cast(type, hint), value, f"{where}.")
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in arguments if a is not type(None)]
        return None if value is None else _value(inner[0], value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where}={value!r}; use one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple and arguments[-1] is Ellipsis:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}={value!r} must be a list")
        return tuple(_value(arguments[0], v, where) for v in value)
    if origin is tuple:
        if arguments[1:] == (...,):  # of any length
            if not isinstance(value, list | tuple):
                raise ValueError(f"{where}={value!r} must be a list")
            return tuple(_value(arguments[0], v, where) for v in value)
        if not isinstance(value, list | tuple) or len(value) != len(arguments):
            raise ValueError(f"{where}={value!r} must be a list of {len(arguments)} values")
        return tuple(_value(a, v, where) for a, v in zip(arguments, value, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}={value!r} must be a table")
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}={value!r} must be of type {hint.__name__}")
    return value


def to_toml(recipe: Recipe) -> str:
    """The recipe with every default written out; reading it gives the same recipe."""
    return "\n".join(_table(dataclasses.asdict(recipe), "")).lstrip("\n") + "\n"


def _table(content: dict[str, Any], name: str) -> list[str]:
    scalars = {k: v for k, v in content.items() if not isinstance(v, dict) and v is not None}
    lines = [f"\n[{name}]"] if name and (scalars or not content) else []
    lines += [f"{_key(k)} = {_literal(v)}" for k, v in scalars.items()]
    for key, value in content.items():
        if isinstance(value, dict):
            lines += _table(value, f"{name}.{_key(key)}" if name else _key(key))
    return lines


def _key(key: str) -> str:
    return key if key.replace("_", "").isalnum() and key.isascii() else _literal(key)


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return repr(value)
