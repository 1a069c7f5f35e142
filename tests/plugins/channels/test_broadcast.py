"""The broadcast channel and its rates, against closed forms, water-filling and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from groundwire.plugins.channels import FadingMAC, NoFading, PathLoss, Rayleigh, water_filling
from groundwire.plugins.channels.broadcast import (
    FadingBroadcast,
    common_rate,
    lmmse,
    superposition_bits,
    zero_forcing,
)
from groundwire.plugins.random import Key


def everyone(devices: int, *, seed: int = 0, round: int = 0) -> Key:
    return Key(seed=seed, round=round, devices=tuple(range(devices)))


def exponential(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(seed))


def test_devices_hear_the_same_symbols_with_gains_and_noise_of_their_own() -> None:
    x = torch.randn(50_000, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    channel, key = FadingBroadcast(Rayleigh(), noise_var=2.0), everyone(3)
    gains = channel.gains(key, len(x))
    noise = channel(x, key) - gains * x
    assert noise.abs().square().mean(1).tolist() == pytest.approx([2.0] * 3, rel=0.03)  # 5 standard errors: 0.022
    assert noise.real.square().mean().item() == pytest.approx(1.0, rel=0.03)
    for i in range(3):
        for j in range(i):
            assert (noise[i] * noise[j].conj()).mean().abs() < 5 * 2.0 / math.sqrt(len(x))
            assert (gains[i] * gains[j].conj()).mean().abs() < 5 / math.sqrt(len(x))
    quiet = FadingBroadcast(Rayleigh(), noise_var=0.0)
    assert torch.equal(quiet(x, key), gains * x)


def test_rows_are_those_of_the_devices_whoever_else_listens_and_not_those_of_the_uplink() -> None:
    x = torch.ones(40, dtype=torch.complex64)
    channel = FadingBroadcast(Rayleigh())
    together, alone = channel(x, everyone(4)), channel(x, Key(seed=0, devices=(2,)))
    assert torch.equal(together[2:3], alone)
    for other in (everyone(4, seed=1), everyone(4, round=1)):
        assert not torch.equal(channel(x, other), together)
    assert not torch.isclose(channel.gains(everyone(4), 40), FadingMAC(Rayleigh()).gains(everyone(4), 40)).any()
    assert not torch.isclose(channel.gains(everyone(4), 40, block=1), channel.gains(everyone(4), 40)).any()


def test_bits_alone_are_shannons_and_drawn_in_pieces_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FadingBroadcast(NoFading()).bits(everyone(2), 1, power=3.0).tolist() == [2.0, 2.0]  # a complex use at SNR 3
    key, uses = everyone(5), 30
    for block in (False, True):
        channel = FadingBroadcast(Rayleigh(block=block), noise_var=0.5)
        squares = channel.gains(key, uses).abs().square().double().expand(5, uses)
        expected = [sum(math.log2(1 + 7.0 / uses * h / 0.5) for h in row) for row in squares.tolist()]
        found = channel.bits(key, uses, power=7.0)
        assert found.tolist() == pytest.approx(expected, rel=1e-6)
        with monkeypatch.context() as patch:
            patch.setattr("groundwire.plugins.channels.broadcast._AT_ONCE", 60)
            assert torch.equal(channel.bits(key, uses, power=7.0), found)


def test_common_rate_of_more_devices_is_never_higher() -> None:
    for fading in (Rayleigh(), Rayleigh(block=True), Rayleigh(path_loss=PathLoss())):
        bits = FadingBroadcast(fading).bits(everyone(30), 20, power=10.0)  # paired: device m has the gains of device m
        least = [float(FadingBroadcast(fading).bits(everyone(m), 20, power=10.0).min()) for m in range(1, 31)]
        assert least == bits.cummin(0).values.tolist()
        assert least == sorted(least, reverse=True)


@pytest.mark.parametrize("n", [1, 2, 50, 500])
@pytest.mark.parametrize("power", [0.1, 1.0, 10.0])
def test_common_rate_of_one_device_is_water_filling(n: int, power: float) -> None:
    snr = exponential(1, n, seed=n) * power
    powers, bits = common_rate(snr)
    _, best = water_filling(snr[0] / power, power * n, 1.0)
    even = torch.log2(1 + snr).sum()
    assert powers.min() >= 0
    assert float(powers.mean()) == pytest.approx(1.0, abs=1e-9)
    assert float(best) * (1 - 2e-3) <= float(bits) <= float(best) * (1 + 1e-9)
    assert bits >= even - 1e-9
    assert float(bits) == pytest.approx(float(torch.log2(1 + powers * snr).sum()))


def test_common_rate_is_that_of_a_fine_grid() -> None:
    for seed in range(5):
        snr = 3 * exponential(4, 2, seed=seed)
        _, bits = common_rate(snr)
        first = np.linspace(0, 2, 4001)
        grid = np.log2(1 + first[:, None] * snr[:, 0].numpy()) + np.log2(1 + (2 - first)[:, None] * snr[:, 1].numpy())
        assert float(bits) == pytest.approx(grid.min(1).max(), rel=2e-3)


def test_superposition_of_equal_rates_spends_all_power_and_is_decodable() -> None:
    snr, uses = 4 * exponential(6, seed=3), 10
    shares, bits = superposition_bits(snr, uses)
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-9)
    for m in range(6):
        above = sum(float(shares[j]) for j in range(6) if snr[j] > snr[m])  # noise to device m
        rate = uses * math.log2(1 + float(shares[m] * snr[m]) / (1 + float(snr[m]) * above))
        assert rate == pytest.approx(float(bits), rel=1e-6)
    one, alone = superposition_bits(snr[:1], uses)
    assert one.tolist() == [pytest.approx(1.0)]
    assert float(alone) == pytest.approx(uses * math.log2(1 + float(snr[0])))
    for seed in range(20):  # time sharing lies within what superposition reaches
        two = 4 * exponential(2, seed=seed)
        assert superposition_bits(two, uses)[1] >= (uses / 2 * torch.log2(1 + two)).min() - 1e-9


def test_lmmse_is_the_least_squares_fit_and_zero_forcing_unbiased() -> None:
    g = torch.Generator().manual_seed(5)
    n, noise_var, h = 200_000, 0.7, torch.tensor([[0.6 - 0.8j]])
    x = torch.randn(1, n, dtype=torch.complex64, generator=g) * math.sqrt(3.0)
    y = h * x + torch.randn(1, n, dtype=torch.complex64, generator=g) * math.sqrt(noise_var)
    factor = complex((y.conj() * x).sum() / y.abs().square().sum())  # of least squares over these very symbols
    found = lmmse(y, h, noise_var / 3.0) / y
    assert complex(found[0, 0]) == pytest.approx(factor, rel=0.01)
    best, plain = lmmse(y, h, noise_var / 3.0), zero_forcing(y, h)
    assert float((best - x).abs().square().mean()) == pytest.approx(3 * 0.7 / (3 + 0.7), rel=0.02)
    assert float((plain - x).abs().square().mean()) == pytest.approx(0.7, rel=0.02)
    assert ((plain - x).mean()).abs() < 5 * math.sqrt(0.7 / n)
    assert torch.allclose(lmmse(y, h, 0.0), plain)


def test_refuses_what_it_cannot_carry() -> None:
    channel = FadingBroadcast()
    with pytest.raises(TypeError, match=r"complex64 or complex128, got torch\.float32"):
        channel(torch.zeros(3), everyone(2))
    with pytest.raises(ValueError, match=r"shape \(n,\) with n >= 1 channel uses, got \(0,\)"):
        channel(torch.zeros(0, dtype=torch.complex64), everyone(2))
    with pytest.raises(ValueError, match=r"`noise_var` is a variance.*got -1"):
        FadingBroadcast(noise_var=-1.0)
    with pytest.raises(ValueError, match="noiseless channel has no finite rate"):
        FadingBroadcast(noise_var=0.0).bits(everyone(2), 3, power=1.0)
    with pytest.raises(ValueError, match=r"SNRs of shape \(M, n\), got \(3,\)"):
        common_rate(torch.ones(3))
    for bad in (torch.ones(2, 2), torch.ones(0)):
        with pytest.raises(ValueError, match=r"SNRs of shape \(K,\)"):
            superposition_bits(bad, 3)
