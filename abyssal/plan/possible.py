"""What a machine can do: which models can be trained and served on it, and how fast, in words and as rows.

Owns the shapes that are asked about. Does not own the tasks (possible_tasks.py) nor the picture (draw_possible.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from abyssal.model.config import ModelConfig
from abyssal.model.presets import PRESETS
from abyssal.plan.machine_file import MachineSpec
from abyssal.plan.parameters import count, count_active
from abyssal.plan.possible_tasks import (
    TASKS,
    Answer,
    Task,
    Verdict,
    distil,
    fine_tune,
    pretrain,
    reinforce,
    serve,
    trainings,
)


def _small(*, hidden: int, layers: int, heads: int, experts: int, chosen: int, width: int, vocab: int) -> ModelConfig:
    """V3 in small: latent attention, one dense layer, a shared expert and many fine ones, an MTP module."""
    return ModelConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=3 * hidden, max_position_embeddings=8192, kv_lora_rank=hidden // 3, qk_nope_head_dim=64,
        qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=experts, n_shared_experts=1, num_experts_per_tok=chosen,
        moe_intermediate_size=width, first_k_dense_replace=1, num_nextn_predict_layers=1,
    )  # fmt: skip


HEADINGS: dict[Task, str] = {
    "pretrain": "Pretrain",
    "fine_tune": "Fine-tune",
    "distil": "Distil",
    "reinforce": "Reinforce",
    "serve": "Serve",
}
OWN: dict[str, ModelConfig] = {
    "v3_shaped_25m": _small(hidden=384, layers=6, heads=6, experts=16, chosen=2, width=192, vocab=8192),
    "v3_shaped_400m": _small(hidden=768, layers=12, heads=12, experts=32, chosen=4, width=384, vocab=32768),
    "v3_shaped_1b": _small(hidden=1152, layers=18, heads=18, experts=44, chosen=6, width=320, vocab=32768),
}


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str
    parameters: int
    active: int
    answers: dict[Task, Answer]


@dataclass(frozen=True, kw_only=True)
class Possible:
    machine: str  # its title
    models: tuple[Model, ...]  # from small to large

    @property
    def rows(self) -> list[dict[str, Any]]:
        """For programs: one a model and task, what it is not asked about left out."""
        return [
            {"parameters": model.parameters, "active": model.active}
            | {key: value for key, value in asdict(answer).items() if value is not None}
            for model in self.models
            for answer in model.answers.values()
        ]

    @property
    def words(self) -> list[str]:
        """The largest model of each task, and the largest that is merely slow."""
        lines = [f"On {self.machine}:"]
        for task in TASKS:
            best = self._largest(task, "yes")
            beyond = self._largest(task, "slow")
            if best is None and beyond is None:
                lines.append(f"{HEADINGS[task]}: nothing of what was asked about.")
                continue
            parts = [] if best is None else [best.words]
            if beyond is not None and (best is None or _size(self, beyond) > _size(self, best)):
                parts.append(("And slowly: " if parts else "Slowly: ") + beyond.words)
            if task == "serve" and best is not None and best.experts and (whole := self._largest_on_device()):
                parts.append(f"All on the device: {whole.words}")
            lines.append(f"{HEADINGS[task]}: {' '.join(parts)}")
        return lines

    def _largest_on_device(self) -> Answer | None:
        answers = [model.answers["serve"] for model in self.models]
        return next((a for a in reversed(answers) if a.verdict == "yes" and not a.experts), None)

    def _largest(self, task: Task, verdict: Verdict) -> Answer | None:
        found = [model.answers[task] for model in self.models if model.answers[task].verdict == verdict]
        return found[-1] if found else None


def possible(machine: MachineSpec) -> Possible:
    """Over a few sizes of V3's shape and every preset, each task that there is."""
    shapes = OWN | {name: preset() for name, preset in PRESETS.items() if name != "r1"}  # r1 is v3's shape
    served = {name: serve(name, config, machine) for name, config in shapes.items()}
    teacher = max(
        (name for name, answer in served.items() if answer.verdict == "yes"),
        key=lambda name: count(shapes[name]),
        default=None,
    )
    models = []
    for name, config in shapes.items():
        plans = trainings(config, machine)
        fitting = [plan for plan in plans if plan.fits]
        training = max(fitting or plans[:1], key=lambda plan: plan.tokens_per_second)
        answers = [
            pretrain(name, config, training),
            fine_tune(name, training),
            distil(name, training, served[teacher] if teacher else None),
            reinforce(name, config, machine, plans),
            served[name],
        ]
        models.append(
            Model(
                name=name,
                parameters=count(config),
                active=count_active(config),
                answers={answer.task: answer for answer in answers},
            )
        )
    return Possible(machine=machine.title, models=tuple(sorted(models, key=lambda model: model.parameters)))


def _size(whole: Possible, answer: Answer) -> int:
    return next(model.parameters for model in whole.models if model.name == answer.model)
