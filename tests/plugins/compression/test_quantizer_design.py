"""Quantiser designs against published constants, integrals, and searches over a grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import linprog
from scipy.stats import norm

from groundwire.plugins.compression.quantizer_design import (
    QuantizerDesign,
    companding,
    contraction,
    design_for_rate,
    entropy_constrained,
    lagrangian,
    lloyd_max,
    lloyd_step,
    uniform_entropy_constrained,
    uniform_midtread,
)


def grid_optimum(lam: float, num_levels: int | None, points: int = 401, reach: float = 6.0) -> float:
    """Least ``D + lam H`` over all quantisers whose boundaries lie on a grid, by dynamic programming over cells."""
    edges = np.concatenate([[-np.inf], np.linspace(-reach, reach, points - 2), [np.inf]])
    low, high = np.meshgrid(edges, edges, indexing="ij")
    p = np.where(low > 0, norm.sf(low) - norm.sf(high), norm.cdf(high) - norm.cdf(low))
    with np.errstate(divide="ignore", invalid="ignore"):
        cell = np.where(p > 0, -((norm.pdf(low) - norm.pdf(high)) ** 2) / p - lam * p * np.log2(p), np.inf)
    cell[np.tril_indices(points)] = np.inf
    if num_levels is None:
        best = np.zeros(points)
        for j in range(1, points):
            best[j] = (best[:j] + cell[:j, j]).min()
        return 1 + float(best[-1])
    best, least = cell[0], cell[0, -1]
    for _ in range(num_levels - 1):
        best = (best[:, None] + cell).min(axis=0)
        least = min(least, best[-1])
    return 1 + float(least)


def by_integration(design: QuantizerDesign) -> tuple[float, float]:
    """Mean squared error and entropy, cell by cell, with a quadrature."""
    edges = [-math.inf, *design.boundaries, math.inf]
    error = entropy = 0.0
    for low, high, level in zip(edges[:-1], edges[1:], design.levels, strict=True):
        error += quad(lambda z, s=level: (z - s) ** 2 * norm.pdf(z), max(low, -12), min(high, 12), epsabs=1e-12)[0]
        p = quad(norm.pdf, max(low, -12), min(high, 12), epsabs=1e-13)[0]
        entropy -= p * math.log2(max(p, 1e-300))
    return error, entropy


# ---------------------------------------------------------------- Lloyd-Max

MAX_1960 = {  # N: levels above zero, mean squared error, entropy in bits: Max, IRE Trans. Inf. Theory 6, Table I
    2: ([0.7980], 0.3634, 1.000),
    3: ([1.224], 0.1902, 1.536),
    4: ([0.4528, 1.510], 0.1175, 1.911),
    5: ([0.7646, 1.724], 0.07994, 2.203),
    8: ([0.2451, 0.7560, 1.344, 2.152], 0.03454, 2.825),
    16: ([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497, 3.765),
}


@pytest.mark.parametrize("num_levels", MAX_1960)
def test_lloyd_max_is_the_published_table(num_levels: int) -> None:
    levels, error, entropy = MAX_1960[num_levels]
    design = lloyd_max(num_levels)
    np.testing.assert_allclose(design.levels[design.levels > 1e-9], levels, rtol=5e-4)
    assert design.distortion == pytest.approx(error, rel=5e-4)
    assert design.rate == pytest.approx(entropy, abs=5e-4)
    assert len(design.levels) == num_levels


def test_lloyd_max_of_many_levels_obeys_panter_and_dite() -> None:
    """``D -> sqrt(3) pi / 2 / N^2``, from below."""
    for num_levels, tolerance in ((64, 0.04), (256, 0.01)):
        law = math.sqrt(3) * math.pi / 2 / num_levels**2
        assert 1 - tolerance < lloyd_max(num_levels).distortion / law < 1


# ---------------------------------------------------------------- entropy-constrained

ALTERNATING = [  # lam, most levels, D, H: a plain alternating iteration, written apart; its 3000 rounds leave 1e-4 in H
    (0.005, 64, 0.00361, 4.3123),
    (0.01, 64, 0.00721, 3.8122),
    (0.02, 64, 0.01443, 3.3122),
    (0.02, 8, 0.03539, 2.7468),
    (0.05, 64, 0.03607, 2.6511),
    (0.05, 8, 0.04250, 2.5505),
    (0.1, 63, 0.07217, 2.1507),
    (0.2, 63, 0.14461, 1.6487),
    (0.3, 63, 0.21856, 1.3494),
    (0.5, 63, 0.41848, 0.8510),
    (0.7, 63, 0.71949, 0.3467),
    (1.2, 63, 1.0, 0.0),
]


@pytest.mark.parametrize(("lam", "num_levels", "error", "entropy"), ALTERNATING)
def test_entropy_constrained_table(lam: float, num_levels: int, error: float, entropy: float) -> None:
    design = entropy_constrained(lam, num_levels)
    assert design.distortion == pytest.approx(error, abs=1e-4)
    assert design.rate == pytest.approx(entropy, abs=1.5e-4)
    assert len(design.levels) <= num_levels


@pytest.mark.parametrize(("lam", "huffman"), [(0.1, 2.253), (0.2, 1.785), (0.3, 1.558), (0.5, 1.266), (0.7, 1.052)])
def test_huffman_codes_lose_more_the_lower_the_rate(lam: float, huffman: float) -> None:
    assert entropy_constrained(lam).huffman_rate == pytest.approx(huffman, abs=1e-3)


@pytest.mark.parametrize(
    ("lam", "num_levels"),
    [(0.0, 5), (0.0, 8), (0.01, None), (0.05, None), (0.05, 8), (0.1, 3), (0.3, None), (0.3, 6), (0.5, 4), (0.9, None)],
)
def test_no_quantizer_on_a_grid_is_better(lam: float, num_levels: int | None) -> None:
    cost = lagrangian(entropy_constrained(lam, num_levels).boundaries, lam)
    assert cost <= grid_optimum(lam, num_levels) + 2e-6  # an asymmetric one may be better, by so little
    assert cost >= grid_optimum(lam, num_levels) - 1e-4, "the grid has a step of 0.03"


@pytest.mark.parametrize(("lam", "num_levels"), [(0.0, 6), (0.0, 64), (0.002, None), (0.05, 8), (0.1, None), (0.6, 5)])
def test_optimality_conditions(lam: float, num_levels: int | None) -> None:
    design = entropy_constrained(lam, num_levels)
    cost = lam * -np.log2(design.pmf)
    left = (design.boundaries - design.levels[:-1]) ** 2 + cost[:-1]
    right = (design.boundaries - design.levels[1:]) ** 2 + cost[1:]
    np.testing.assert_allclose(left, right, atol=1e-8)
    edges = [-math.inf, *design.boundaries, math.inf]
    for low, high, level, p in zip(edges[:-1], edges[1:], design.levels, design.pmf, strict=True):
        if p > 1e-9:
            mean = (
                quad(lambda z: z * norm.pdf(z), low, high, epsabs=1e-14)[0] / quad(norm.pdf, low, high, epsabs=1e-14)[0]
            )
            assert level == pytest.approx(mean, abs=1e-6 if p < 1e-6 else 1e-8)


@pytest.mark.parametrize("lam", [1e-5, 0.003, 0.07, 0.25, 0.45, 0.8])
@pytest.mark.parametrize("num_levels", [2, 5, 8, 64, None])
def test_designs_are_symmetric(lam: float, num_levels: int | None) -> None:
    design = entropy_constrained(lam, num_levels)
    np.testing.assert_allclose(design.levels, -design.levels[::-1], atol=1e-12)
    np.testing.assert_array_equal(design.boundaries, -design.boundaries[::-1])
    assert (np.diff(design.boundaries) > 0).all()
    assert design.pmf.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.02, 0.2])
def test_an_alternating_round_never_costs_more(lam: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        boundaries = np.sort(rng.normal(size=6))
        costs = [lagrangian(boundaries, lam)]
        for _ in range(60):
            boundaries = lloyd_step(boundaries, lam)
            if (np.diff(boundaries) < 1e-3).any():  # a cell has vanished
                break
            costs.append(lagrangian(boundaries, lam))
        assert (np.diff(costs) <= 1e-13).all()


@pytest.mark.parametrize("design", [lloyd_max(7), entropy_constrained(0.2), uniform_midtread(0.8, 5), companding(6)])
def test_distortion_and_rate_are_those_of_the_integrals(design: QuantizerDesign) -> None:
    error, entropy = by_integration(design)
    assert design.distortion == pytest.approx(error, abs=1e-9)
    assert design.rate == pytest.approx(entropy, abs=1e-9)
    assert design.rate <= design.huffman_rate < design.rate + 1


def test_distortion_is_that_of_a_million_normals() -> None:
    z = np.random.default_rng(0).normal(size=1_000_000)
    for design in (lloyd_max(8), entropy_constrained(0.1), entropy_constrained(0.02, 8), uniform_midtread(1.0)):
        decoded = design.levels[np.searchsorted(design.boundaries, z)]
        assert np.mean((z - decoded) ** 2) == pytest.approx(design.distortion, rel=0.01)


@pytest.mark.parametrize("lam", [0.0005, 0.002, 0.01])
def test_high_rate_laws(lam: float) -> None:
    """The price of a bit is the slope of ``D ~ 2^(-2H)``, and the space-filling loss is that of the cube."""
    design = entropy_constrained(lam)
    assert design.distortion == pytest.approx(lam / (2 * math.log(2)), rel=1e-3)
    gap = design.rate - 0.5 * math.log2(1 / design.distortion)
    assert gap == pytest.approx(0.5 * math.log2(2 * math.pi * math.e / 12), abs=1e-3)


def test_bits_too_expensive_leave_one_level() -> None:
    """Shannon's slope at rate zero is ``2 ln 2``, and no quantiser is steeper."""
    for lam in (1.4, 2.0, 50.0):
        for family in (entropy_constrained, uniform_entropy_constrained):
            design = family(lam)
            assert (len(design.levels), design.rate, design.distortion, design.huffman_rate) == (1, 0, 1, 0)


