"""A reward model on disk: config.json, FP32 safetensors, and reward.json with what was measured of its heads.

Names are transformers' for sequence classification, so it loads there too. Written whole or not at all. FP32, because
the weights that are loaded must be the very ones that were measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from abyssal.checkpoint.atomic import find_directory, replace_directory
from abyssal.checkpoint.convert import ARCHITECTURES, config_from_hf, config_to_hf, model_type
from abyssal.checkpoint.tensor_names import official_views
from abyssal.model.reward_head import RewardModel
from abyssal.tokens.tokenizer import Tokenizer

WEIGHTS, FACTS = "model.safetensors", "reward.json"


def save_reward_model(
    directory: Path, model: RewardModel, tokenizer: Tokenizer, *, heads: Sequence[str], facts: dict[str, Any]
) -> None:
    config = config_to_hf(model.body.config, bos_token_id=tokenizer.role_id("bos_token"), eos_token_id=tokenizer.eos_id)
    architecture = ARCHITECTURES.get(model_type(model.body.config), "AbyssalForCausalLM")
    config |= {
        "architectures": [architecture.replace("ForCausalLM", "ForSequenceClassification")],
        "dtype": "float32",
        "torch_dtype": "float32",
        "pad_token_id": tokenizer.pad_id,
        "id2label": {str(k): head for k, head in enumerate(heads)},
        "label2id": {head: k for k, head in enumerate(heads)},
    }
    tensors = {name: view.detach().cpu().contiguous() for name, view in reward_views(model).items()}
    try:
        with replace_directory(directory) as new:
            (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (new / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
            tokenizer.save(new, model_max_length=model.body.config.max_position_embeddings)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {directory}: {error}; free some disk space and run again") from error


def load_reward_model(
    directory: Path, *, dtype: torch.dtype, device: torch.device
) -> tuple[RewardModel, dict[str, Any]]:
    """The model and its reward.json; every tensor must fit."""
    path = find_directory(directory)
    try:
        hf = json.loads((path / "config.json").read_text(encoding="utf-8"))
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        tensors = load_file(path / WEIGHTS)
    except (OSError, SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"{path} is not there or damaged ({reason}); delete the folder above it and run again") from None
    model = RewardModel(config_from_hf(hf), len(hf["id2label"]), dtype=dtype)
    views = reward_views(model)
    wrong = sorted(
        name
        for name in views.keys() | tensors.keys()
        if name not in views or name not in tensors or views[name].shape != tensors[name].shape
    )
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} tensors do not fit config.json, first {wrong[0]}; copy it again")
    with torch.no_grad():
        for name, view in views.items():
            view.copy_(tensors[name])
    return model.to(device), facts


def reward_views(model: RewardModel) -> dict[str, Tensor]:
    return official_views(model.body) | {"score.weight": model.score.weight}
