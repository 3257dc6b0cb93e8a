from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abyssal.model.presets import PRESETS, r1_distill_qwen_1_5b, v2_lite, v3
from abyssal.model.quantized import weight_counts
from abyssal.model.transformer import Transformer, count_mtp_parameters, count_parameters
from abyssal.plan.parameters import cache_bytes_per_token, count, count_active, on_rank, weights


@pytest.mark.parametrize(
    "name", [name for name in PRESETS if name not in ("r1", "r1_distill_qwen_14b")]
)  # twins in shape
def test_names_and_sizes_are_those_of_the_model(name: str):
    config = PRESETS[name]()
    with torch.device("meta"):
        model = Transformer(config)
    assert {w.name: w.n for w in weights(config)} == weight_counts(model)
    assert {w.name: w.shape for w in weights(config)} == {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert (count(config), count_active(config)) == count_parameters(model)
    assert sum(w.n for w in weights(config) if w.part == "mtp") == count_mtp_parameters(model)


def test_v3_as_published():
    assert count(v3()) == 671_026_419_200
    assert count_active(v3()) == 36_625_618_432
    assert cache_bytes_per_token(v3()) == 70_272


@pytest.mark.parametrize(
    "config",
    [
        replace(v2_lite(), attention="gqa", num_key_value_heads=4, head_dim=64, qk_norm=True),
        replace(v2_lite(), feed_forward="dense", qkv_bias=True, latent_norm=False, tie_word_embeddings=True),
        replace(r1_distill_qwen_1_5b(), num_nextn_predict_layers=2),
    ],
)
def test_every_ablation_has_the_model_s_own_tensors(config):
    with torch.device("meta"):
        model = Transformer(replace(config, num_hidden_layers=2))
    assert {w.name: w.n for w in weights(model.config)} == weight_counts(model)


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 8, 64]))
def test_ranks_hold_the_whole_between_them(tp: int, ep: int):
    for weight in weights(replace(v3(), num_hidden_layers=4)):
        copies = ep if weight.is_routed else tp if weight.tp_dim is not None else 1
        assert on_rank(weight, tp=tp, ep=ep) * copies == weight.n
