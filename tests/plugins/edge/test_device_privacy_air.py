"""Privacy by the receiver's noise: amplitudes, energies and epsilons against formulas written out here."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch import Tensor

from groundwire.plugins.channels import GaussianMAC, StepPower
from groundwire.plugins.edge import DPOverTheAir, Received, Uplink
from helpers.uplinks import plan, ready, updates

N = 200_000
BAND = 5 / math.sqrt(2 * N)  # five standard errors of a measured standard deviation: 0.8 %


def silent(
    *,
    power: Any,
    noise_var: float,
    sigma: float | None,
    bound: float,
    rate: float,
    population: int,
    index: int = 0,
    **options: Any,
) -> tuple[Received, DPOverTheAir]:
    """What arrives of updates that are zero: noise alone; and the uplink that has seen the round."""
    build = lambda: DPOverTheAir(
        bound, noise_multiplier=sigma, power=power, channel=GaussianMAC(noise_var), target_delta=1e-5, **options
    )
    uplink = ready(build, N, population)
    received: Received = uplink(torch.zeros(2, N), plan(2, sample_rate=rate, index=index))
    assert isinstance(uplink, DPOverTheAir)
    return received, uplink


def epsilon_of(sigma: float, releases: int = 1, delta: float = 1e-5) -> float:
    """Of Gaussian releases, exactly: Balle and Wang's delta of one with ``sigma / sqrt(releases)``, bisected."""
    mu, phi = math.sqrt(releases) / sigma, lambda x: math.erfc(-x / math.sqrt(2)) / 2
    low, high = 0.0, 5000.0
    for _ in range(100):
        middle = (low + high) / 2
        tail = phi(-mu / 2 - middle / mu)
        above = phi(mu / 2 - middle / mu) - (math.exp(middle + math.log(tail)) if tail else 0.0) > delta
        low, high = (middle, high) if above else (low, middle)
    return high


@pytest.mark.parametrize(
    ("power", "noise_var", "sigma", "amplitude"),
    [
        (9.0, 4.0, 0.1, 3.0 / 0.4),  # the channel is noisy enough at full power: sigma could be 20
        (9.0, 4.0, 0.0, 3.0 / 0.4),
        (500.0, 4.0, 2.0, 1.0 / 0.4),  # power lowered to noise_var / sigma^2
        (1.0, 4.0, 2.0, 1.0 / 0.4),  # just enough
    ],
)
def test_the_amplitude_is_the_smaller_one_of_power_and_privacy(
    power: float, noise_var: float, sigma: float, amplitude: float
) -> None:
    received, _ = silent(power=power, noise_var=noise_var, sigma=sigma, bound=0.4, rate=0.2, population=30)
    assert received.metrics["uplink/amplitude"] == pytest.approx(amplitude, rel=1e-12)
    expected = math.sqrt(noise_var) / (amplitude * 0.2 * 30)
    noise = received.rows[0].double()
    assert float(noise.std()) == pytest.approx(expected, rel=BAND)
    assert abs(float(noise.mean())) < 5 * expected / math.sqrt(N)


def test_at_equal_noise_the_server_sees_what_dp_fedavgs_server_publishes() -> None:
    """The noise of the sum is sigma C, whatever the noise in the air, as long as the power suffices."""
    for noise_var in (0.01, 1.0, 25.0):
        received, _ = silent(power=1e3, noise_var=noise_var, sigma=1.7, bound=0.5, rate=0.3, population=10)
        assert float(received.rows[0].double().std()) == pytest.approx(1.7 * 0.5 / (0.3 * 10), rel=BAND)


def clipped(rows: Tensor, bound: float) -> Tensor:
    return torch.stack([row / max(1.0, float(row.norm()) / bound) for row in rows.double()])


