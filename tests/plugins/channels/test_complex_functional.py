"""Packing reals into complex symbols, water-filling, and projections on some of their rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from groundwire.plugins.channels import (
    AMP,
    DCTProjection,
    GaussianProjection,
    Projection,
    pack_complex,
    unpack_complex,
    water_filling,
)

# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("numel", [1, 2, 3, 10, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unpacking_undoes_packing(numel: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, numel, dtype=dtype, generator=torch.Generator().manual_seed(0))
    c = pack_complex(x)
    assert c.shape == (2, 3, math.ceil(numel / 2))
    assert c.dtype == (torch.complex64 if dtype == torch.float32 else torch.complex128)
    assert torch.equal(unpack_complex(c, numel), x)
    torch.testing.assert_close(c.abs().square().sum(-1), x.square().sum(-1))  # the same energy
    for row in range(2):
        for column in range(3):
            assert torch.equal(pack_complex(x[row, column]), c[row, column])


def test_packing_is_linear_over_the_reals() -> None:
    x, y = torch.randn(2, 9, dtype=torch.float64)
    torch.testing.assert_close(pack_complex(2 * x - 3 * y), 2 * pack_complex(x) - 3 * pack_complex(y))


# ---------------------------------------------------------------- water-filling


def by_bisection(gain: np.ndarray[Any, Any], power: float, noise_var: float) -> np.ndarray[Any, Any]:
    """The level at which the filled water is ``power``, by root finding."""
    floor = noise_var / gain
    level = scipy.optimize.brentq(
        lambda u: np.maximum(u - floor, 0).sum() - power, floor.min(), floor.max() + 2 * power, xtol=1e-13, rtol=1e-14
    )
    return np.maximum(level - floor, 0)


@settings(max_examples=60, deadline=None)
@given(
    gain=st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=12),
    power=st.floats(1e-3, 1e4),
    noise_var=st.floats(1e-2, 1e2),
)
def test_water_filling_agrees_with_root_finding(gain: list[float], power: float, noise_var: float) -> None:
    g = np.asarray(gain)
    powers, bits = water_filling(torch.from_numpy(g), power, noise_var)
    scale = power + noise_var / g.min()
    np.testing.assert_allclose(powers.numpy(), by_bisection(g, power, noise_var), rtol=1e-6, atol=1e-9 * scale)
    assert float(powers.sum()) == pytest.approx(power, rel=1e-6, abs=1e-12 * scale)
    assert float(bits) == pytest.approx(np.log2(1 + powers.numpy() * g / noise_var).sum(), rel=1e-9, abs=1e-12)
    order = np.argsort(g)
    assert (np.diff(powers.numpy()[order]) >= -1e-9 * scale).all()  # a better channel gets no less


def test_no_other_split_carries_more_bits() -> None:
    """Against a general optimiser, and a grid over three channels."""
    gain, power, noise_var = np.array([1.7, 0.6, 0.05]), 4.0, 0.8
    _, bits = water_filling(torch.from_numpy(gain), power, noise_var)

    def rate(p: np.ndarray[Any, Any]) -> Any:
        return np.log2(1 + p * gain / noise_var).sum(-1)

    sums_up = {"type": "eq", "fun": lambda p: p.sum() - power}
    best = scipy.optimize.minimize(
        lambda p: -rate(p), np.full(3, power / 3), bounds=[(0, power)] * 3, constraints=sums_up, tol=1e-12
    )
    assert float(bits) == pytest.approx(-best.fun, abs=1e-6)
    a, b = np.meshgrid(np.linspace(0, power, 401), np.linspace(0, power, 401))
    grid = np.stack([a, b, power - a - b], axis=-1)
    grid = grid[grid[..., 2] >= 0]
    assert rate(grid).max() <= float(bits) + 1e-12
    assert rate(grid).max() == pytest.approx(float(bits), abs=1e-3)


def test_water_filling_in_its_limits() -> None:
    powers, bits = water_filling(torch.tensor([0.3]), power=3.0, noise_var=0.3)
    assert (float(powers), float(bits)) == pytest.approx(
        (3.0, 2.0)
    )  # one complex use at SNR 3: log2(4), not half of it
    powers, bits = water_filling(torch.full((8,), 2.0), 4.0, 1.0)  # all alike: equal shares
    assert powers.tolist() == pytest.approx([0.5] * 8)
    assert float(bits) == pytest.approx(8.0)
    gain = torch.tensor([1.0, 0.9, 0.2])
    powers, bits = water_filling(gain, 1e-3, 1.0)  # little power: all to the best
    assert powers.tolist() == pytest.approx([1e-3, 0, 0])
    assert float(bits) == pytest.approx(1e-3 / math.log(2), rel=1e-3)
    powers, _ = water_filling(gain, 1e9, 1.0)  # much power: equal shares
    assert powers.tolist() == pytest.approx([1e9 / 3] * 3, rel=1e-6)


def test_water_filling_takes_rows_and_dead_channels() -> None:
    gain = torch.rand(5, 9, generator=torch.Generator().manual_seed(0))
    powers, bits = water_filling(gain, 7.0, 2.0)
    for m in range(5):
        alone, its_bits = water_filling(gain[m], 7.0, 2.0)
        assert torch.equal(powers[m], alone)
        assert bits[m] == its_bits
    with_dead, same_bits = water_filling(torch.cat([gain, torch.zeros(5, 6)], dim=1), 7.0, 2.0)
    torch.testing.assert_close(with_dead[:, :9], powers)
    assert not with_dead[:, 9:].any()
    torch.testing.assert_close(same_bits, bits)
    powers, bits = water_filling(torch.zeros(4), 7.0, 2.0)
    assert not powers.any()
    assert bits == 0


@pytest.mark.parametrize(
    ("power", "noise_var"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.nan)]
)
def test_water_filling_refuses_what_makes_no_sense(power: float, noise_var: float) -> None:
    with pytest.raises(ValueError, match="needs power > 0 and noise_var > 0, got"):
        water_filling(torch.ones(2), power, noise_var)


# ---------------------------------------------------------------- projections on some of their rows


def dense(projection: Projection) -> Tensor:
    return projection.mv(torch.eye(projection.numel, dtype=projection.dtype)).T


@pytest.mark.parametrize("kind", [DCTProjection, GaussianProjection])
def test_selected_rows_are_those_rows_rescaled(kind: type[Projection]) -> None:
    whole = kind(30, 61, seed=0).double()
    before = dense(whole)
    whole.least_squares(torch.ones(30, dtype=torch.float64))  # a factor of all rows is not to be taken for that of some
    for rows in ([4], [7, 2, 29], list(range(29, -1, -1))):
        part = whole.select(torch.tensor(rows))
        assert part.num_rows == len(rows)
        torch.testing.assert_close(dense(part), before[rows] * math.sqrt(30 / len(rows)))
        v = torch.randn(len(rows), dtype=torch.float64, generator=torch.Generator().manual_seed(len(rows)))
        torch.testing.assert_close(part.mtv(v), dense(part).T @ v)
        torch.testing.assert_close(part.least_squares(v), torch.linalg.pinv(dense(part)) @ v)
        again = part.select(torch.tensor([0]))
        torch.testing.assert_close(dense(again), before[rows[:1]] * math.sqrt(30))
    assert torch.equal(dense(whole), before)
    with pytest.raises(ValueError, match="at least one row"):
        whole.select(torch.tensor([], dtype=torch.int64))


@pytest.mark.parametrize("kind", [DCTProjection, GaussianProjection])
def test_sparse_recovery_from_selected_rows_keeps_the_scale(kind: type[Projection]) -> None:
    whole = kind(120, 200, seed=0)
    x = torch.zeros(200)
    x[[3, 50, 199]] = torch.tensor([1.0, -2.0, 0.5])
    rows = torch.randperm(120, generator=torch.Generator().manual_seed(0))[:80]
    measured = whole.mv(x)[rows]
    found = AMP(num_iterations=100)(measured * math.sqrt(120 / 80), whole.select(rows)).x
    assert float((found - x).norm() / x.norm()) < 1e-2
    shrunk = AMP(num_iterations=100)(measured, whole.select(rows)).x
    assert float(shrunk[50]) == pytest.approx(-2 * math.sqrt(80 / 120), rel=1e-2)
