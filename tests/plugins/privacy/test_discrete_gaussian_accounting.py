"""The discrete Gaussian against its definition, exact divergences of its sums and a second library."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, norm

from groundwire.plugins.privacy import (
    discrete_gaussian_epsilon,
    discrete_gaussian_rdp,
    rounded_norm_bound,
    sample_discrete_gaussian,
)


def discrete_gaussian(sigma: float, reach: int) -> np.ndarray:
    k = np.arange(-reach, reach + 1)
    weight = np.exp(-(k**2) / (2 * sigma**2))
    return weight / weight.sum()


def draw(count: int, sigma: float, seed: int = 0) -> torch.Tensor:
    return sample_discrete_gaussian(count, sigma, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0, 2.7, 10.0])
def test_sampler_has_the_defined_distribution(sigma: float) -> None:
    n, reach = 200_000, math.ceil(4 * sigma) + 1
    sample = draw(n, sigma).clamp(-reach, reach).numpy()
    counts = np.bincount(sample + reach, minlength=2 * reach + 1)
    pmf = discrete_gaussian(sigma, 20 * reach)
    expected = pmf[19 * reach : 21 * reach + 1].copy()
    expected[0] += pmf[: 19 * reach].sum()
    expected[-1] += pmf[21 * reach + 1 :].sum()
    enough = n * expected > 5
    assert counts[n * expected < 1e-3].sum() == 0
    observed = np.append(counts[enough], counts[~enough].sum())
    wanted = np.append(n * expected[enough], max(n * expected[~enough].sum(), 1e-9))
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1] * observed[:-1].sum() / wanted[:-1].sum()
    assert chisquare(observed, wanted).pvalue > 1e-4
    wrong = discrete_gaussian(1.03 * sigma, 20 * reach)[19 * reach : 21 * reach + 1]
    wrong = wrong[enough] / wrong[enough].sum() * counts[enough].sum()
    assert chisquare(counts[enough], wrong).pvalue < 1e-4, "three per cent more noise would be seen"


def test_sampler_of_large_parameters_is_a_gaussian_to_the_last_moment_seen() -> None:
    n = 100_000
    sample = draw(n, 1e4).double() / 1e4
    assert abs(sample.mean()) < 5 / math.sqrt(n)
    assert abs(sample.square().mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs((sample**4).mean() - 3) < 5 * math.sqrt(96 / n)


def test_sampler_edges() -> None:
    assert draw(5, 0.0).tolist() == [0] * 5
    assert draw(0, 3.0).shape == (0,)
    assert draw(1, 1e-3).dtype == torch.int64
    assert torch.equal(draw(100, 2.0, seed=3), draw(100, 2.0, seed=3))
    for sigma in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="`sigma` must be at least 0 and finite"):
            draw(1, sigma)


@pytest.mark.parametrize("sigma", [0.5, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("num_shares", [1, 2, 5])
def test_guarantee_is_above_the_exact_divergence_of_sums(sigma: float, num_shares: int) -> None:
    reach = math.ceil(12 * sigma) + 3
    one = discrete_gaussian(sigma, reach)
    total = one
    for _ in range(num_shares - 1):
        total = np.convolve(total, one)
    for shift, order in itertools.product((1, 2, 3), (1.2, 2.0, 4.0)):
        p, q = total[shift:], total[: len(total) - shift]
        both = (p > 1e-250) & (q > 1e-250)
        exact = math.log((p[both] * (p[both] / q[both]) ** (order - 1)).sum()) / (order - 1)
        for numel in (1, 7):  # the same shift of each entry: divergences of independent entries add
            (bound,) = discrete_gaussian_rdp(
                [order], sensitivity=shift * math.sqrt(numel), sigma=sigma, numel=numel, num_shares=num_shares
            )
            assert numel * exact <= bound * (1 + 1e-9)
            if sigma >= 3:
                assert bound <= numel * exact * (1 + 1e-6), "and tight where the noise is not tiny"


def test_epsilon_against_the_privacy_loss_of_a_second_library() -> None:
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    for sigma, sensitivity, rounds in ((2.0, 1, 1), (4.0, 3, 1), (8.0, 2, 20)):
        one = pld.from_discrete_gaussian_mechanism(sigma, sensitivity=sensitivity)
        exact = one.self_compose(rounds).get_epsilon_for_delta(1e-5)
        ours = discrete_gaussian_epsilon(delta=1e-5, sensitivity=sensitivity, sigma=sigma, numel=1, rounds=rounds)
        assert exact <= ours <= 1.2 * exact


def test_epsilon_approaches_that_of_a_gaussian_with_the_noise_of_all_shares() -> None:
    def gaussian_delta(epsilon: float, mu: float) -> float:
        return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu))

    common: dict[str, Any] = {"delta": 1e-6, "sensitivity": 100.0, "numel": 1000}
    ours = discrete_gaussian_epsilon(**common, sigma=50.0, num_shares=16)  # mu = 100 / (50 * 4)
    assert gaussian_delta(ours, 0.5) < 1e-6 < gaussian_delta(0.85 * ours, 0.5)
    assert ours == pytest.approx(discrete_gaussian_epsilon(**common, sigma=200.0, num_shares=1), rel=1e-9)
    assert ours == pytest.approx(discrete_gaussian_epsilon(**common, sigma=100.0, num_shares=16, rounds=4), rel=1e-9)
    few = discrete_gaussian_epsilon(**common, sigma=50.0, num_shares=8)
    assert few > 1.3 * ours, "fewer honest shares protect less"


def test_small_shares_cost_what_the_paper_says() -> None:
    """Both sides of the paper's Theorem 1, term by term."""
    sigma, n, d, sensitivity = 0.8, 10, 400, 12.0
    tau = 10 * sum(math.exp(-2 * math.pi**2 * sigma**2 * k / (k + 1)) for k in range(1, n))
    concentrated = min(
        sensitivity**2 / (n * sigma**2) + 2 * tau * d, (sensitivity / (math.sqrt(n) * sigma) + tau * math.sqrt(d)) ** 2
    )
    for order in (1.5, 3.0, 20.0):
        (bound,) = discrete_gaussian_rdp([order], sensitivity=sensitivity, sigma=sigma, numel=d, num_shares=n)
        assert sensitivity**2 / (n * sigma**2) * order / 2 < bound <= concentrated * order / 2 * (1 + 1e-12)