@settings(max_examples=40, deadline=None)
@given(
    power=st.floats(1e-3, 1e4),
    noise_var=st.floats(1e-3, 1e2),
    sigma=st.floats(0.01, 10),
    bound=st.floats(1e-2, 10),
    scale=st.floats(1e-3, 1e3),
    participants=st.integers(1, 6),
)
def test_energy_is_that_of_what_is_sent_and_within_the_power(
    power: float, noise_var: float, sigma: float, bound: float, scale: float, participants: int
) -> None:
    x = scale * updates(participants, 40).double()
    uplink = ready(
        lambda: DPOverTheAir(bound, noise_multiplier=sigma, power=power, channel=GaussianMAC(noise_var)), 40, 9
    )
    received = uplink(x, plan(participants, sample_rate=0.5))
    amplitude = min(math.sqrt(power), math.sqrt(noise_var) / sigma) / bound
    expected = amplitude**2 * clipped(x, bound).square().sum(1)
    assert received.cost.energy is not None
    torch.testing.assert_close(received.cost.energy, expected, rtol=1e-9, atol=0)
    assert float(received.cost.energy.max()) <= power * (1 + 1e-9)
    assert received.cost.channel_uses == 40
    assert received.cost.bits == 0


@pytest.mark.parametrize(("rate", "population"), [(1.0, 5), (0.25, 40)])
@pytest.mark.parametrize("power", [1e-2, 1e2])
def test_with_hardly_any_noise_it_is_the_sum_of_clipped_updates(rate: float, population: int, power: float) -> None:
    x = updates(5, 300) * torch.tensor([[0.01], [1.0], [3.0], [100.0], [0.0]])
    build = lambda: DPOverTheAir(1.5, noise_multiplier=0.0, power=power, channel=GaussianMAC(1e-20))
    weights = torch.tensor([1.0, 50.0, 2.0, 7.0, 1.0])  # a device with many samples counts like any other
    received = ready(build, 300, population)(x, plan(5, sample_rate=rate, weights=weights))
    expected = (clipped(x, 1.5).sum(0) / (rate * population)).float()
    torch.testing.assert_close(received.rows[0], expected, rtol=1e-5, atol=1e-7)


def test_an_empty_round_is_noise_without_energy() -> None:
    uplink = ready(lambda: DPOverTheAir(0.5, noise_multiplier=2.0), N, 10)
    received = uplink(torch.zeros(1, N), plan((0,), sample_rate=0.1, is_empty=True))
    assert float(received.rows.double().std()) == pytest.approx(2.0 * 0.5 / (0.1 * 10), rel=BAND)
    assert received.cost.energy is not None
    assert not received.cost.energy.any()


# ---------------------------------------------------------------- epsilon


@pytest.mark.parametrize("sigma", [0.0, 0.5, 2.0])
def test_more_power_never_gives_a_smaller_epsilon(sigma: float) -> None:
    """Up to the power at which the channel alone is noisy enough, epsilon is that of its noise; from there on, flat."""
    powers, noise_var = [0.01, 0.25, 1.0, 3.0, 4.0, 16.0, 50.0], 4.0
    claimed = []
    for power in powers:
        _, uplink = silent(power=power, noise_var=noise_var, sigma=sigma, bound=0.3, rate=1.0, population=20)
        claimed.append(uplink.privacy(rounds=3).epsilon)
    there = [max(sigma, math.sqrt(noise_var / power)) for power in powers]
    assert claimed == pytest.approx([epsilon_of(s, 3) for s in there], rel=1e-4)
    assert all(a <= b for a, b in pairwise(claimed))
    assert claimed[0] < claimed[-1]


def test_epsilon_does_not_depend_on_the_clipping_norm_nor_on_the_unit_of_power() -> None:
    common = {"sigma": 0.0, "rate": 1.0, "population": 20}
    values = [
        silent(**common, **setting)[1].privacy(rounds=2).epsilon
        for setting in (
            {"power": 1.0, "noise_var": 4.0, "bound": 0.3},
            {"power": 1.0, "noise_var": 4.0, "bound": 30.0},
            {"power": 100.0, "noise_var": 400.0, "bound": 0.3},
        )
    ]
    assert values == pytest.approx([epsilon_of(2.0, 2)] * 3, rel=1e-4)


