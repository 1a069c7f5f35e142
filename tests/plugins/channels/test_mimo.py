"""Combining and detection with many antennas, against brute force, closed forms and simulations."""

from __future__ import annotations

import math
import weakref
import zlib
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from groundwire.plugins.channels import Fading, PathLoss, Rayleigh, Rician, mimo
from groundwire.plugins.channels.mimo import (
    Moments,
    antenna,
    blind_moments,
    combined_gains,
    greedy_lmmse,
    lmmse,
    maximum_ratio,
    receiver_noise,
    residual_energy,
    zero_forcing,
)
from groundwire.plugins.random import Key


def key(devices: int, **others: Any) -> Key:
    return Key(**({"seed": 5, "round": 3, "devices": tuple(range(devices))} | others))


def cn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- blind combining


@pytest.mark.parametrize(
    "fading", [Rayleigh(2.0), Rician(3.0), Rayleigh(block=True), Rayleigh(path_loss=PathLoss())], ids=repr
)
@pytest.mark.parametrize("csi_error_var", [0.0, 0.7])
def test_combined_gains_are_those_of_every_antennas_signal(fading: Fading, csi_error_var: float) -> None:
    """With all antennas' received symbols in memory, as the paper writes it down."""
    antennas, devices, uses = 7, 4, 5
    x = cn(devices, uses)
    a, power = combined_gains(fading, key(devices), antennas, uses, csi_error_var=csi_error_var)
    combined, square = torch.zeros(uses, dtype=torch.complex128), 0.0
    for k in range(antennas):
        h = fading.gains(key(devices), uses, purpose=antenna("uplink/fading", k)).to(torch.complex128)
        known = h.sum(0)
        if csi_error_var:
            known = known + mimo._noise(key(devices), antenna("uplink/csi_error", k), known.shape, csi_error_var, "cpu")
        combined += known.conj() * (h * x).sum(0) / antennas
        square = square + known.abs().square() / antennas
    torch.testing.assert_close((a.to(x.dtype) * x).sum(0), combined, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(power.double(), square, rtol=1e-5, atol=1e-5)


class Watched(Rayleigh):
    """Counts the antennas' gains that are alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[weakref.ref[Tensor]] = []
        self.most = 0

    def gains(self, *args: Any, **options: Any) -> Tensor:
        drawn = super().gains(*args, **options)
        self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(drawn)]
        self.most = max(self.most, len(self.alive))
        return drawn


def test_memory_does_not_grow_with_antennas() -> None:
    for antennas in (12, 60):
        fading = Watched()
        combined_gains(fading, key(2), antennas, 3)
        assert fading.most <= 2


class Rotated(Rayleigh):
    """Each antenna has a phase of its own."""

    def gains(self, key: Key, uses: int, *, on: Any = "cpu", purpose: str = "") -> Tensor:
        phase = torch.tensor(2 * math.pi * (zlib.crc32(purpose.encode()) % 1000) / 1000)
        return super().gains(key, uses, on=on, purpose=purpose) * torch.polar(torch.tensor(1.0), phase)


def test_phases_of_antennas_do_not_matter() -> None:
    straight, rotated = (combined_gains(law, key(4), 9, 6) for law in (Rayleigh(), Rotated()))
    assert not torch.equal(straight[0], rotated[0])
    torch.testing.assert_close(straight, rotated, rtol=1e-5, atol=1e-5)


def test_errors_of_csi_are_a_stream_of_their_own() -> None:
    """0 is perfect CSI bit for bit; a little error changes a little, so the gains are the same."""
    perfect = combined_gains(Rayleigh(), key(4), 9, 6)
    assert torch.equal(combined_gains(Rayleigh(), key(4), 9, 6, csi_error_var=0.0)[0], perfect[0])
    near = combined_gains(Rayleigh(), key(4), 9, 6, csi_error_var=1e-8)
    assert not torch.equal(near[0], perfect[0])
    torch.testing.assert_close(near[0], perfect[0], rtol=0, atol=1e-3)


def test_devices_drawn_together_are_those_drawn_alone() -> None:
    """The sum of all devices' gains is what each one's is multiplied with; the gains themselves do not depend on others."""
    fading = Rayleigh()
    both = fading.gains(key(2), 6, purpose=antenna("uplink/fading", 2))
    alone = fading.gains(key(2).row(1), 6, purpose=antenna("uplink/fading", 2))
    assert torch.equal(both[1:], alone)
    first, second = (fading.gains(key(2), 6, purpose=antenna("uplink/fading", k)) for k in (0, 1))
    assert torch.equal(first, fading.gains(key(2), 6)), "the first antenna hears what a server with one does"
    assert not torch.isclose(first, second).any()


def test_many_antennas_give_the_mean_square() -> None:
    """The law of large numbers: E[conj(c) h_m] = E|h_m|^2, and E|c|^2 = their sum plus the error's variance."""
    antennas, devices = 4000, 3
    fading = Rayleigh(block=True, path_loss=PathLoss(exponent=1.0, inner_radius=50.0))
    squares = fading.mean_squares(key(devices))
    a, power = combined_gains(fading, key(devices), antennas, 1, csi_error_var=0.5)
    total = squares.sum() + 0.5
    standard_errors = (squares * (total + squares) / antennas).sqrt()
    assert bool(((a[:, 0] - squares).abs() < 5 * standard_errors).all())
    assert abs(float(power) - float(total)) < 5 * float(total) / math.sqrt(antennas)


@pytest.mark.parametrize("antennas", [1, 4, 16, 64])
@pytest.mark.parametrize("csi_error_var", [0.0, 1.0])
def test_error_is_what_the_formula_says(antennas: int, csi_error_var: float) -> None:
    """One entry sent over many channel uses, with ten devices at noise variance 4, against the formula by hand."""
    devices, uses, noise_var, alpha, variance = 10, 20_000 // antennas + 500, 4.0, 1.5, 2.0
    x = cn(devices, 1, seed=2).to(torch.complex64)
    x = x + 0.7
    a, power = combined_gains(Rayleigh(variance), key(devices), antennas, uses, csi_error_var=csi_error_var)
    noise = receiver_noise(key(devices), 1, uses, noise_var / antennas)[0] * power.sqrt()
    norm = devices * variance * alpha
    estimate = ((a * (alpha * x)).sum(0) + noise).to(torch.complex128) / norm
    mean = x.mean().to(torch.complex128)
    p2 = float(x.abs().square().mean())
    expected = p2 / antennas + noise_var / (antennas * devices * variance * alpha**2)
    expected += csi_error_var / (antennas * devices * variance) * (p2 + noise_var / (devices * variance * alpha**2))
    moments = blind_moments(
        alpha * x,
        torch.full((devices,), variance),
        num_antennas=antennas,
        norm=norm,
        noise_var=noise_var,
        csi_error_var=csi_error_var,
    )
    assert float(moments.variance) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.pseudo_variance, x.mean(0).square() / antennas, rtol=1e-5, atol=1e-6)
    error = estimate - mean
    assert abs(error.mean()) < 4 * math.sqrt(expected / uses)
    assert float(error.abs().square().mean()) == pytest.approx(expected, rel=0.1)
    assert abs(error.square().mean() - mean.square() / antennas) < 6 * expected / math.sqrt(uses)


