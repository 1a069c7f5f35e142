"""RQM's distributions and guarantees against enumeration, linear-space sums and a second library."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from groundwire.plugins.privacy import epsilon_of_rdp, renyi_divergence, rqm_epsilon, rqm_log_pmf, rqm_rdp

PAPER: dict[str, Any] = {"clip": 1.0, "margin": 1.0, "num_levels": 16, "keep_probability": 0.42}


def enumerate_kept_sets(x: float, clip: float, margin: float, num_levels: int, keep_probability: float) -> np.ndarray:
    """The mechanism as it is told: over all subsets of inner levels that may be kept."""
    top = clip + margin
    levels = [-top + 2 * i * top / (num_levels - 1) for i in range(num_levels)]
    pmf = np.zeros(num_levels)
    for inner in itertools.product([False, True], repeat=num_levels - 2):
        weight = math.prod(keep_probability if kept else 1 - keep_probability for kept in inner)
        kept = [0, *(i + 1 for i, yes in enumerate(inner) if yes), num_levels - 1]
        a = max(i for i in kept[:-1] if i == 0 or levels[i] <= x)
        b = min(i for i in kept if i > a)
        up = (x - levels[a]) / (levels[b] - levels[a])
        pmf[b] += weight * up
        pmf[a] += weight * (1 - up)
    return pmf


def divergence(p: np.ndarray, q: np.ndarray, order: float) -> float:
    """In linear space, where nothing over- or underflows."""
    return math.log(float((p * (p / q) ** (order - 1)).sum())) / (order - 1)


@pytest.mark.parametrize("num_levels", [2, 3, 4, 7, 10])
@pytest.mark.parametrize(("margin", "keep"), [(1.0, 0.42), (0.1, 0.9), (3.0, 0.05)])
def test_pmf_is_that_of_all_kept_sets_and_unbiased(num_levels: int, margin: float, keep: float) -> None:
    x = np.array([-2.0, -1.3, 0.0, 0.77, 2.0])
    settings: dict[str, Any] = {"clip": 2.0, "margin": margin, "num_levels": num_levels, "keep_probability": keep}
    ours = np.exp(rqm_log_pmf(x, **settings))
    expected = np.array([enumerate_kept_sets(float(value), **settings) for value in x])
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(ours @ np.linspace(-2 - margin, 2 + margin, num_levels), x, atol=1e-13)


def test_scalars_on_a_level_and_all_shapes() -> None:
    settings: dict[str, Any] = {"clip": 1.0, "margin": 0.5, "num_levels": 7, "keep_probability": 0.3}  # levels at 0.5 i
    for x in (-1.0, -0.5, 0.0, 0.5, 1.0):
        np.testing.assert_allclose(np.exp(rqm_log_pmf(x, **settings)), enumerate_kept_sets(x, **settings), rtol=1e-12)
    assert rqm_log_pmf(np.zeros((2, 3)), **settings).shape == (2, 3, 7)


def test_values_computed_apart_by_enumeration() -> None:
    low, high, zero = (enumerate_kept_sets(x, **PAPER) for x in (-1.0, 1.0, 0.0))
    pure, two = math.log((high / low).max()), divergence(high, low, 2)
    assert (round(pure, 3), round(two, 3)) == (5.470, 5.064)
    assert round(float(zero @ np.linspace(-2, 2, 16) ** 2), 3) == 0.243
    np.testing.assert_allclose(rqm_rdp([2.0, math.inf], **PAPER), [two, pure], rtol=1e-10)
    assert rqm_epsilon(delta=0.0, **PAPER) == pytest.approx(pure)
    assert pure <= math.log(2 * (1 + 1)) - 14 * math.log1p(-0.42), "a bound that holds for any number of levels"


def test_the_two_ends_of_the_range_are_not_always_the_worst_pair() -> None:
    settings: dict[str, Any] = {"clip": 1.0, "margin": 1.992, "num_levels": 7, "keep_probability": 0.9312}
    low, high = (enumerate_kept_sets(x, **settings) for x in (-1.0, 1.0))
    dense = [enumerate_kept_sets(x, **settings) for x in np.linspace(-1, 1, 61)]
    dense += [enumerate_kept_sets(x, **settings) for x in (-2.992 / 3, 2.992 / 3)]  # levels just inside the range
    for order in (2.0, 8.0):
        worst = max(divergence(p, q, order) for p in dense for q in dense)
        assert worst > divergence(high, low, order) + 1e-3
        assert rqm_rdp([order], **settings)[0] == pytest.approx(worst, rel=1e-9)


@pytest.mark.parametrize(("margin", "keep", "num_levels"), [(1.0, 0.42, 4), (1.01, 0.693, 6), (0.443, 0.869, 5)])
def test_secure_aggregation_against_all_values_of_two_other_devices(
    margin: float, keep: float, num_levels: int
) -> None:
    settings: dict[str, Any] = {"clip": 1.0, "margin": margin, "num_levels": num_levels, "keep_probability": keep}
    levels = np.linspace(-1 - margin, 1 + margin, num_levels)
    grid = sorted({-1.0, 1.0, 0.0, 0.4, *levels[np.abs(levels) < 1].tolist()})
    pmfs = [enumerate_kept_sets(x, **settings) for x in grid]
    others = [np.convolve(a, b) for a, b in itertools.combinations_with_replacement(pmfs, 2)]
    orders = [1.1, 2.0, 8.0]
    ours, local = rqm_rdp(orders, num_shares=3, **settings), rqm_rdp(orders, **settings)
    for order, found, alone in zip(orders, ours, local, strict=True):
        worst = max(
            divergence(np.convolve(p, other), np.convolve(q, other), order)
            for other in others for p in pmfs for q in pmfs
        )  # fmt: skip
        assert found == pytest.approx(worst, rel=1e-9)
        assert found < alone


def test_secure_aggregation_of_forty_devices_in_linear_space() -> None:
    low, high, zero = (enumerate_kept_sets(x, **{**PAPER, "num_levels": 16}) for x in (-1.0, 1.0, 0.0))
    found = rqm_rdp([2.0, 8.0], num_shares=40, **PAPER)
    for other, order_2, order_8 in ((zero, 0.4055, 1.312), (low, None, None), (high, None, None)):
        rest = np.ones(1)
        for _ in range(39):
            rest = np.convolve(rest, other)
        p, q = np.convolve(high, rest), np.convolve(low, rest)
        assert divergence(p, q, 2) <= found[0] * (1 + 1e-9)
        assert divergence(p, q, 8) <= found[1] * (1 + 1e-9)
        assert order_2 is None or round(divergence(p, q, 2), 4) == order_2
        assert order_8 is None or round(divergence(p, q, 8), 3) == order_8
    assert found[0] < 1.25 * 0.4055, "others at zero are not the worst, but not far from it"


def test_log_space_holds_where_linear_space_fails() -> None:
    high_orders = rqm_rdp([500.0, 4000.0, math.inf], **PAPER)
    assert np.isfinite(high_orders).all()
    assert (np.diff(high_orders) >= 0).all(), "divergences grow with the order"
    rare: dict[str, Any] = {"clip": 1.0, "margin": 0.01, "num_levels": 60, "keep_probability": 1 - 1e-9}
    assert np.isfinite(rqm_log_pmf([-1.0, 1.0], **rare)).all(), "the far end has probability 1e-500"


def test_epsilon_is_above_the_numerical_composition_of_a_second_library() -> None:
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    log_low, log_high = (np.log(enumerate_kept_sets(x, **PAPER)) for x in (-1.0, 1.0))
    one = pld.from_two_probability_mass_functions(dict(enumerate(log_low)), dict(enumerate(log_high)))
    for releases, delta in ((1, 1e-6), (10, 1e-6), (100, 1e-5)):
        exact = one.self_compose(releases).get_epsilon_for_delta(delta)
        ours = rqm_epsilon(delta=delta, releases=releases, **PAPER)
        assert exact - 2e-4 * releases <= ours <= 1.15 * exact + 0.1  # its losses are on a grid of 1e-4
    summed = [np.log(_with_others(log, 9)) for log in (log_low, log_high)]
    ten = pld.from_two_probability_mass_functions(*(dict(enumerate(log)) for log in summed))
    exact = ten.get_epsilon_for_delta(1e-6)
    assert round(exact, 2) == 4.13
    assert exact <= rqm_epsilon(delta=1e-6, num_shares=10, **PAPER) <= 1.3 * exact


def _with_others(log_pmf: np.ndarray, others: int) -> np.ndarray:
    pmf, zero = np.exp(log_pmf), enumerate_kept_sets(0.0, **PAPER)
    for _ in range(others):
        pmf = np.convolve(pmf, zero)
    return pmf


def test_epsilon_falls_with_margin_and_others_and_rises_with_keeping_levels_and_releases() -> None:
    def epsilon(num_shares: int = 1, releases: int = 1, **changes: Any) -> float:
        return rqm_epsilon(delta=1e-5, num_shares=num_shares, releases=releases, **{**PAPER, **changes})

    for name, values in (
        ("margin", (3.0, 1.0, 0.66, 0.2)),
        ("keep_probability", (0.1, 0.42, 0.57, 0.9)),
        ("num_levels", (3, 6, 16, 32)),
        ("num_shares", (20, 5, 2, 1)),
        ("releases", (1, 2, 50, 1000)),
    ):
        row = [epsilon(**{name: value}) for value in values]
        assert all(a < b for a, b in itertools.pairwise(row)), name
    variance = [
        float(np.exp(rqm_log_pmf(0.0, **{**PAPER, "margin": m})) @ np.linspace(-1 - m, 1 + m, 16) ** 2)
        for m in (0.2, 1.0, 3.0)
    ]
    assert variance == sorted(variance), "what privacy costs"
    two = {"margin": 0.5, "num_levels": 2}
    assert epsilon(**two, keep_probability=0.1) == epsilon(**two, keep_probability=0.9)
    scaled = {**PAPER, "clip": 1e-3, "margin": 1e-3}
    assert rqm_epsilon(delta=1e-5, **scaled) == pytest.approx(epsilon(), rel=1e-9), "only margin / clip counts"


def test_composition_takes_the_smaller_of_both_ways() -> None:
    pure = rqm_epsilon(delta=0.0, **PAPER)
    assert rqm_epsilon(delta=1e-300, releases=3, **PAPER) == pytest.approx(3 * pure)
    assert rqm_epsilon(delta=1e-5, releases=1000, **PAPER) < 1000 * pure / 1.1


def test_renyi_divergence_of_special_pairs() -> None:
    p = np.log([0.5, 0.5])
    with np.errstate(divide="ignore"):
        sure = np.log([1.0, 0.0])
    assert renyi_divergence(p, p, 3.0) == 0
    assert renyi_divergence(sure, p, 3.0) == pytest.approx(math.log(2))
    assert renyi_divergence(p, sure, 3.0) == renyi_divergence(p, sure, math.inf) == math.inf


def _gaussian_delta(epsilon: float) -> float:
    """Of one Gaussian release with sigma 1, from the normal distribution."""
    return float(norm.cdf(0.5 - epsilon) - math.exp(epsilon) * norm.cdf(-0.5 - epsilon))


@pytest.mark.filterwarnings("error")
def test_conversion_from_renyi_to_epsilon() -> None:
    orders = np.linspace(1.01, 200, 4000)
    gaussian = epsilon_of_rdp(orders.tolist(), orders / 2, 1e-5)  # sigma 1: exactly 4.377, classically 5.298
    assert _gaussian_delta(4.377) == pytest.approx(1e-5, rel=1e-2)
    assert 4.377 < gaussian < 0.5 + 2 * math.sqrt(0.5 * math.log(1e5)) - 0.5
    assert epsilon_of_rdp([2.0], [math.inf], 1e-5) == math.inf
    assert epsilon_of_rdp([2.0, 3.0], [0.0, 0.0], 0.9) == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_levels": 1}, "`num_levels` must be at least 2, got 1"),
        ({"margin": 0.0}, "`margin` must be positive and finite, got 0.0"),
        ({"margin": math.inf}, "`margin` must be positive"),
        ({"clip": -1.0}, "`clip` must be positive and finite, got -1.0"),
        ({"clip": math.nan}, "`clip` must be positive"),
        ({"keep_probability": 0.0}, r"`keep_probability` must be in \(0, 1\), got 0.0"),
        ({"keep_probability": 1.0}, "`keep_probability` must be"),
        ({"num_shares": 0}, "`num_shares` must be at least 1, got 0"),
        ({"delta": 1.0}, r"`delta` must be in \[0, 1\), got 1.0"),
        ({"releases": 0}, "`releases` must be at least 1, got 0"),
    ],
)
def test_bad_input_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rqm_epsilon(**{"delta": 1e-5, **PAPER, **changes})


def test_bad_scalars_orders_and_shapes() -> None:
    for x in (1.5, math.nan):
        with pytest.raises(ValueError, match=r"Scalars must be in \[-1.0, 1.0\]"):
            rqm_log_pmf(x, **PAPER)
    with pytest.raises(ValueError, match=r"`orders` must be above 1, got 1\.0"):
        rqm_rdp([2.0, 1.0], **PAPER)
    with pytest.raises(ValueError, match=r"`order` must be above 1, got 0\.5"):
        renyi_divergence(np.zeros(1), np.zeros(1), 0.5)
    with pytest.raises(ValueError, match="two vectors of one length"):
        renyi_divergence(np.zeros(1), np.zeros(2), 2.0)
    with pytest.raises(ValueError, match=r"`delta` must be in \(0, 1\), got 0"):
        epsilon_of_rdp([2.0], [1.0], 0.0)
