"""Balls, boxes and normalisation, against scipy and the statistics of a uniform distribution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from torch import Tensor

from groundwire.callbacks.adversarial.threat import Norm, ThreatModel, gaussian, norm_of, unit
from helpers.edge import generator

Array = np.ndarray[Any, np.dtype[Any]]
NORMS: tuple[Norm, ...] = ("linf", "l2")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def length(delta: Tensor, norm: Norm) -> Tensor:
    flat = delta.double().flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


# ---------------------------------------------------------------- the ball and the box


@st.composite
def points(draw: st.DrawFn) -> tuple[Tensor, Tensor, ThreatModel]:
    seed, batch, size = draw(st.integers(0, 2**31)), draw(st.integers(1, 5)), draw(st.integers(1, 12))
    lo, width = draw(st.sampled_from([(0.0, 1.0), (-1.0, 2.0), (0.0, 255.0)]))
    eps = width * draw(st.sampled_from([1e-6, 1 / 255, 8 / 255, 0.3, 2.0]))
    threat = ThreatModel(eps, draw(st.sampled_from(NORMS)), lo, lo + width)
    rng = np.random.default_rng(seed)
    x = lo + width * rng.random((batch, size)).round(draw(st.sampled_from([0, 6])))  # 0: at corners of the box
    moved = x + eps * draw(st.sampled_from([0.0, 0.1, 1.0, 30.0])) * rng.standard_normal((batch, size))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return torch.tensor(moved, dtype=dtype), torch.tensor(x, dtype=dtype), threat


@settings(max_examples=150)
@given(points())
def test_projections_are_in_ball_and_box_and_stay(drawn: tuple[Tensor, Tensor, ThreatModel]) -> None:
    moved, x, threat = drawn
    found = threat.project(moved, x)
    assert found.dtype == x.dtype
    rounding = 4 * torch.finfo(x.dtype).eps * max(abs(threat.lo), abs(threat.hi))
    root = 1.0 if threat.norm == "linf" else math.sqrt(x.shape[1])
    assert float(length(found - x, threat.norm).max()) <= threat.eps * (1 + 1e-6) + root * rounding
    assert float(found.min()) >= threat.lo
    assert float(found.max()) <= threat.hi
    assert float((threat.project(found, x) - found).abs().max()) <= 2 * rounding
    inside = length(moved - x, threat.norm) <= threat.eps * (1 - 1e-5)
    inside &= ((moved >= threat.lo) & (moved <= threat.hi)).all(1)
    assert float((found - moved)[inside].abs().sum()) <= root * rounding  # points inside are their own projection


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(4))
def test_projection_to_the_ball_is_the_nearest_point(norm: Norm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, moved, eps = rng.normal(size=3), rng.normal(size=3) * 2, 0.5
    threat = ThreatModel(eps, norm, lo=-100, hi=100)
    found = threat.project(torch.tensor(moved)[None], torch.tensor(x)[None])[0].numpy()
    inside: Any = (
        {"bounds": list(zip(x - eps, x + eps, strict=True))}
        if norm == "linf"
        else {"constraints": {"type": "ineq", "fun": lambda u: eps**2 - ((u - x) ** 2).sum()}}
    )
    nearest = optimize.minimize(lambda u: ((u - moved) ** 2).sum(), x, method="SLSQP", tol=1e-12, **inside).x
    np.testing.assert_allclose(found, nearest, atol=2e-5)
    assert np.linalg.norm(found - moved) <= np.linalg.norm(nearest - moved) + 1e-6


def test_projection_of_linf_is_the_nearest_point_of_ball_and_box_together() -> None:
    rng = np.random.default_rng(0)
    x, moved = rng.random(40), rng.random(40) * 3 - 1
    found = ThreatModel(0.2).project(torch.tensor(moved)[None], torch.tensor(x)[None])[0].numpy()
    expected = [min(max(m, max(0.0, c - 0.2)), min(1.0, c + 0.2)) for m, c in zip(moved, x, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-15)


@pytest.mark.parametrize("norm", NORMS)
def test_several_points_an_input_are_projected_as_one_by_one(norm: Norm) -> None:
    x = torch.rand(4, 2, 3, 3, generator=generator())
    moved = torch.randn(5, 4, 2, 3, 3, generator=generator(1))
    threat = ThreatModel(0.2, norm)
    expected = torch.stack([threat.project(one, x) for one in moved])
    assert torch.equal(threat.project(moved, x), expected)
    for b in range(4):
        assert torch.allclose(threat.project(moved[:, b : b + 1], x[b : b + 1])[:, 0], expected[:, b], atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_shares_no_memory(norm: Norm) -> None:
    x = torch.full((2, 3), 0.5)
    for moved in (x, x.clone()):
        found = ThreatModel(0.1, norm).project(moved, x)
        found += 1
        assert torch.equal(x, torch.full((2, 3), 0.5))
        assert torch.equal(moved, x)


# ---------------------------------------------------------------- the steepest direction


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e-12, 1e-30, 1e18])
def test_steepest_has_unit_norm_however_small_the_gradient(scale: float) -> None:
    gradient = torch.randn(3, 4, 2, 5, generator=generator()) * scale
    gradient[0, 0] = 0
    for norm in NORMS:
        found = ThreatModel(0.1, norm).steepest(gradient, 2).flatten(0, 1)
        assert length(found, norm).tolist() == pytest.approx([0.0] + [1.0] * 11, abs=1e-6)
        assert bool(((found * gradient.flatten(0, 1)).flatten(1).sum(1) >= 0).all())
    l2 = ThreatModel(0.1, "l2").steepest(gradient, 2)
    expected = gradient.double() / gradient.double().flatten(2).norm(dim=2).clamp_min(1e-300)[..., None, None]
    np.testing.assert_allclose(l2.numpy(), expected.numpy(), atol=1e-6)


def test_steepest_is_best_among_random_directions() -> None:
    gradient = torch.randn(1, 6, generator=generator())
    for norm in NORMS:
        best = float((ThreatModel(0.1, norm).steepest(gradient, 1) * gradient).sum())
        other = torch.randn(2000, 6, generator=generator(1))
        other /= length(other, norm)[:, None]
        assert best >= float((other * gradient).sum(1).max()) - 1e-6


def test_norms_and_units_of_single_numbers() -> None:
    x = torch.tensor([-3.0, 0.0, 2.0])
    assert norm_of(x, 0).tolist() == [3, 0, 2]
    assert unit(x, 0).tolist() == [-1, 0, 1]
    assert norm_of(torch.full((2, 3, 4), 2.0), 2).flatten().tolist() == pytest.approx([math.sqrt(48)] * 2)


# ---------------------------------------------------------------- uniform starts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linf_starts_are_uniform(dtype: torch.dtype) -> None:
    x = torch.full((4000, 3), 0.5, dtype=dtype)
    found = ThreatModel(0.2).uniform(x, generator())
    assert found.dtype == dtype
    delta = ((found - x) / 0.2).double().numpy()
    for column in delta.T:
        assert stats.kstest(column, "uniform", args=(-1, 2)).pvalue > 0.01
    assert delta.min() >= -1 - 1e-6
    assert delta.max() <= 1 + 1e-6
    np.testing.assert_allclose(np.cov(delta.T), np.eye(3) / 3, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (2,), (1, 2, 3), (50,)])
def test_l2_starts_are_uniform(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n, d = 4000, math.prod(shape)
    x = torch.full((n, *shape), 0.5, dtype=dtype)
    found = ThreatModel(0.4, "l2").uniform(x, generator(1))
    assert found.shape == x.shape
    assert found.dtype == dtype
    delta = ((found - x) / 0.4).double().flatten(1).numpy()
    radius = np.linalg.norm(delta, axis=1)
    assert radius.max() <= 1 + 1e-6
    assert stats.kstest(radius**d, "uniform").pvalue > 0.01  # P(r <= t) = t^d
    np.testing.assert_allclose(delta.mean(0), 0, atol=0.06)
    np.testing.assert_allclose(np.cov(delta.T).reshape(d, d), np.eye(d) / (d + 2), atol=0.03)
    if d > 1:  # a coordinate of a uniform direction: (1 + t) / 2 is Beta((d-1)/2, (d-1)/2)
        direction = delta[:, 0] / radius
        assert stats.kstest((1 + direction) / 2, "beta", args=((d - 1) / 2, (d - 1) / 2)).pvalue > 0.01


@pytest.mark.parametrize("norm", NORMS)
def test_starts_are_cut_to_the_box_and_follow_the_generator(norm: Norm) -> None:
    x = torch.rand(50, 4, generator=generator()).round()  # corners
    threat = ThreatModel(0.5, norm)
    found = threat.uniform(x, generator(1))
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert torch.equal(found, threat.uniform(x, generator(1)))
    assert not torch.equal(found, threat.uniform(x, generator(2)))


@pytest.mark.parametrize("norm", NORMS)
def test_starts_are_the_same_drawn_together_or_in_parts(norm: Norm) -> None:
    x = torch.rand(6, 40, generator=generator())
    threat, one = ThreatModel(0.3, norm), generator(1)
    parts = torch.cat([threat.uniform(x[:1], one), threat.uniform(x[1:4], one), threat.uniform(x[4:], one)])
    assert torch.equal(threat.uniform(x, generator(1)), parts)
    g = generator(1)
    mapped = torch.func.vmap(lambda u: threat.uniform(u, g), randomness="different")(x.reshape(3, 2, 40))
    assert torch.equal(mapped.reshape(6, 40), parts)


def test_gaussian_numbers_are_normal_and_the_same_in_parts() -> None:
    x = torch.zeros(2000, 5)
    drawn = gaussian(x, generator())
    assert stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 0.01
    one = generator()
    assert torch.equal(drawn, torch.cat([gaussian(x[:7], one), gaussian(x[7:], one)]))
    assert bool(torch.isfinite(gaussian(torch.zeros(1_000_000), generator(3))).all())


# ---------------------------------------------------------------- pixels and network inputs


@pytest.mark.parametrize(("mean", "std"), [(None, None), (0.5, 0.25), ([0.5], [0.25]), (MEAN, STD)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_pixels_and_back(mean: Any, std: Any, dtype: torch.dtype) -> None:
    raw = torch.rand(4, 3, 2, 2, generator=generator(), dtype=torch.float64)
    raw[0] = raw[0].round()
    m, s = (torch.tensor(v if v is not None else d).double().reshape(-1, 1, 1) for v, d in ((mean, 0.0), (std, 1.0)))
    x = ((raw - m) / s).to(dtype)
    threat = ThreatModel(0.1, mean=mean, std=std)
    threat.check(x)  # half precision rounds past the box
    pixels = threat.pixels(x)
    assert pixels.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 1
    accuracy = {torch.float64: 1e-7, torch.float32: 1e-6}.get(dtype, 2 * torch.finfo(dtype).eps)  # of `m` in float32
    np.testing.assert_allclose(pixels.double().numpy(), raw.numpy(), atol=accuracy)
    back = threat.network_input(pixels, dtype)
    assert back.dtype == dtype
    np.testing.assert_allclose(back.double().numpy(), x.double().numpy(), atol=8 * accuracy)


def test_scaled_changes_the_radius_and_remembers_by_how_much() -> None:
    threat = ThreatModel(0.1, "l2", -1, 2, MEAN, STD)
    found, expected = threat.scaled(2.5), ThreatModel(0.25, "l2", -1, 2, MEAN, STD)
    names = ("eps", "norm", "lo", "hi", "mean", "std")
    assert [getattr(found, name) for name in names] == [getattr(expected, name) for name in names]
    assert (threat.step_scale, found.step_scale, found.scaled(0.5).step_scale) == (1.0, 2.5, 1.25)
    assert found == threat.scaled(2.5)
    with pytest.raises(TypeError):
        ThreatModel(0.1, step_scale=2.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("normalised", [False, True])
def test_pixels_are_clamped_or_not(normalised: bool) -> None:
    threat = ThreatModel(0.1, mean=0.5, std=2.0) if normalised else ThreatModel(0.1)
    raw = torch.tensor([[-0.5, 0.25, 1.5]])
    x = (raw - 0.5) / 2 if normalised else raw
    assert torch.equal(threat.pixels(x, clamp=False), raw)
    assert torch.equal(threat.pixels(x), torch.tensor([[0.0, 0.25, 1.0]]))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": 0}, "`eps` must be positive, got 0"),
        ({"eps": -0.1}, "`eps` must be positive, got -0.1"),
        ({"eps": float("nan")}, "`eps` must be positive, got nan"),
        ({"eps": float("inf")}, "`eps` must be positive, got inf"),
        ({"eps": 0.1, "norm": "l1"}, "`norm` must be 'linf' or 'l2', got 'l1'"),
        ({"eps": 0.1, "lo": 1, "hi": 1}, "`lo` must be below `hi`, both finite, got 1 and 1"),
        ({"eps": 0.1, "lo": float("-inf")}, "both finite, got -inf and 1"),
        ({"eps": 0.1, "hi": float("inf")}, "both finite, got 0.0 and inf"),
        ({"eps": 0.1, "hi": float("nan")}, "both finite, got 0.0 and nan"),
        ({"eps": 0.1, "mean": 0.5}, "Give both `mean` and `std`"),
        ({"eps": 0.1, "std": 0.5}, "Give both `mean` and `std`"),
        ({"eps": 0.1, "mean": [0.5, 0.5], "std": [0.5, 0.0]}, "`std` must be positive"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThreatModel(**arguments)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.uint8), TypeError, "inputs are uint8; attack needs floating inputs"),
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "inputs are int64; attack needs floating inputs"),
        ({"a": torch.zeros(1)}, TypeError, "inputs are a dict; an attack needs one tensor"),
        (
            torch.tensor([[-2.12, 2.64]]),
            ValueError,
            r"inputs range \[-2.12, 2.64\], outside \[0, 1\]; pass mean= and std=",
        ),
        (torch.tensor([[0.5, 1.001]]), ValueError, r"outside \[0, 1\]"),
        (torch.tensor([[0.5, float("nan")]]), ValueError, r"inputs range \[nan, nan\]"),
        (torch.tensor([[0.5, float("inf")]]), ValueError, r"inputs range \[0.5, inf\]"),
    ],
)
def test_inputs_that_cannot_be_attacked_are_refused(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ThreatModel(0.1).check(x)


def test_inputs_outside_the_box_after_undoing_the_normalisation_are_refused() -> None:
    with pytest.raises(ValueError, match=r"inputs range \[0.5, 1.5\] after undoing mean and std, outside \[0, 1\]"):
        ThreatModel(0.1, mean=0.5, std=0.5).check(torch.tensor([[0.0, 2.0]]))


def test_rounding_and_empty_batches_are_no_error() -> None:
    ThreatModel(0.1).check(torch.tensor([[-5e-5, 1 + 5e-5]]))
    ThreatModel(0.1).check(torch.zeros(0, 3))
    ThreatModel(0.1, lo=-3, hi=3).check(torch.tensor([[-2.12, 2.64]]))


@pytest.mark.parametrize(("lo", "hi"), [(0.0, 1.0), (-3.0, 3.0), (0.0, 255.0)])
def test_a_range_may_leave_the_box_by_rounding_alone(lo: float, hi: float) -> None:
    threat, wide = ThreatModel(0.1, lo=lo, hi=hi), hi - lo
    threat.check_range(lo, hi)
    threat.check_range(lo - 0.9e-4 * wide, hi + 0.9e-4 * wide)
    threat.check_range(lo - 0.009 * wide, hi, rounding=0.01)
    for low, high in ((lo - 1.1e-4 * wide, hi), (lo, hi + 1.1e-4 * wide), (math.nan, hi), (lo, math.nan)):
        with pytest.raises(ValueError, match=r"inputs range \[.*outside \["):
            threat.check_range(low, high)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 4, 4), (3,)])
def test_a_wrong_number_of_channels_is_said(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"mean and std have 3 channels, but the inputs have shape .* dimension 1"):
        ThreatModel(0.1, mean=MEAN, std=STD).pixels(torch.zeros(shape))