def test_moments_with_path_loss_and_unequal_symbols() -> None:
    antennas, devices, uses = 3, 4, 30_000
    fading = Rayleigh(path_loss=PathLoss(exponent=2.0, inner_radius=40.0))
    squares = fading.mean_squares(key(devices))
    x = cn(devices, 1, seed=4).to(torch.complex64)
    a, _ = combined_gains(fading, key(devices), antennas, uses)
    estimate = (a * x).sum(0).to(torch.complex128) / 2.5
    moments = blind_moments(x, squares, num_antennas=antennas, norm=2.5)
    variance = float(moments.variance)
    assert abs(estimate.mean() - moments.mean) < 4 * math.sqrt(variance / uses)
    error = estimate - moments.mean
    assert float(error.abs().square().mean()) == pytest.approx(variance, rel=0.05)
    assert abs(error.square().mean() - moments.pseudo_variance) < 6 * variance / math.sqrt(uses)


@pytest.mark.parametrize("pseudo", [0.0, 0.3 + 0.4j, -0.8j])
def test_drawn_numbers_have_their_moments(pseudo: complex) -> None:
    n, variance = 100_000, 0.9
    moments = Moments(
        mean=torch.full((n,), 2 - 1j, dtype=torch.complex128),
        variance=torch.full((n,), variance, dtype=torch.float64),
        pseudo_variance=torch.full((n,), pseudo, dtype=torch.complex128),
    )
    drawn = moments.draw(torch.Generator().manual_seed(0)) - (2 - 1j)
    assert abs(drawn.mean()) < 5 * math.sqrt(variance / n)
    assert abs(float(drawn.abs().square().mean()) - variance) < 5 * variance * math.sqrt(2 / n)
    assert abs(drawn.square().mean() - pseudo) < 5 * variance * math.sqrt(2 / n)