def test_a_budget_that_the_channel_keeps_by_itself_leaves_the_power_alone() -> None:
    budget = {"noise_var": 1.0, "sigma": None, "bound": 1.0, "rate": 1.0, "population": 20}
    received, uplink = silent(power=1e-4, target_epsilon=8.0, **budget)
    assert received.metrics["uplink/amplitude"] == pytest.approx(1e-2)
    assert uplink.privacy(rounds=20).epsilon == pytest.approx(epsilon_of(100.0, 20), rel=1e-4)  # below the budget
    received, uplink = silent(power=1e4, target_epsilon=8.0, **budget)
    lowered = float(received.metrics["uplink/amplitude"])
    assert epsilon_of(1 / lowered, 20) == pytest.approx(8.0, rel=0.01)  # 20 rounds are planned
    assert 0.95 * 8 <= uplink.privacy(rounds=20).epsilon <= 8


def test_a_power_that_changes_counts_no_more_noise_than_was_asked_for() -> None:
    """Rounds of low power have more; what is claimed holds for the loudest."""
    schedule = StepPower([0.01, 100.0])
    amplitudes, claimed = [], []
    for index in (0, 19):
        received, uplink = silent(
            power=schedule, noise_var=1.0, sigma=2.0, bound=1.0, rate=1.0, population=20, index=index
        )
        amplitudes.append(float(received.metrics["uplink/amplitude"]))
        claimed.append(uplink.privacy(rounds=20).epsilon)
    assert amplitudes == pytest.approx([0.1, 0.5])
    assert claimed == pytest.approx([epsilon_of(2.0, 20)] * 2, rel=1e-4)
    _, unlimited = silent(power=schedule, noise_var=1.0, sigma=0.0, bound=1.0, rate=1.0, population=20)
    assert unlimited.privacy(rounds=20).epsilon == math.inf


def test_the_statement_names_the_noise_that_it_counts_on() -> None:
    _, uplink = silent(power=1.0, noise_var=0.25, sigma=1.0, bound=1.0, rate=0.5, population=20)
    text = str(uplink.privacy(rounds=3))
    assert "Noise of variance 0.25 a real channel use" in text
    assert "coins that stay secret" in text


# ---------------------------------------------------------------- bad input


def test_a_channel_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`channel` has noise_var 0, so nothing hides the devices.*use DPFedAvg"):
        DPOverTheAir(1.0, noise_multiplier=1.0, channel=GaussianMAC(0.0))


@pytest.mark.parametrize("power", [0.0, -1.0, math.inf])
def test_a_power_that_is_none_is_refused(power: float) -> None:
    with pytest.raises(ValueError, match="power"):
        DPOverTheAir(1.0, noise_multiplier=1.0, power=power)


def test_average_power_is_enforced() -> None:
    uplink = ready(lambda: DPOverTheAir(1.0, noise_multiplier=1.0, power=3.0, average_power=2.0), 10, 2)
    with pytest.raises(ValueError, match=r"averages 3.0 over 20 rounds, above the limit 2.0"):
        uplink(updates(2, 10), plan(2))


def test_built_from_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--uplink", type=Uplink)
    config = """
    uplink:
      class_path: groundwire.plugins.edge.DPOverTheAir
      init_args:
        clip_norm: 0.5
        target_epsilon: 8
        power: {class_path: groundwire.plugins.channels.StepPower, init_args: {levels: [1, 2]}}
        channel: {class_path: groundwire.plugins.channels.GaussianMAC, init_args: {noise_var: 0.5}}
    """
    uplink = parser.instantiate(parser.parse_string(config)).uplink
    assert isinstance(uplink, DPOverTheAir)
    assert (uplink.channel.noise_var, uplink.power.of(plan(1, index=19))) == (0.5, 2)
    np.testing.assert_equal(uplink.device_privacy.target_epsilon, 8)