# ---------------------------------------------------------------- uniform


@pytest.mark.parametrize(
    ("step", "error", "entropy"), [(0.5, 0.02041, 3.0620), (1.0, 0.07692, 2.1048), (1.5, 0.15784, 1.5857)]
)
def test_uniform_midtread_table(step: float, error: float, entropy: float) -> None:
    design = uniform_midtread(step)
    assert design.distortion == pytest.approx(error, abs=1e-5)
    assert design.rate == pytest.approx(entropy, abs=1e-4)
    assert len(design.levels) % 2 == 1
    np.testing.assert_allclose(np.diff(design.boundaries), step)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0])
def test_with_enough_levels_uniform_is_as_good_as_optimal(rate: float) -> None:
    uniform, _ = design_for_rate(uniform_entropy_constrained, rate)
    optimal, _ = design_for_rate(entropy_constrained, rate)
    assert optimal.distortion <= uniform.distortion * (1 + 1e-6) <= optimal.distortion * (1 + 1e-3)
    few, most = design_for_rate(uniform_entropy_constrained, 2.5, 8)[0], design_for_rate(entropy_constrained, 2.5, 8)[0]
    assert few.distortion > 1.05 * most.distortion, "with few levels it is not"


@pytest.mark.parametrize(("lam", "num_levels"), [(0.02, None), (0.2, None), (0.6, None), (0.0, 5), (0.05, 8)])
def test_uniform_step_is_the_best_of_a_scan(lam: float, num_levels: int | None) -> None:
    design = uniform_entropy_constrained(lam, num_levels)
    assert design.step is not None
    cost = design.distortion + lam * design.rate
    for step in np.geomspace(0.1, 8, 300):
        other = uniform_midtread(float(step), num_levels)
        assert cost <= other.distortion + lam * other.rate + 1e-12
    np.testing.assert_allclose(np.diff(design.boundaries), design.step)