def test_normal_errors_are_near_the_exact_ones_with_many_antennas() -> None:
    antennas, uses = 200, 2000
    x = (cn(5, 1, seed=1) + 1).to(torch.complex64)
    a, _ = combined_gains(Rayleigh(), key(5), antennas, uses)
    exact = (a * x).sum(0)
    moments = blind_moments(x.expand(-1, uses), torch.ones(5), num_antennas=antennas, norm=1.0)
    drawn = moments.draw(torch.Generator().manual_seed(0))
    axis = moments.mean / moments.mean.abs()
    for part in (torch.real, torch.imag):
        result = scipy.stats.ks_2samp(part(exact * axis.conj()).numpy(), part(drawn * axis.conj()).numpy())
        assert result.pvalue > 1e-3
    along, across = (part((exact - moments.mean) * axis.conj()).var() for part in (torch.real, torch.imag))
    assert along > 1.2 * across, "a circular error would be another law"


# ---------------------------------------------------------------- detection


def sparse_slots(antennas: int, devices: int, active: int, noise_var: float, slots: int, seed: int = 0) -> Any:
    """Gains, received symbols and sent symbols, with ``active`` devices in each slot."""
    generator = torch.Generator().manual_seed(seed)
    h = cn(antennas, devices, seed=seed + 1)
    x = torch.zeros(devices, slots, dtype=torch.complex128)
    chosen = torch.rand(devices, slots, generator=generator).argsort(0)[:active]
    x.scatter_(0, chosen, cn(active, slots, seed=seed + 2))
    return h, h @ x + math.sqrt(noise_var) * cn(antennas, slots, seed=seed + 3), x


def nmse(estimate: Tensor, x: Tensor) -> float:
    return float((estimate - x).abs().square().sum() / x.abs().square().sum())


def by_hand(y: Any, h: Any, noise_var: float, symbol_var: float, slack: float) -> tuple[Any, int, bool]:
    """The steps one slot at a time, with a new solution and new eigenvalues in each."""
    antennas, devices = h.shape
    estimate, support = np.zeros(devices, complex), []
    residual, expected = y, noise_var * antennas
    while np.sum(np.abs(residual) ** 2) > (1 + slack) * expected + 1e-10 * np.sum(np.abs(y) ** 2):
        if len(support) == min(antennas, devices):
            return estimate, len(support), True
        score = np.abs(h.conj().T @ residual) ** 2 / np.sum(np.abs(h) ** 2, 0)
        score[support] = -1
        support.append(int(score.argmax()))
        part = h[:, support]
        gram = part.conj().T @ part
        solution = np.linalg.solve(gram + noise_var / symbol_var * np.eye(len(support)), part.conj().T @ y)
        estimate = np.zeros(devices, complex)
        estimate[support] = solution
        residual = y - part @ solution
        eigenvalues = np.linalg.eigvalsh(gram)
        expected = noise_var * (antennas - len(support)) + np.sum(noise_var**2 / (noise_var + symbol_var * eigenvalues))
    return estimate, len(support), False


