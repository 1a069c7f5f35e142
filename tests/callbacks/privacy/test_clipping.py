"""Clipping against its formulas, and what one record can do to a sum at most."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from groundwire.callbacks.privacy.clipping import (
    AdaptiveClipping,
    Clipping,
    FlatClipping,
    PerLayerClipping,
    make_clipping,
)

INF, NAN = float("inf"), float("nan")


def norms_of(*gradients: Tensor) -> dict[Tensor, Tensor]:
    """Squared norms by parameter, of gradients ``(n, d)`` of several parameters."""
    return {torch.zeros(g.shape[1]): g.square().sum(1) for g in gradients}


def total(clipping: Clipping, *gradients: Tensor) -> Tensor:
    """The clipped sum over all parameters, flat."""
    weights = clipping.weights(norms_of(*gradients)).values()
    finite = [torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0) for g in gradients]
    return torch.cat([w @ g for w, g in zip(weights, finite, strict=True)])


def gradients(n: int = 7, sizes: tuple[int, ...] = (3, 1, 5), seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    scale = torch.rand(n, 1, generator=g, dtype=torch.float64) * 3
    return [scale * torch.randn(n, d, generator=g, dtype=torch.float64) for d in sizes]


def made(name: Any, bound: float, parameters: int) -> Clipping:
    clipping = make_clipping(name, bound)
    clipping.num_parameters = parameters
    return clipping


# ---------------------------------------------------------------- formulas


@pytest.mark.parametrize("name", ["flat", "adaptive"])
@pytest.mark.parametrize("bound", [0.1, 1.0, 50.0])
def test_one_bound_on_the_norm_over_all_parameters(name: Any, bound: float) -> None:
    parts = gradients()
    norms = norms_of(*parts)
    weights = made(name, bound, 3).weights(norms)
    assert list(weights) == list(norms)
    for i in range(7):
        norm = float(np.linalg.norm(np.concatenate([p[i].numpy() for p in parts])))
        expected = min(1.0, bound / (norm + 1e-6))
        for w in weights.values():
            assert float(w[i]) == pytest.approx(expected, rel=1e-12)
    assert not made(name, bound, 3).needs_parameters_apart


@pytest.mark.parametrize("bound", [0.1, 1.0, 50.0])
def test_a_bound_for_each_parameter_tensor(bound: float) -> None:
    parts = gradients()
    clipping = made("per_layer", bound, 3)
    weights = clipping.weights(norms_of(*parts))
    for part, w in zip(parts, weights.values(), strict=True):
        for i in range(7):
            expected = min(1.0, bound / math.sqrt(3) / (float(np.linalg.norm(part[i].numpy())) + 1e-6))
            assert float(w[i]) == pytest.approx(expected, rel=1e-12)
    assert clipping.needs_parameters_apart


def test_the_bound_for_each_parameter_counts_parameters_that_no_gradient_reached() -> None:
    """A step may leave layers out; the share of the others must not depend on it, which depends on the data."""
    part = gradients(sizes=(3,))[0] * 100
    clipping = made("per_layer", 1.0, 4)
    (w,) = clipping.weights(norms_of(part)).values()
    torch.testing.assert_close(w * part.norm(dim=1), torch.full((7,), 0.5, dtype=torch.float64), rtol=1e-6, atol=0)


def test_no_gradient_has_weight_one() -> None:
    for name in ("flat", "per_layer", "adaptive"):
        (w,) = made(name, 1.0, 1).weights({torch.zeros(1): torch.zeros(3)}).values()
        assert w.tolist() == [1.0] * 3


# ---------------------------------------------------------------- sensitivity

FLOATS = st.floats(-1e12, 1e12, allow_nan=False)


@pytest.mark.parametrize("name", ["flat", "per_layer", "adaptive"])
@settings(max_examples=60, deadline=None)
@given(
    outlier=st.lists(FLOATS, min_size=9, max_size=9),
    bound=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**20),
)
def test_a_record_moves_the_sum_by_the_bound_at_most(name: Any, outlier: list[float], bound: float, seed: int) -> None:
    parts = gradients(seed=seed)
    row = torch.tensor(outlier, dtype=torch.float64).split([3, 1, 5])
    more = [torch.cat([p, o[None]]) for p, o in zip(parts, row, strict=True)]
    clipping = made(name, bound, 3)
    moved = (total(clipping, *more) - total(clipping, *parts)).norm()
    assert moved <= bound * (1 + 1e-9)
    large = [torch.full_like(p[:1], 1e30) for p in parts]
    outlying = [torch.cat([p, o]) for p, o in zip(parts, large, strict=True)]
    moved = (total(clipping, *outlying) - total(clipping, *parts)).norm()
    assert bound * 0.999 <= moved <= bound * (1 + 1e-9)  # an outlier uses all of it, no more
    swapped = (total(clipping, *outlying) - total(clipping, *more)).norm()
    assert swapped <= 2 * bound * (1 + 1e-9)


@pytest.mark.parametrize("name", ["flat", "per_layer", "adaptive"])
def test_the_bound_holds_in_single_precision(name: Any) -> None:
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(500, d, generator=g) * 10 ** (6 * torch.rand(500, 1, generator=g) - 3) for d in (300, 20)]
    weights = made(name, 1.0, 2).weights(norms_of(*parts)).values()
    clipped = torch.cat([w[:, None].double() * p.double() for w, p in zip(weights, parts, strict=True)], 1)
    assert clipped.norm(dim=1).max() <= 1 + 1e-6


@pytest.mark.parametrize("name", ["flat", "per_layer", "adaptive"])
@pytest.mark.parametrize("value", [INF, NAN])
def test_a_record_that_is_not_finite_somewhere_has_weight_zero_everywhere(name: Any, value: float) -> None:
    norms = norms_of(*gradients())
    next(iter(norms.values()))[4] = value
    plain = made(name, 1.0, 3).weights(norms_of(*gradients()))
    weights = made(name, 1.0, 3).weights(norms)
    for w, expected in zip(weights.values(), plain.values(), strict=True):
        assert w[4] == 0
        assert torch.isfinite(w).all()
        others = [i for i in range(7) if i != 4]
        assert torch.equal(w[others], expected[others])


def test_norms_that_overflow_together_count_as_not_finite() -> None:
    norms = {torch.zeros(1): torch.tensor([3e38, 1.0]), torch.zeros(1): torch.tensor([3e38, 1.0])}
    for w in FlatClipping(1.0).weights(norms).values():
        assert w[0] == 0
        assert 0 < w[1] < 1


# ---------------------------------------------------------------- adaptive


def test_the_count_is_of_records_within_the_bound_less_half_of_all() -> None:
    clipping = AdaptiveClipping(2.0)
    norms = {torch.zeros(1): torch.tensor([1.0, 3.9, 0.0, 2.0]), torch.zeros(1): torch.tensor([1.0, 0.2, 4.0, 3.0])}
    assert float(clipping.count(norms)) == (1 + 0 + 1 + 0) - 4 / 2  # 2 <= 4, 4.1 > 4, 4 <= 4, 5 > 4
    broken = {torch.zeros(1): torch.tensor([NAN, INF])}
    assert float(clipping.count(broken)) == -1.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.floats(0, 1e30), st.floats(1e-3, 1e3))
def test_a_record_moves_the_count_by_a_half(norms: list[float], another: float, bound: float) -> None:
    clipping = AdaptiveClipping(bound)
    without = clipping.count({torch.zeros(1): torch.tensor(norms)})
    with_it = clipping.count({torch.zeros(1): torch.tensor([*norms, another])})
    assert abs(float(with_it - without)) == 0.5


@settings(max_examples=100, deadline=None)
@given(expected=st.floats(10, 1e5), share=st.floats(0.01, 0.999))
def test_both_releases_together_cost_one_gaussian(expected: float, share: float) -> None:
    clipping = AdaptiveClipping(1.0)
    count_noise = clipping.count_noise(expected)
    assert count_noise == pytest.approx(expected / 20)
    sigma = share * 2 * count_noise
    gradient = clipping.gradient_noise(sigma, expected)
    assert gradient > sigma
    # mu of each release is its sensitivity over its noise: C / (gradient C), and 1/2 / count_noise
    assert (1 / gradient) ** 2 + (0.5 / count_noise) ** 2 == pytest.approx((1 / sigma) ** 2, rel=1e-9)


def test_noise_beyond_that_of_the_count_is_refused() -> None:
    clipping = AdaptiveClipping(1.0)
    for sigma in (2.0, 5.0):
        with pytest.raises(ValueError, match=r"cannot hide its count .* only 20 records"):
            clipping.gradient_noise(sigma, 20.0)
    assert clipping.gradient_noise(1.99, 20.0) > 1.99
    assert clipping.gradient_noise(0.0, 20.0) == 0.0


@pytest.mark.parametrize("name", ["flat", "per_layer"])
def test_a_fixed_bound_releases_nothing_else(name: Any) -> None:
    clipping = make_clipping(name, 1.5)
    assert clipping.gradient_noise(1.1, 30.0) == 1.1
    assert clipping.count_noise(30.0) is None
    clipping.update(3.0, 30.0)
    assert clipping.max_grad_norm == 1.5


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("start", [0.01, 100.0])
def test_the_bound_converges_to_the_quantile_of_the_norms(quantile: float, start: float) -> None:
    """Log-normal norms, so that the quantile is known; batches vary in size as Poisson sampling makes them."""
    rng = np.random.default_rng(0)
    clipping = AdaptiveClipping(start, quantile, learning_rate=0.2)
    expected, later = 200.0, []
    for i in range(600):
        norms = np.exp(rng.normal(size=rng.poisson(expected)))
        count = float(clipping.count({torch.zeros(1): torch.tensor(norms) ** 2}))
        noise = clipping.count_noise(expected)
        assert noise is not None
        clipping.update(count + noise * rng.normal(), expected)
        if i >= 300:
            later.append(float(np.mean(norms <= clipping.max_grad_norm)))
    assert abs(np.mean(later) - quantile) < 0.02


def test_an_update_follows_the_published_formula() -> None:
    clipping = AdaptiveClipping(2.0, target_quantile=0.3, learning_rate=0.1)
    clipping.update(-20.0, 100.0)  # 30 of 100 within: at the quantile
    assert clipping.max_grad_norm == pytest.approx(2.0)
    clipping.update(50.0, 100.0)  # all of 100 within
    assert clipping.max_grad_norm == pytest.approx(2.0 * math.exp(-0.1 * (1.0 - 0.3)))
    clipping.update(-50.0, 100.0)  # none
    assert clipping.max_grad_norm == pytest.approx(2.0 * math.exp(-0.1 * 0.7 + 0.1 * 0.3))
    # nobody came: a count of 0 says "half", whatever the drawn size, which is private
    before = clipping.max_grad_norm
    clipping.update(0.0, 100.0)
    assert clipping.max_grad_norm == pytest.approx(before * math.exp(-0.1 * (0.5 - 0.3)))


def test_the_bound_stays_positive_and_finite() -> None:
    clipping = AdaptiveClipping(1.0)
    for sign in (1.0, -1.0):
        for _ in range(2000):
            clipping.update(sign * 50.0, 100.0)
        assert clipping.max_grad_norm > 0
        assert math.isfinite(clipping.max_grad_norm)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("bound", [0.0, -1.0, NAN, INF])
@pytest.mark.parametrize("name", ["flat", "per_layer", "adaptive"])
def test_a_bound_that_is_no_positive_number_is_refused(name: Any, bound: float) -> None:
    with pytest.raises(ValueError, match="`max_grad_norm` must be a positive number, got"):
        make_clipping(name, bound)


@pytest.mark.parametrize("quantile", [0.0, 1.0, -0.1, 2.0, NAN])
def test_quantiles_out_of_range_are_refused(quantile: float) -> None:
    with pytest.raises(ValueError, match=r"`target_quantile` must be in \(0, 1\), got"):
        make_clipping("adaptive", 1.0, quantile)


@pytest.mark.parametrize("rate", [0.0, -0.1, NAN])
def test_learning_rates_out_of_range_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="`learning_rate` of the clipping norm must be positive"):
        AdaptiveClipping(1.0, learning_rate=rate)


def test_names() -> None:
    kinds = {"flat": FlatClipping, "per_layer": PerLayerClipping, "adaptive": AdaptiveClipping}
    for name, kind in kinds.items():
        assert type(make_clipping(name, 1.0)) is kind  # type: ignore[arg-type]
    unknown: Any = "ghost"
    with pytest.raises(ValueError, match="'flat', 'per_layer' or 'adaptive', got 'ghost'"):
        make_clipping(unknown, 1.0)
