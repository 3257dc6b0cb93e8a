import math

import pytest
import torch

from abyssal.model.config import ModelConfig, RopeScaling, yarn_mscale
from abyssal.model.rope import rope_amplitude, rope_frequencies, rope_tables, rotate

YARN_V3 = RopeScaling(kind="yarn", factor=40.0, original_max_position_embeddings=4096)


def v3(scaling):
    """DeepSeek-V3's attention; nothing else matters here."""
    return ModelConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                       feed_forward="dense", kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
                       v_head_dim=128, rope_scaling=scaling)


def llama(scaling=None, *, head_dim=8):
    return ModelConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                       attention="gqa", feed_forward="dense", num_key_value_heads=1, head_dim=head_dim,
                       rope_scaling=scaling)


def test_yarn_keeps_pairs_up_to_10_and_stretches_those_from_23():
    """64 rotary dims, base 10000, 4096 -> 163840, beta 32 and 1: raw correction dims are 10.47 and 22.51."""
    ratio = rope_frequencies(v3(YARN_V3)) / rope_frequencies(v3(None))
    assert torch.equal(ratio[:11], torch.ones(11))
    assert torch.allclose(ratio[23:], torch.full((9,), 1 / 40))
    between = ratio[10:24]
    assert (between[1:] < between[:-1]).all()
    step = (1 - 1 / 40) / 13  # a straight ramp of 13 steps
    assert torch.allclose(ratio[11], torch.tensor(1 - step))
    assert torch.allclose(ratio[22], torch.tensor(1 / 40 + step))


def test_yarn_softmax_scale_of_v3_and_v2_lite():
    assert yarn_mscale(40.0, 1.0) == pytest.approx(1.36889, abs=5e-6)
    assert v3(None).softmax_scale == pytest.approx(0.0721688, abs=5e-8)  # 192^-0.5
    assert v3(YARN_V3).softmax_scale == pytest.approx(0.135234, abs=5e-7)
    lite = RopeScaling(kind="yarn", factor=40.0, mscale=0.707, mscale_all_dim=0.707)
    assert v3(lite).softmax_scale == pytest.approx(0.114721, abs=5e-7)


def test_cos_and_sin_are_not_scaled_when_both_mscales_agree():
    assert rope_amplitude(v3(YARN_V3)) == 1.0
    uneven = RopeScaling(kind="yarn", factor=40.0, mscale=1.0, mscale_all_dim=0.5)
    assert rope_amplitude(v3(uneven)) == pytest.approx(1.36889 / 1.18444, abs=1e-5)


def test_plain_frequencies_fall_from_one_by_powers_of_the_base():
    assert torch.allclose(rope_frequencies(llama()), torch.tensor([1.0, 0.1, 0.01, 0.001]))
    linear = RopeScaling(kind="linear", factor=4.0)
    assert torch.allclose(rope_frequencies(llama(linear)), torch.tensor([0.25, 0.025, 0.0025, 0.00025]))


def test_llama3_keeps_short_waves_and_stretches_long_ones():
    scaling = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=8192,
                          low_freq_factor=1.0, high_freq_factor=4.0)
    plain, scaled = rope_frequencies(llama(head_dim=128)), rope_frequencies(llama(scaling, head_dim=128))
    wavelength = 2 * math.pi / plain
    assert torch.equal(scaled[wavelength < 2048], plain[wavelength < 2048])
    assert torch.allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)
    middle = (wavelength > 2048) & (wavelength < 8192)
    assert middle.any() and (scaled[middle] < plain[middle]).all() and (scaled[middle] > plain[middle] / 8).all()


def test_a_quarter_turn_in_both_layouts():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    cos, sin = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    # pairs (1 2)(3 4) turn to (-2 1)(-4 3), written first halves first
    assert rotate(x, cos, sin, interleaved=True).flatten().tolist() == [-2.0, -4.0, 1.0, 3.0]
    # pairs (1 3)(2 4) turn to (-3 1)(-4 2)
    assert rotate(x, cos, sin, interleaved=False).flatten().tolist() == [-3.0, -4.0, 1.0, 2.0]


@pytest.mark.parametrize("interleaved", [True, False])
def test_scores_depend_on_the_distance_only(interleaved):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64, generator=generator)
    frequencies = rope_frequencies(v3(None))

    def score(at_query, at_key):
        turned = [rotate(x, *rope_tables(torch.tensor([[at]]), frequencies, 1.0), interleaved=interleaved)
                  for x, at in ((q, at_query), (k, at_key))]
        return (turned[0] * turned[1]).sum().item()

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-3)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)