@pytest.mark.parametrize(
    ("antennas", "devices", "active", "noise_var", "symbol_var"),
    [(16, 24, 4, 0.1, 1.0), (16, 8, 8, 0.5, 0.3), (4, 9, 9, 0.01, 1.0), (8, 5, 0, 1.0, 1.0), (12, 30, 3, 1e-4, 2.0)],
)
def test_greedy_receiver_takes_the_steps_one_by_one(
    antennas: int, devices: int, active: int, noise_var: float, symbol_var: float
) -> None:
    h, y, _ = sparse_slots(antennas, devices, active, noise_var, 30)
    found = greedy_lmmse(y, h, noise_var=noise_var, symbol_var=symbol_var, slack=0.2)
    for n in range(30):
        estimate, size, overloaded = by_hand(y[:, n].numpy(), h.numpy(), noise_var, symbol_var, 0.2)
        np.testing.assert_allclose(found.symbols[:, n], estimate, rtol=1e-7, atol=1e-9)
        assert (int(found.support_size[n]), bool(found.overloaded[n])) == (size, overloaded)


def test_slots_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    h, y, _ = sparse_slots(16, 24, 4, 0.1, 30)
    whole = greedy_lmmse(y, h, noise_var=0.1, symbol_var=1.0)
    monkeypatch.setattr(mimo, "_PURSUIT_BYTES", 32 * 24 * 16 * 7)  # seven slots at a time
    parts = greedy_lmmse(y, h, noise_var=0.1, symbol_var=1.0)
    torch.testing.assert_close(parts.symbols, whole.symbols)
    assert torch.equal(parts.support_size, whole.support_size)


def test_order_of_devices_does_not_matter() -> None:
    h, y, _ = sparse_slots(16, 24, 4, 0.1, 30)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    found, permuted = (greedy_lmmse(y, gains, noise_var=0.1, symbol_var=1.0) for gains in (h, h[:, order]))
    torch.testing.assert_close(permuted.symbols, found.symbols[order])


@pytest.mark.parametrize(
    ("devices", "active", "noise_var", "greedy", "linear"),
    [(128, 16, 1e-6, 1e-4, 0.4), (128, 16, 0.1, 0.006, 0.4), (40, 8, 0.1, 0.006, 0.015), (128, 8, 1.0, 0.08, 0.4)],
)
def test_greedy_receiver_beats_linear_ones_where_symbols_are_sparse(
    devices: int, active: int, noise_var: float, greedy: float, linear: float
) -> None:
    """64 antennas; linear MMSE is told the symbols' energy over all slots, which is best for it."""
    h, y, x = sparse_slots(64, devices, active, noise_var, 120)
    found = greedy_lmmse(y, h, noise_var=noise_var, symbol_var=1.0)
    assert nmse(found.symbols, x) < greedy
    assert nmse(lmmse(y, h, noise_var=noise_var, symbol_var=active / devices), x) > linear
    assert nmse(maximum_ratio(y, h), x) > linear
    assert not bool(found.overloaded.all())


@pytest.mark.parametrize(
    ("antennas", "devices", "noise_var", "symbol_var"), [(8, 4, 1.0, 1.0), (64, 8, 1.0, 1.0), (10, 5, 1.0, 0.5)]
)
def test_residual_on_the_true_support_is_what_the_threshold_says(
    antennas: int, devices: int, noise_var: float, symbol_var: float
) -> None:
    slots = 4000
    h = cn(antennas, devices)
    x = math.sqrt(symbol_var) * cn(devices, slots, seed=1)
    y = h @ x + math.sqrt(noise_var) * cn(antennas, slots, seed=2)
    residual = (y - h @ lmmse(y, h, noise_var=noise_var, symbol_var=symbol_var)).abs().square().sum(0)
    expected = residual_energy(h, noise_var=noise_var, symbol_var=symbol_var)
    assert abs(float(residual.mean()) - expected) < 5 * float(residual.std()) / math.sqrt(slots)


