"""Presets: their sizes digit by digit, and the same model as transformers builds from the published config.json."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from official_configs import OFFICIAL
from transformers import AutoConfig, AutoModelForCausalLM

from abyssal.checkpoint.convert import config_from_hf, config_to_hf
from abyssal.cli import dispatch
from abyssal.model.presets import PRESETS, shaped_like, v2, v2_lite, v3
from abyssal.model.transformer import Transformer, count_mtp_parameters, count_parameters


@functools.cache
def on_meta(name: str) -> Transformer:
    with torch.device("meta"):
        return Transformer(PRESETS[name]())


def size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# total, attention of a layer, dense feed-forward, one expert; active with the head; 10^9 without, with both tables
PUBLISHED = {
    "v3": (671_026_419_200, 187_107_328, 396_361_728, 44_040_192, 36_625_618_432, 35.699, 37.552),
    "v2": (235_741_434_880, 149_227_520, 188_743_680, 23_592_960, 20_851_512_320, 20.327, 21.376),
    "v2_lite": (15_706_484_224, 13_763_072, 67_239_936, 8_650_752, 2_451_435_008, 2.242, 2.661),
    "moonlight": (15_960_110_208, 13_763_072, 69_206_016, 8_650_752, 2_579_231_872, 2.244, 2.915),
    "deepseek_moe_16b": (16_375_728_128, 16_777_216, 67_239_936, 8_650_752, 2_618_935_296, 2.409, 2.829),
}


@pytest.mark.parametrize(("name", "wanted"), PUBLISHED.items(), ids=PUBLISHED.keys())
def test_sizes_of_the_mixtures(name: str, wanted: tuple[int, int, int, int, int, float, float]):
    total, attention, dense, expert, active, without_head, with_both = wanted
    model = on_meta(name)
    assert count_parameters(model) == (total, active)
    assert size(model.layers[0].self_attn) == attention
    assert size(model.layers[0].mlp) == dense
    experts = model.layers[-1].mlp.experts
    assert size(experts) == expert * model.config.n_routed_experts
    table = model.lm_head.weight.numel()
    assert round((active - table) / 1e9, 3) == without_head and round((active + table) / 1e9, 3) == with_both


def test_mtp_is_counted_apart_and_without_what_it_shares():
    model = on_meta("r1")
    d = 7168
    layer = 187_107_328 + 257 * 44_040_192 + 256 * d + 256 + 2 * d  # attention, experts, router, its bias, norms
    assert count_mtp_parameters(model) == layer + 2 * d * d + 3 * d == 11_610_068_224
    tables = 2 * 129_280 * d
    assert round((count_mtp_parameters(model) + tables) / 1e9, 2) == 13.46  # "14B" of its file


def test_cache_and_scales():
    assert 2 * v3().cache_width * v3().num_hidden_layers == 70_272
    assert v3().softmax_scale == pytest.approx(0.135234, abs=5e-7)
    assert v2_lite().softmax_scale == pytest.approx(0.114721, abs=5e-7)
    assert v2().rope_scaling == v2_lite().rope_scaling


@pytest.mark.parametrize("name", PRESETS.keys())
def test_the_published_config_is_the_preset(name: str):
    config = PRESETS[name]()
    assert config_from_hf(OFFICIAL["v3" if name == "r1" else name]) == config
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config
    assert name in shaped_like(replace(config, num_nextn_predict_layers=0, initializer_range=0.006))
    assert not shaped_like(replace(config, rms_norm_eps=2e-6))


@pytest.mark.parametrize("name", [name for name in OFFICIAL if name != "deepseek_moe_16b"])  # no such type there
def test_every_tensor_is_one_that_transformers_has(name: str):
    """Names and shapes, all of them; built from the published file there and from the preset here."""
    fields: dict[str, Any] = {k: v for k, v in OFFICIAL[name].items() if k not in ("auto_map", "model_type")}
    config = AutoConfig.for_model(OFFICIAL[name]["model_type"], **fields)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    ours = on_meta(name)
    wanted = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    if ours.config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
    state = {key: tensor for key, tensor in ours.state_dict().items() if not key.startswith("mtp.")}
    assert {key if key == "lm_head.weight" else f"model.{key}": t.shape for key, t in state.items()} == wanted


def test_the_table_and_one_config(capsys: pytest.CaptureFixture[str]):
    assert dispatch(["presets"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows.keys() == {"name", *PRESETS}
    assert rows["v3"] == [
        "v3", "deepseek_v3", "671,026,419,200", "36,625,618,432", "11,610,068,224", "61", "7,168", "70,272",
    ]  # fmt: skip
    assert rows["smollm2_135m"][1:] == ["llama", "134,515,008", "134,515,008", "0", "30", "576", "23,040"]
    dispatch(["presets", "v2_lite"])
    assert config_from_hf(json.loads(capsys.readouterr().out)) == v2_lite()
    with pytest.raises(ValueError, match="there is no preset 'v4'; there are deepseek_moe_16b, v2_lite"):
        dispatch(["presets", "v4"])