def test_rounded_norm_bound_holds_and_is_what_the_paper_says() -> None:
    g = np.random.default_rng(0)
    for scale, d in ((0.1, 50), (3.0, 200), (40.0, 16)):
        x = g.normal(size=d) * scale
        c = float(np.linalg.norm(x))
        rounded = np.floor(x + g.random((20_000, d)))
        norms = np.linalg.norm(rounded, axis=1)
        assert norms.max() <= rounded_norm_bound(c, d, 0.0) == c + math.sqrt(d)
        for beta in (0.9, math.exp(-0.5), 0.01):
            bound = rounded_norm_bound(c, d, beta)
            paper = c**2 + d / 4 + math.sqrt(2 * math.log(1 / beta)) * (c + math.sqrt(d) / 2)
            assert bound == pytest.approx(min(math.sqrt(paper), c + math.sqrt(d)))
            exceeded = (norms > bound).mean()
            assert exceeded <= beta + 5 * math.sqrt(beta * (1 - beta) / len(norms))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": 0.0}, "`sigma` must be positive, got 0.0"),
        ({"sigma": 0.4, "num_shares": 2}, "at least 1/2 grid steps each, got 0.4"),
        ({"num_shares": 0}, "`num_shares` must be at least 1, got 0"),
        ({"sensitivity": -1.0}, "`sensitivity` and `numel` must be at least 0, got -1.0 and 10"),
        ({"rounds": 0}, "`rounds` must be at least 1, got 0"),
        ({"delta": 0.0}, r"`delta` must be in \(0, 1\), got 0.0"),
    ],
)
def test_bad_input_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        discrete_gaussian_epsilon(**{"delta": 1e-5, "sensitivity": 1.0, "sigma": 1.0, "numel": 10, **changes})


def test_bad_orders_and_norms() -> None:
    with pytest.raises(ValueError, match="`orders` must be above 1"):
        discrete_gaussian_rdp([1.0], sensitivity=1.0, sigma=1.0, numel=1)
    for beta in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"`beta` must be in \[0, 1\)"):
            rounded_norm_bound(1.0, 1, beta)
    with pytest.raises(ValueError, match="`norm` and `numel` must be at least 0"):
        rounded_norm_bound(-1.0, 1, 0.5)