def test_nothing_but_noise_has_no_devices() -> None:
    """As often as a chi-square exceeds its mean by the slack, and not otherwise."""
    antennas, slots, noise_var = 16, 4000, 3.0
    y = math.sqrt(noise_var) * cn(antennas, slots)
    found = greedy_lmmse(y, cn(antennas, 10, seed=1), noise_var=noise_var, symbol_var=1.0, slack=0.3)
    expected = scipy.stats.chi2.sf(1.3 * 2 * antennas, 2 * antennas)
    share = float((found.support_size > 0).double().mean())
    assert abs(share - expected) < 5 * math.sqrt(expected / slots)
    assert not found.symbols[:, found.support_size == 0].any()


def test_silent_slots_stay_silent() -> None:
    for noise_var in (0.0, 1.0):
        found = greedy_lmmse(
            torch.zeros(4, 3, dtype=torch.complex64),
            cn(4, 6).to(torch.complex64),
            noise_var=noise_var,
            symbol_var=1.0,
        )
        assert not found.symbols.any()
        assert not found.support_size.any()
        assert not found.overloaded.any()


def test_all_devices_in_the_support_is_linear_mmse() -> None:
    """Symbols so strong that nobody can be left out."""
    h, y, _ = sparse_slots(12, 7, 7, 0.1, 40)
    y = 1e4 * y
    found = greedy_lmmse(y, h, noise_var=0.1, symbol_var=0.02, slack=0.0)
    assert bool((found.support_size == 7).all())
    torch.testing.assert_close(found.symbols, lmmse(y, h, noise_var=0.1, symbol_var=0.02), rtol=1e-5, atol=1e-5)


def test_without_noise_it_is_zero_forcing_and_exact() -> None:
    h, y, x = sparse_slots(12, 7, 7, 0.0, 40)
    for noise_var, symbol_var in ((0.0, 1.0), (1e-14, 1e6)):
        found = greedy_lmmse(y, h, noise_var=noise_var, symbol_var=symbol_var)
        torch.testing.assert_close(found.symbols, zero_forcing(y, h), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.symbols, x, rtol=1e-4, atol=1e-4)


def test_more_active_devices_than_antennas_are_told() -> None:
    h, y, _ = sparse_slots(4, 12, 12, 1e-3, 50)
    found = greedy_lmmse(y, h, noise_var=1e-3, symbol_var=1.0, max_support=3)
    assert bool((found.support_size <= 3).all())
    assert float(found.overloaded.double().mean()) > 0.95
    assert bool(torch.isfinite(found.symbols.abs()).all())


def test_equal_columns_do_no_harm() -> None:
    h = cn(4, 1).expand(4, 6).clone()
    found = greedy_lmmse(cn(4, 20, seed=1), h, noise_var=0.0, symbol_var=1.0)
    assert bool(torch.isfinite(found.symbols.abs()).all())
    assert bool(found.overloaded.all())


def test_linear_receivers_are_numpys() -> None:
    h, y, _ = sparse_slots(9, 6, 6, 0.3, 20)
    np.testing.assert_allclose(zero_forcing(y, h), np.linalg.lstsq(h.numpy(), y.numpy(), rcond=None)[0], rtol=1e-8)
    # linear MMSE in the space of antennas, not of devices
    covariance = 0.5 * h.numpy() @ h.numpy().conj().T + 0.3 * np.eye(9)
    expected = 0.5 * h.numpy().conj().T @ np.linalg.solve(covariance, y.numpy())
    np.testing.assert_allclose(lmmse(y, h, noise_var=0.3, symbol_var=0.5), expected, rtol=1e-8)
    for m in range(6):
        column = h[:, m].numpy()
        alone = column.conj() @ y.numpy() / np.linalg.norm(column) ** 2
        np.testing.assert_allclose(maximum_ratio(y, h)[m], alone, rtol=1e-8)
    torch.testing.assert_close(lmmse(y, h, noise_var=1e-12, symbol_var=1.0), lmmse(y, h, noise_var=0.0, symbol_var=1.0))


