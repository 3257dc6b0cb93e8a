import pytest
import torch
from small_models import small_model

from abyssal.model.cache import CacheView, allocate_cache


@pytest.mark.parametrize("kind", ["mla_moe", "mla_moe_query_latent"])
def test_absorbed_and_expanded_forms_are_the_same_attention(kind):
    """Any number of queries and keys, with a mask that lets each query see another number of keys."""
    model = small_model(kind)
    attention = model.layers[0].self_attn
    generator = torch.Generator().manual_seed(1)
    x_BTD = torch.randn(3, 5, 32, generator=generator)
    positions_BT = torch.tensor([[7, 8, 9, 10, 11], [0, 1, 2, 3, 4], [2, 3, 4, 5, 6]])
    context = model.context(torch.zeros(3, 5, dtype=torch.int64), positions_BT=positions_BT)
    q_nope, q_rope = attention.queries(x_BTD, context)
    entries_BSW = torch.randn(3, 12, model.config.cache_width, generator=generator)
    mask_BTS = torch.arange(12) <= positions_BT[..., None]
    expanded = attention.expanded(q_nope, q_rope, entries_BSW, mask_BTS)
    absorbed = attention.absorbed(q_nope, q_rope, entries_BSW, mask_BTS)
    assert expanded.shape == (3, 5, 4, 8)
    assert torch.allclose(expanded, absorbed, atol=1e-5)


def test_both_forms_are_causal_without_a_mask():
    model = small_model()
    attention = model.layers[0].self_attn
    x_BTD = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(2))
    context = model.context(torch.zeros(2, 6, dtype=torch.int64))
    q_nope, q_rope = attention.queries(x_BTD, context)
    entries_BSW = attention.cache_entries(x_BTD, context)
    expanded = attention.expanded(q_nope, q_rope, entries_BSW, None)
    assert torch.allclose(expanded, attention.absorbed(q_nope, q_rope, entries_BSW, None), atol=1e-5)
    # the first query sees one key, so its output is that key's value, whatever the scores
    kv = attention.kv_b_proj(entries_BSW[:, 0, :16]).unflatten(-1, (4, 16))
    assert torch.allclose(expanded[:, 0], kv[..., 8:], atol=1e-5)


def test_a_cached_token_is_one_latent_and_one_rotated_key():
    model = small_model()
    attention = model.layers[0].self_attn
    x_BTD = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(3))
    at_zero = attention.cache_entries(x_BTD, model.context(torch.zeros(1, 1, dtype=torch.int64)))
    at_nine = attention.cache_entries(x_BTD, model.context(torch.zeros(1, 1, dtype=torch.int64),
                                                           positions_BT=torch.tensor([[9]])))
    assert at_zero.shape == (1, 1, 16 + 8)
    assert torch.equal(at_zero[..., :16], at_nine[..., :16])  # the latent knows no position
    assert not torch.allclose(at_zero[..., 16:], at_nine[..., 16:])
    assert torch.allclose(at_zero[..., :16].square().mean(), torch.tensor(1.0), atol=1e-4)  # normalised
    raw = attention.kv_a_proj_with_mqa(x_BTD)[..., 16:]
    assert torch.allclose(at_zero[..., 16:].norm(), raw.norm())  # the rope key is not


def test_decoding_one_by_one_through_the_cache_equals_one_forward():
    model = small_model("mla_moe_query_latent")
    ids_BT = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(4))
    layers = allocate_cache(model.config, 17, dtype=torch.float32, device=torch.device("cpu"))
    context_BS = torch.arange(1, 17).view(2, 8)
    with torch.no_grad():
        steps = [
            model.hidden(ids_BT[:, t : t + 1], positions_BT=torch.full((2, 1), t),
                         cache=CacheView(layers, context_BS[:, t : t + 1], context_BS))
            for t in range(7)
        ]
        assert torch.allclose(torch.cat(steps, dim=1), model.hidden(ids_BT), atol=1e-5)
