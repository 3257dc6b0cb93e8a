import pytest
import torch

from abyssal.engine.sampler import (
    derive_seed,
    inverse_cdf,
    kept_ids,
    largest,
    noise_key,
    probabilities,
    sample,
    sampled_logps,
    sampling,
    thresholds,
    thresholds_ref,
    uniform,
    uniform_ref,
)


def how(n=1, *, seed=0, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0):
    """n rows that draw alike; row i has seed `seed` + i."""
    return sampling(
        key_B=torch.tensor([noise_key(seed + i) for i in range(n)]), temperature_B=torch.full((n,), temperature),
        top_p_B=torch.full((n,), top_p, dtype=torch.float64), top_k_B=torch.full((n,), top_k),
        min_p_B=torch.full((n,), min_p),
    )


def kept(probs, **filters):
    """Which of the given probabilities a filter leaves."""
    logits_BV = torch.tensor([probs]).log()
    return (probabilities(logits_BV, how(**filters))[0] > 0).nonzero()[:, 0].tolist()


def chi_square(counts, probs):
    expected = torch.tensor(probs) * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


def test_noise_equals_its_plain_twin_and_is_never_one():
    seeds, positions = [0, 1, 2**63, 2**64 - 1], [0, 1, 7, 100_000]
    keys = torch.tensor([noise_key(s) for s in seeds])
    drawn = uniform(keys, torch.tensor(positions)).tolist()
    assert drawn == [uniform_ref(s, p) for s, p in zip(seeds, positions, strict=True)]
    many = uniform(torch.full((100_000,), noise_key(3)), torch.arange(100_000))
    assert 0 <= many.min() and many.max() < 1
    assert abs(many.mean().item() - 0.5) < 0.004  # four standard errors
    assert abs((many[1:] * many[:-1]).mean().item() - 0.25) < 0.004  # neighbours in position are independent


def test_neighbouring_seeds_are_independent():
    keys = torch.tensor([noise_key(seed) for seed in range(20_000)])
    drawn = uniform(keys, torch.zeros(20_000, dtype=torch.int64))
    assert abs((drawn[1:] * drawn[:-1]).mean().item() - 0.25) < 0.008


def test_derived_seeds_differ_and_repeat():
    paths = {derive_seed(5, problem, answer) for problem in range(50) for answer in range(50)}
    assert len(paths) == 2500
    assert derive_seed(5, 3, 4) == derive_seed(5, 3, 4) != derive_seed(6, 3, 4)


def test_inverse_cdf_walks_the_vocabulary_in_order():
    probs = torch.tensor([[0.1, 0.0, 0.5, 0.4]]).repeat(5, 1)
    at = torch.tensor([0.0, 0.0999, 0.1001, 0.5999, 0.9999], dtype=torch.float64)
    assert inverse_cdf(probs, at).tolist() == [0, 0, 2, 2, 3]


def test_inverse_cdf_never_draws_what_has_no_probability():
    probs = torch.rand(200, 150)
    probs[torch.rand(200, 150) < 0.9] = 0.0
    probs[:, 77] = 1e-3
    for u in (0.0, 0.5, 1 - 2**-53):
        ids = inverse_cdf(probs, torch.full((200,), u, dtype=torch.float64))
        assert (probs.gather(1, ids[:, None]) > 0).all()


def test_inverse_cdf_equals_the_plain_running_sum_over_chunks():
    probs = torch.rand(64, 1000) ** 8
    at = torch.rand(64, dtype=torch.float64)
    total = probs.double().cumsum(-1)
    plain = (total <= at[:, None] * total[:, -1:]).sum(-1)
    assert torch.equal(inverse_cdf(probs, at), plain)


def test_draws_follow_the_distribution():
    probs = [0.4, 0.3, 0.15, 0.1, 0.05]
    n = 20_000
    logits_BV = torch.tensor([probs]).log().repeat(n, 1) + 3.0  # a constant changes nothing
    drawn = sample(logits_BV, torch.arange(n), how(n)._replace(key_B=torch.full((n,), noise_key(1))))
    assert chi_square(drawn.ids_B.bincount(minlength=5), probs) < 18.5  # 99.9 % point for 4 degrees of freedom
    by_seed = sample(logits_BV, torch.zeros(n, dtype=torch.int64), how(n))
    assert chi_square(by_seed.ids_B.bincount(minlength=5), probs) < 18.5


def test_temperature_two_takes_the_square_root_of_the_odds():
    drawn_from = probabilities(torch.tensor([[0.8, 0.2]]).log(), how(temperature=2.0))[0]
    assert (drawn_from[0] / drawn_from[1]).item() == pytest.approx(2.0, rel=1e-5)  # sqrt(0.8 / 0.2)