def test_linear_mmse_of_few_antennas_is_computed_in_double_precision() -> None:
    h, y, _ = sparse_slots(16, 40, 8, 1e-6, 20)
    h, y = h.to(torch.complex64), y.to(torch.complex64)
    wide, single = h.to(torch.complex128), lmmse(y, h, noise_var=1e-6, symbol_var=1.0)
    assert single.dtype == torch.complex64
    covariance = wide @ wide.mH + 1e-6 * torch.eye(16)
    expected = wide.mH @ torch.linalg.solve(covariance, y.to(torch.complex128))
    torch.testing.assert_close(single.to(torch.complex128), expected, rtol=1e-5, atol=1e-5)


def test_maximum_ratio_needs_nothing_else_with_very_many_antennas() -> None:
    errors = []
    for antennas in (100, 10_000):
        h, y, x = sparse_slots(antennas, 5, 5, 1.0, 20)
        errors.append(nmse(maximum_ratio(y, h), x))
    assert errors[1] < errors[0] / 50
    assert errors[1] < 2e-3


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_dtype_is_that_of_what_was_received(dtype: torch.dtype) -> None:
    h, y = cn(4, 3).to(dtype), cn(4, 5, seed=1).to(dtype)
    assert greedy_lmmse(y, h, noise_var=0.1, symbol_var=1.0).symbols.dtype == dtype
    assert lmmse(y, h, noise_var=0.1, symbol_var=1.0).dtype == dtype
    assert zero_forcing(y, h).dtype == maximum_ratio(y, h).dtype == dtype


def test_bad_input() -> None:
    h, y = cn(4, 6), cn(4, 5)
    with pytest.raises(ValueError, match=r"`num_antennas` must be at least 1, got 0"):
        combined_gains(Rayleigh(), key(2), 0, 5)
    with pytest.raises(ValueError, match=r"`num_antennas` must be at least 1, got -3"):
        blind_moments(h, torch.ones(4), num_antennas=-3, norm=1.0)
    for call in (
        lambda y, h: greedy_lmmse(y, h, noise_var=1.0, symbol_var=1.0),
        lambda y, h: lmmse(y, h, noise_var=1.0, symbol_var=1.0),
        maximum_ratio,
        zero_forcing,
    ):
        with pytest.raises(TypeError, match=r"channel matrix must be complex of shape \[N_r, M\], got torch.float64"):
            call(y, h.real)
        with pytest.raises(ValueError, match=r"channel matrix must be complex of shape .* got .* shape \(4,\)"):
            call(y, h[:, 0])
        with pytest.raises(TypeError, match=r"Received symbols must be complex, got torch.float64"):
            call(y.real, h)
        with pytest.raises(ValueError, match=r"N_r=4 antennas and n >= 1 slots, got \(3, 5\)"):
            call(y[:3], h)
        with pytest.raises(ValueError, match=r"n >= 1 slots, got \(4, 0\)"):
            call(y[:, :0], h)
    with pytest.raises(ValueError, match=r"Zero forcing needs M <= N_r, got M=6 devices at N_r=4 antennas"):
        zero_forcing(y, h)
    with pytest.raises(ValueError, match=r"`noise_var` must be finite and >= 0, got -1"):
        lmmse(y, h, noise_var=-1.0, symbol_var=1.0)
    with pytest.raises(ValueError, match=r"`symbol_var`, the mean of \|x\|\^2, must be finite and > 0, got 0"):
        lmmse(y, h, noise_var=1.0, symbol_var=0.0)
    with pytest.raises(ValueError, match=r"`slack`.* must be finite and >= 0, got -0.1"):
        greedy_lmmse(y, h, noise_var=1.0, symbol_var=1.0, slack=-0.1)
    with pytest.raises(ValueError, match=r"`max_support` must be from 1 to min\(M, N_r\) = 4, got 5"):
        greedy_lmmse(y, h, noise_var=1.0, symbol_var=1.0, max_support=5)