# ---------------------------------------------------------------- companding


@pytest.mark.parametrize("num_levels", [2, 5, 16])
def test_companding_is_uniform_after_the_mu_law(num_levels: int) -> None:
    design = companding(num_levels, mu=255.0, clip=3.0)

    def compress(z: np.ndarray) -> np.ndarray:
        return np.sign(z) * np.log(1 + 255 * np.abs(z) / 3) / np.log(256)

    np.testing.assert_allclose(compress(design.boundaries), np.linspace(-1, 1, num_levels + 1)[1:-1], atol=1e-12)
    np.testing.assert_allclose(compress(design.levels), (np.arange(num_levels) + 0.5) / num_levels * 2 - 1, atol=1e-12)
    flat = companding(num_levels, mu=1e-9, clip=3.0)
    np.testing.assert_allclose(flat.boundaries, np.linspace(-3, 3, num_levels + 1)[1:-1], atol=1e-6)


# ---------------------------------------------------------------- rates


@pytest.mark.parametrize("family", [entropy_constrained, uniform_entropy_constrained])
@pytest.mark.parametrize(("rate", "num_levels"), [(0.02, None), (1.0, None), (2.4, 8), (4.0, None), (6.5, None)])
def test_design_for_rate(family: type, rate: float, num_levels: int | None) -> None:
    design, lam = design_for_rate(family, rate, num_levels)
    assert rate - 1e-5 <= design.rate <= rate
    assert family(lam, num_levels).rate == design.rate