def test_the_largest_is_the_first_of_equals_and_a_nan_is_larger_than_all():
    logits = torch.tensor([[3.0, 7.0, 1.0, 7.0, 9.0], [0.0, torch.nan, 8.0, torch.inf, 9.0], [-torch.inf] * 5])
    assert largest(logits[:, :4]).tolist() == [1, 1, 0] == logits[:, :4].argmax(-1).tolist()
    noise = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(largest(noise), noise.argmax(-1))


def test_log_probs_are_the_models_own_whatever_the_filters():
    logits_BV = torch.tensor([[0.5, 0.3, 0.2]]).log()
    drawn = sample(logits_BV, torch.tensor([0]), how(temperature=0.5, top_k=1))
    assert drawn.ids_B.tolist() == [0]
    assert drawn.logps_B.exp().item() == pytest.approx(0.5, rel=1e-6)


def test_filters_by_hand():
    probs = [0.05, 0.4, 0.1, 0.3, 0.15]
    assert kept(probs, top_k=2) == [1, 3]
    assert kept(probs, top_p=0.69) == [1, 3]  # 0.4 + 0.3 reaches it
    assert kept(probs, top_p=0.71) == [1, 3, 4]
    assert kept(probs, top_p=0.01) == [1]
    assert kept(probs, min_p=0.3) == [1, 3, 4]  # at least 0.3 x 0.4
    assert kept(probs, top_k=3, top_p=0.5) == [1, 3]  # 0.5 of 0.85: 0.4 is not enough
    assert kept(probs, top_k=3, top_p=0.45) == [1]  # 0.45 of 0.85 is 0.3825
    assert kept(probs, top_p=0.9, min_p=0.5) == [1, 3]


def test_ties_at_a_threshold_stay():
    assert kept([0.2, 0.4, 0.2, 0.2], top_k=2) == [0, 1, 2, 3]
    assert kept([0.25, 0.25, 0.25, 0.25], top_p=0.3) == [0, 1, 2, 3]


def test_a_few_candidates_settle_what_the_whole_sort_says():
    generator = torch.Generator().manual_seed(0)
    n = 300
    sharpness = torch.rand(n, 1, generator=generator) * 4
    probs_BV = (torch.randn(n, 500, generator=generator) * sharpness).softmax(-1)
    probs_BV[::3] = (probs_BV[::3] * 200).round() / 200 + 1e-3  # many ties
    filters = {
        "top_p_B": torch.rand(n, generator=generator, dtype=torch.float64).clamp(min=0.05),
        "top_k_B": torch.randint(0, 400, (n,), generator=generator) * (torch.rand(n, generator=generator) < 0.5),
        "min_p_B": torch.rand(n, generator=generator) * 0.1,
    }
    filters["top_p_B"][::4] = 1.0
    assert torch.equal(thresholds(probs_BV, **filters), thresholds_ref(probs_BV, **filters))


def test_rows_with_different_params_do_not_disturb_each_other():
    logits_BV = torch.randn(6, 300, generator=torch.Generator().manual_seed(1))
    each = [how(seed=i, temperature=t, top_p=p, top_k=k, min_p=m)
            for i, (t, p, k, m) in enumerate([(1.0, 1.0, 0, 0.0), (0.0, 1.0, 0, 0.0), (0.5, 0.9, 0, 0.0),
                                              (1.0, 1.0, 5, 0.0), (2.0, 0.8, 50, 0.01), (1e-9, 1.0, 0, 0.0)])]
    fields = ("key_B", "temperature_B", "top_p_B", "top_k_B", "min_p_B")
    together = sampling(**{name: torch.cat([getattr(h, name) for h in each]) for name in fields})
    positions = torch.arange(6)
    drawn = sample(logits_BV, positions, together)
    alone = [sample(logits_BV[i : i + 1], positions[i : i + 1], h) for i, h in enumerate(each)]
    assert drawn.ids_B.tolist() == [a.ids_B.item() for a in alone]
    assert drawn.logps_B.tolist() == [a.logps_B.item() for a in alone]
    greedy = logits_BV.argmax(-1)
    assert drawn.ids_B[1] == greedy[1] and drawn.ids_B[5] == greedy[5]


def test_what_was_drawn_from_by_hand():
    probs_BV = torch.tensor([[0.4, 0.0, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]])
    assert sampled_logps(probs_BV, torch.tensor([2, 3])).exp().tolist() == pytest.approx([0.2 / 0.6, 0.4])
    assert [ids.tolist() for ids in kept_ids(probs_BV)] == [[0, 2], [0, 1, 2, 3]]
