"""The fading multiple-access channel against its definition, and what is known of its gains."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from groundwire.plugins.channels import Fading, FadingMAC, NoFading, PathLoss, Rayleigh, Rician
from groundwire.plugins.random import Key
from helpers.channels import ChannelTester


class ComplexChannelTester(ChannelTester):
    single, double = torch.complex64, torch.complex128
    refused = (torch.int64, torch.float32, torch.float64)
    uses_per_symbol = 2
    fading: Fading

    def make(self, noise_var: float) -> FadingMAC:
        return FadingMAC(self.fading, noise_var)

    def noiseless(self, x: Tensor, key: Key) -> Tensor:
        gains = self.fading.gains(key, x.shape[1]).to(x.dtype).expand_as(x)
        return torch.stack([gains[m] * x[m] for m in range(len(x))]).sum(0)

    def test_noise_is_circular(self) -> None:
        noise = self.make(3.0)(torch.zeros(1, 100_000, dtype=self.double), self.key(1)).symbols
        for part in (noise.real, noise.imag):  # half of it in either
            assert abs(float(part.square().mean()) - 1.5) < 5 * 1.5 * math.sqrt(2 / 100_000)
        assert abs(float((noise.real * noise.imag).mean())) < 5 * 1.5 / math.sqrt(100_000)

    def test_noise_does_not_depend_on_the_fading(self) -> None:
        x = torch.zeros(2, 60, dtype=self.single)
        noises = [FadingMAC(fading)(x, self.key(2)).symbols for fading in (NoFading(), Rayleigh(), Rician(2.0, 7.0))]
        assert torch.equal(noises[0], noises[1])
        assert torch.equal(noises[0], noises[2])

    def test_given_gains_are_used(self) -> None:
        x = torch.randn(3, 20, dtype=self.single, generator=torch.Generator().manual_seed(0))
        channel, key = self.make(0.5), self.key(3)
        assert torch.equal(channel(x, key, gains=channel.gains(key, 20)).symbols, channel(x, key).symbols)
        doubled = channel(x, key, gains=2 * channel.gains(key, 20)).symbols - channel(2 * x, key).symbols
        assert float(doubled.abs().max()) < 1e-5


class TestWithoutFading(ComplexChannelTester):
    yaml = "class_path: groundwire.plugins.channels.FadingMAC\ninit_args: {noise_var: 2.0}"
    fading = NoFading()

    def test_is_the_sum(self) -> None:
        x = torch.randn(4, 30, dtype=self.double)
        torch.testing.assert_close(self.make(0.0)(x, self.key(4)).symbols, x.sum(0))


class TestRayleigh(ComplexChannelTester):
    yaml = """
class_path: groundwire.plugins.channels.FadingMAC
init_args:
  fading: {class_path: groundwire.plugins.channels.Rayleigh, init_args: {block: true}}
  csi_error_var: null
"""
    fading = Rayleigh(2.0, path_loss=PathLoss())

    def test_reads_nothing_back_to_the_host(self) -> None:
        with torch.device("meta"):  # where nothing can be drawn
            x, gains = torch.ones(2, 3, 20, dtype=self.single)
        heard = self.make(noise_var=0.0)(x, self.key(3), gains=gains)
        assert heard.symbols.shape == (20,)
        assert heard.energy.shape == (3,)


class TestBlockRician(TestRayleigh):
    fading = Rician(2.0, block=True)


# ---------------------------------------------------------------- channel state information


@pytest.mark.parametrize("fading", [Rayleigh(2.0), Rician(3.0, 2.0, block=True)])
def test_known_gains_are_gains_plus_errors(fading: Fading) -> None:
    key = Key(seed=0, devices=tuple(range(2000)))
    gains = FadingMAC(fading).gains(key, 30)
    assert FadingMAC(fading).csi(gains, key, who="the test") is gains
    errors = FadingMAC(fading, csi_error_var=0.3).csi(gains, key, who="the test") - gains
    n = errors.numel()
    assert abs(float(errors.abs().square().mean()) - 0.3) < 5 * 0.3 / math.sqrt(n)
    correlation = (errors * gains.conj()).mean().abs()
    assert float(correlation) < 5 * math.sqrt(0.3 * 2.0 / n)
    one = Key(seed=0, devices=(7,))
    alone = FadingMAC(fading, csi_error_var=0.3).csi(gains[7:8], one, who="the test") - gains[7:8]
    torch.testing.assert_close(alone[0], errors[7])


@pytest.mark.parametrize("error_var", [0.05, 0.5])
def test_inverting_what_is_known_leaves_beta_of_the_mean(error_var: float) -> None:
    """``h / g`` for ``g = h + e``: conditional mean ``beta = v / (v + e)``, variance ``beta e / |g|^2``."""
    key, variance, threshold = Key(seed=1, devices=tuple(range(500))), 1.5, 0.4
    channel = FadingMAC(Rayleigh(variance), csi_error_var=error_var)
    gains = channel.gains(key, 800)
    known = channel.csi(gains, key, who="the test").to(torch.complex128)
    active = known.abs().square() >= threshold
    ratio = (gains / known)[active]
    beta = variance / (variance + error_var)
    standard_error = float((ratio - ratio.mean()).abs().square().mean().sqrt()) / math.sqrt(len(ratio))
    assert float((ratio.mean() - beta).abs()) < 5 * standard_error
    assert float((ratio.mean() - 1).abs()) > 5 * standard_error
    normalised = (ratio - beta).abs().square() * known[active].abs().square()
    error = 5 * float(normalised.std()) / math.sqrt(len(ratio))
    assert abs(float(normalised.mean()) - beta * error_var) < error


def test_no_csi_is_refused_by_who_needs_it() -> None:
    channel = FadingMAC(csi_error_var=None)
    with pytest.raises(ValueError, match=r"The test needs channel state information.*or use BlindTransmitters"):
        channel.check_csi("The test")
    with pytest.raises(ValueError, match="The test needs channel state information"):
        channel.csi(torch.ones(1, 1, dtype=torch.complex64), Key(seed=0), who="The test")
    channel(torch.ones(1, 5, dtype=torch.complex64), Key(seed=0))  # sending needs none


@pytest.mark.parametrize("error_var", [-0.1, math.inf, math.nan])
def test_refuses_impossible_errors(error_var: float) -> None:
    with pytest.raises(ValueError, match=f"`csi_error_var` must be finite and >= 0.*got {error_var}"):
        FadingMAC(csi_error_var=error_var)


def test_representation_tells_all_settings() -> None:
    words = repr(FadingMAC(Rician(2.0, block=True, path_loss=PathLoss(2.5)), noise_var=0.5, csi_error_var=0.1))
    for setting in ("k_factor=2.0", "block=True", "exponent=2.5", "noise_var=0.5", "csi_error_var=0.1"):
        assert setting in words
