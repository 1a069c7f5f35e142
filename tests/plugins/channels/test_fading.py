"""Fading laws: draws against closed forms, and closed forms against other libraries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import Tensor

from groundwire.plugins.channels import Fading, NoFading, PathLoss, Rayleigh, Rician
from groundwire.plugins.random import Key
from helpers.channels import build_from_yaml

LAWS: dict[str, Any] = {
    "none": NoFading,
    "rayleigh": Rayleigh,
    "rician": lambda *args, **kwargs: Rician(3.0, *args, **kwargs),
}
every_law = pytest.mark.parametrize("build", LAWS.values(), ids=LAWS)


def key(devices: int | tuple[int, ...] = 4, **kwargs: Any) -> Key:
    return Key(
        seed=kwargs.pop("seed", 0), devices=tuple(range(devices)) if isinstance(devices, int) else devices, **kwargs
    )


def squares(fading: Fading, devices: int = 200, uses: int = 500) -> Tensor:
    return fading.gains(key(devices), uses).abs().double().square()


# ---------------------------------------------------------------- what holds for all laws


@every_law
@pytest.mark.parametrize("block", [False, True])
def test_shape_dtype_and_mean_square(build: Any, block: bool) -> None:
    fading = build(2.5, block=block)
    gains = fading.gains(key(3000 if block else 6), 500)
    assert gains.shape == ((3000, 1) if block else (6, 500))
    assert gains.dtype == torch.complex64
    # Var |h|^2 is at most variance^2, that of Rayleigh fading
    assert abs(float(gains.abs().double().square().mean()) - 2.5) < 5 * 2.5 / math.sqrt(3000)
    assert fading.mean_squares(key(3)).tolist() == [2.5] * 3


@every_law
def test_rows_are_independent_of_each_other_and_of_who_else_is_there(build: Any) -> None:
    fading = build(block=False)
    gains = fading.gains(key((5, 2, 9), round=3), 40)
    for row, m in enumerate((5, 2, 9)):
        assert torch.equal(fading.gains(key((m,), round=3), 40)[0], gains[row])
    if not isinstance(fading, NoFading):
        for other in (key((5, 2, 9), round=4), key((5, 2, 9), round=3, seed=1)):
            assert not torch.isclose(fading.gains(other, 40), gains).any()
        assert not torch.isclose(fading.gains(key((5, 2, 9), round=3), 40, purpose="downlink/fading"), gains).any()
        assert not torch.isclose(gains[0], gains[1]).any()


def test_gains_of_devices_uses_and_rounds_are_uncorrelated() -> None:
    for fading in (Rayleigh(), Rician(2.0)):
        drawn = (
            torch.stack([fading.gains(key(2, round=t), 2) for t in range(4000)]).reshape(4000, 4).to(torch.complex128)
        )
        if isinstance(
            fading, Rician
        ):  # one direct path a device and round: take it out by the scattered parts' difference
            drawn = (drawn[:, ::2] - drawn[:, 1::2]) / math.sqrt(2 / 3)
        covariance = drawn.mH @ drawn / 4000
        off = covariance - torch.diag(covariance.diag())
        assert float(off.abs().max()) < 5 / math.sqrt(4000)
        assert float((drawn[1:] * drawn[:-1].conj()).mean(0).abs().max()) < 5 / math.sqrt(3999)
        assert float((drawn * drawn).mean(0).abs().max()) < 5 * math.sqrt(2 / 4000)  # circular: E[h^2] = 0


@pytest.mark.parametrize("k", [0.0, 0.5, 3.0, 40.0])
def test_draws_follow_their_law(k: float) -> None:
    """Kolmogorov and Smirnov's test against SciPy's Rice law; a wrong K is found."""
    fading = Rician(k, variance=2.0, block=True) if k else Rayleigh(2.0, block=True)
    radius = fading.gains(key(4000), 7).abs().flatten().numpy()
    law = scipy.stats.rice(b=math.sqrt(2 * k), scale=math.sqrt(2.0 / (2 * (k + 1))))
    assert scipy.stats.kstest(radius, law.cdf).pvalue > 1e-3
    wrong = scipy.stats.rice(b=math.sqrt(2 * (2 * k + 1)), scale=math.sqrt(2.0 / (2 * (2 * k + 2))))
    assert scipy.stats.kstest(radius, wrong.cdf).pvalue < 1e-3
    phase = torch.angle(fading.gains(key(4000, round=1), 7)).flatten().numpy()
    assert scipy.stats.kstest(phase, scipy.stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 1e-3


@pytest.mark.parametrize("k", [0.0, 1.0, 10.0])
def test_rician_moments_by_monte_carlo(k: float) -> None:
    x = squares(Rician(k))
    n = x.numel()
    mean_of_square = (2 + 4 * k + k * k) / (k + 1) ** 2  # E|h|^4
    fourth = float(x.square().var())
    assert abs(float(x.mean()) - 1) < 5 * math.sqrt((mean_of_square - 1) / n)
    assert abs(float(x.square().mean()) - mean_of_square) < 5 * math.sqrt(fourth / n)
    # the direct path is shared by a device's uses, and its energy is K / (K + 1)
    h = Rician(k).gains(key(400), 200).to(torch.complex128)
    shared = h.mean(1).abs().square()
    assert float(shared.mean()) == pytest.approx(k / (k + 1), abs=6 / math.sqrt(200 * 400) + 1 / 200)


@every_law
@pytest.mark.parametrize("threshold", [0.01, 0.3, 1.0, 2.5])
def test_activity_and_inverse_moment_by_monte_carlo(build: Any, threshold: float) -> None:
    fading = build(1.5)
    x = squares(fading)
    active = (x >= threshold).double()
    error = 5 * float(active.std()) / math.sqrt(x.numel())
    assert abs(float(active.mean()) - fading.activity(threshold)) <= error + 1e-12
    inverse = active / x
    error = 5 * float(inverse.std()) / math.sqrt(x.numel())
    assert abs(float(inverse.mean()) - fading.inverse_moment(threshold)) <= error + 1e-6


@pytest.mark.parametrize("k", [0.0, 0.3, 5.0, 100.0, 1e4])
@pytest.mark.parametrize("threshold", [1e-3, 0.2, 0.9, 1.01])
def test_rician_integrals_agree_with_scipys_noncentral_chi_square(k: float, threshold: float) -> None:
    fading, variance = Rician(k, variance=1.3), 1.3
    law, scale = scipy.stats.ncx2(2, 2 * k), variance / (2 * (k + 1))
    assert fading.activity(threshold) == pytest.approx(law.sf(threshold / scale), rel=1e-9, abs=1e-12)
    mean, spread = 2 + 2 * k, math.sqrt(4 + 8 * k)
    low, high = max(threshold / scale, mean - 15 * spread), mean + 40 * spread
    expected, _ = scipy.integrate.quad(
        lambda x: law.pdf(x) / (x * scale), low, high, points=[min(max(mean, low), high)], limit=500
    )
    assert fading.inverse_moment(threshold) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_rayleigh_is_the_table_and_the_limit_of_rician() -> None:
    # E1(threshold) and exp(-threshold) for variance 1
    table = {0.01: (4.038, 0.990), 0.1: (1.823, 0.905), 0.5: (0.560, 0.607), 1.0: (0.219, 0.368)}
    for threshold, (moment, activity) in table.items():
        for fading in (Rayleigh(), Rician(0.0), Rician(1e-9)):
            assert fading.inverse_moment(threshold) == pytest.approx(moment, abs=6e-4)
            assert fading.activity(threshold) == pytest.approx(activity, abs=6e-4)
        # scale: |h|^2 / variance has the law of variance 1
        assert Rayleigh(4.0).inverse_moment(4 * threshold) == pytest.approx(Rayleigh().inverse_moment(threshold) / 4)
        assert Rician(2.0, 4.0).inverse_moment(4 * threshold) == pytest.approx(
            Rician(2.0).inverse_moment(threshold) / 4
        )
    for fading in (Rayleigh(), Rician(3.0)):
        assert fading.inverse_moment(0.0) == math.inf
        assert fading.activity(0.0) == 1.0
    assert NoFading(2.0).inverse_moment(0.0) == 0.5
    assert (NoFading(2.0).inverse_moment(2.1), NoFading(2.0).activity(2.1)) == (0.0, 0.0)


def test_much_line_of_sight_is_no_fading() -> None:
    for k in (1e6, 1e8):
        assert Rician(k, 2.0).inverse_moment(0.5) == pytest.approx(0.5, rel=2 / k + 1e-7)
        assert Rician(k, 2.0).inverse_moment(2.5) == pytest.approx(0, abs=1e-12)
        assert Rician(k, 2.0).activity(0.5) == pytest.approx(1.0)
    assert float((squares(Rician(1e8), 5, 50) - 1).abs().max()) < 1e-3


@every_law
def test_the_law_of_what_is_known_is_that_of_gains_plus_errors(build: Any) -> None:
    fading = build(1.5)
    known = fading.law(0.8, 0.3)
    scaled = fading.gains(key(300), 400).to(torch.complex128) * math.sqrt(0.8 / 1.5)
    generator = torch.Generator().manual_seed(1)
    errors = torch.randn(scaled.shape, dtype=torch.complex128, generator=generator) * math.sqrt(0.3)
    x = (scaled + errors).abs().square()
    n = x.numel()
    assert abs(float(x.mean()) - 1.1) < 5 * float(x.std()) / math.sqrt(n)
    assert known.variance == pytest.approx(1.1)
    for threshold in (0.1, 1.0):
        inverse = (x >= threshold) / x
        assert abs(float(inverse.mean()) - known.inverse_moment(threshold)) < 5 * float(inverse.std()) / math.sqrt(n)
    exact = fading.law(0.8)
    assert type(exact) is type(fading)
    assert exact.inverse_moment(0.2) == pytest.approx(build(0.8).inverse_moment(0.2), rel=1e-12)
    assert fading.law(0.8, 1e-30).inverse_moment(0.2) == pytest.approx(exact.inverse_moment(0.2))


# ---------------------------------------------------------------- path loss


def test_distances_are_even_on_the_ring_and_fixed_for_the_run() -> None:
    place = PathLoss(exponent=3.0, inner_radius=20.0, outer_radius=100.0)
    distances = place.distances(key(4000)).numpy()
    assert distances.min() >= 20
    assert distances.max() <= 100
    share = (distances**2 - 20**2) / (100**2 - 20**2)  # of the area nearer than that: uniform
    assert scipy.stats.kstest(share, "uniform").pvalue > 1e-3
    assert scipy.stats.kstest((distances - 20) / 80, "uniform").pvalue < 1e-6  # not even in the distance
    assert torch.equal(place.distances(key((7, 3), round=9)), place.distances(key(10))[[7, 3]])
    assert not torch.isclose(place.distances(key(10, seed=1)), place.distances(key(10))).any()


@pytest.mark.parametrize("exponent", [0.0, 2.0, 3.5])
def test_gain_falls_with_the_power_of_the_distance(exponent: float) -> None:
    place = PathLoss(exponent, inner_radius=20.0, outer_radius=100.0, reference=50.0)
    distances, factors = place.distances(key(50)), place(key(50))
    slopes = np.polyfit(np.log(distances.numpy()), np.log(factors.numpy()), 1)
    assert slopes == pytest.approx([-exponent, exponent * math.log(50)], abs=1e-4)
    default = PathLoss(exponent, 20.0, 100.0)(key(50))
    assert float(default.min()) >= 1  # the reference is the outer radius: nobody is worse off than without path loss
    assert torch.equal(PathLoss(exponent, 100.0, 100.0)(key(5)), torch.ones(5))


def test_path_loss_multiplies_the_mean_square_of_each_device() -> None:
    place = PathLoss(3.0, 30.0, 100.0)
    fading = Rayleigh(0.5, path_loss=place)
    expected = 0.5 * place(key(20)).double()
    torch.testing.assert_close(fading.mean_squares(key(20)), expected)
    x = fading.gains(key(20), 5000).abs().double().square().mean(1)
    assert float((x / expected - 1).abs().max()) < 5 / math.sqrt(5000)
    plain = Rayleigh(0.5).gains(key(20), 50)
    torch.testing.assert_close(fading.gains(key(20), 50), plain * place(key(20)).sqrt().unsqueeze(1))


# ---------------------------------------------------------------- building and bad input


def test_built_from_yaml_and_says_its_settings() -> None:
    yaml = """
