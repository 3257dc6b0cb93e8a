"""`abyssal presets`: published shapes with their sizes, counted on the meta device; one of them as a config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from abyssal.checkpoint.convert import config_to_hf, model_type
from abyssal.commands.options import parsed
from abyssal.model.config import ModelConfig
from abyssal.model.presets import PRESETS
from abyssal.model.transformer import Transformer, count_mtp_parameters, count_parameters

ROW = "{:<20}  {:<11}  {:>15}  {:>14}  {:>14}  {:>6}  {:>6}  {:>17}"
TITLES = ("name", "type", "parameters", "active", "MTP", "layers", "hidden", "cache bytes/token")


@dataclass(frozen=True)
class PresetOptions:
    name: Annotated[str | None, tyro.conf.Positional] = None  # print this one as a config.json


def presets(arguments: list[str]) -> None:
    options: PresetOptions = parsed(PresetOptions, args=arguments, prog="abyssal presets")
    if options.name is None:
        print(ROW.format(*TITLES))
        for name, preset in PRESETS.items():
            print(ROW.format(name, *size_row(preset())))
    elif options.name in PRESETS:
        print(json.dumps(config_to_hf(PRESETS[options.name]()), indent=2))
    else:
        raise ValueError(f"there is no preset {options.name!r}; there are {', '.join(PRESETS)}")


def size_row(config: ModelConfig) -> tuple[str, ...]:
    """Active are K of E experts and the head, without the embedding table. The cache is in BF16, without MTP."""
    with torch.device("meta"):
        model = Transformer(config)
    total, active = count_parameters(model)
    cache = 2 * config.cache_width * config.num_hidden_layers
    numbers = (total, active, count_mtp_parameters(model), config.num_hidden_layers, config.hidden_size, cache)
    return (model_type(config), *(f"{number:,}" for number in numbers))