def test_the_finest_design_is_reached() -> None:
    finest = lloyd_max(8)
    design, _ = design_for_rate(entropy_constrained, finest.rate, 8)
    assert design.rate == pytest.approx(finest.rate, abs=1e-5)
    with pytest.raises(ValueError, match=r"finest design with 8 levels takes 2\.8249"):
        design_for_rate(entropy_constrained, 2.9, 8)
    with pytest.raises(ValueError, match="Allow more levels"):
        design_for_rate(entropy_constrained, 0.5, 2)  # one bit, or none
    with pytest.raises(ValueError, match="positive number of bits"):
        design_for_rate(entropy_constrained, 0.0)


# ---------------------------------------------------------------- contraction


@pytest.mark.parametrize("numel", [2, 3, 17, 400])
@pytest.mark.parametrize(
    "design", [lloyd_max(5), lloyd_max(4), entropy_constrained(0.1), entropy_constrained(0.6), companding(7)], ids=str
)
def test_contraction_is_the_linear_programme(design: QuantizerDesign, numel: int) -> None:
    """The worst mixture of magnitudes with mean square 1, on a fine grid."""
    z = np.unique(np.concatenate([np.linspace(0, math.sqrt(numel - 1), 4001), [1.0]]))
    error = (z - design.levels[np.searchsorted(design.boundaries, z)]) ** 2
    above = (z - design.levels[np.searchsorted(design.boundaries, z, side="right")]) ** 2
    worst = linprog(-np.maximum(error, above), A_eq=[np.ones_like(z), z**2], b_eq=[1, 1]).fun
    bound = contraction(design, numel)
    if bound is None:
        assert worst < -1 + 1e-3
    else:
        assert 1 - bound >= -worst - 1e-9
        assert 1 - bound <= -worst + 0.02 * max(1, 1 / math.sqrt(numel)), "and no looser than the grid"
        assert 0 < bound <= 1


@pytest.mark.parametrize("numel", [2, 5, 60])
def test_no_row_is_worse_than_contraction_says(numel: int) -> None:
    rng = np.random.default_rng(1)
    for design in (lloyd_max(5), entropy_constrained(0.05), uniform_midtread(1.0)):
        bound = contraction(design, numel)
        assert bound is not None
        for power in (0, 1, 3, 9):
            rows = rng.normal(size=(400, numel))
            rows = np.sign(rows) * np.abs(rows) ** power
            rows = rows[rows.std(axis=1) > 0]
            z = (rows - rows.mean(axis=1, keepdims=True)) / rows.std(axis=1, keepdims=True)
            error = (z - design.levels[np.searchsorted(design.boundaries, z)]) ** 2
            assert (error.mean(axis=1) <= 1 - bound + 1e-9).all()


def test_contraction_of_one_entry() -> None:
    assert contraction(lloyd_max(2), 1) == 1.0


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: entropy_constrained(-0.1), "`lam` is a price"),
        (lambda: entropy_constrained(math.nan), "`lam` is a price"),
        (lambda: entropy_constrained(0.0), "`num_levels` has to be given"),
        (lambda: entropy_constrained(0.1, 1), "a quantiser needs 2 levels"),
        (lambda: entropy_constrained(0.1, 257), "a symbol is one byte"),
        (lambda: uniform_entropy_constrained(0.1, 2), "needs 3 levels"),
        (lambda: uniform_midtread(0.0), "`step` must be a positive"),
        (lambda: companding(4, mu=0.0), "`mu` and `clip` must be positive"),
        (lambda: companding(4, clip=-1.0), "`mu` and `clip` must be positive"),
    ],
)
def test_refusals(build: type, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