class_path: groundwire.plugins.channels.Rician
init_args:
  k_factor: 4.0
  block: true
  path_loss: {class_path: groundwire.plugins.channels.PathLoss, init_args: {exponent: 2.5}}
"""
    fading = build_from_yaml(Fading, yaml)
    assert isinstance(fading, Rician)
    assert fading.block
    for words in ("k_factor=4.0", "variance=1.0, block=True", "exponent=2.5", "inner_radius=10.0", "reference=100.0"):
        assert words in repr(fading)
    assert not fading.state_dict()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Rayleigh(0.0), r"`variance`, the mean of \|h\|\^2, must be finite and > 0, got 0.0"),
        (lambda: NoFading(math.inf), "must be finite and > 0, got inf"),
        (lambda: Rayleigh(math.nan), "must be finite and > 0, got nan"),
        (lambda: Rician(-1.0), "`k_factor` must be in .* got -1.0"),
        (lambda: Rician(math.inf), "`k_factor` must be in .* got inf. Beyond, use NoFading"),
        (lambda: PathLoss(exponent=-1.0), "`exponent` must be finite and >= 0, got -1.0"),
        (lambda: PathLoss(inner_radius=0.0), "0 < inner_radius <= outer_radius, got inner_radius=0.0"),
        (lambda: PathLoss(inner_radius=9.0, outer_radius=8.0), "got inner_radius=9.0, outer_radius=8.0"),
        (lambda: PathLoss(reference=0.0), "`reference` is a distance and must be > 0, got 0.0"),
    ],
)
def test_bad_input_by_message(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
