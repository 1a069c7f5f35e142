"""Digital DSGD over fading: the best device sends what its water-filled channel carries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from groundwire.plugins.channels import FadingMAC, NoFading, PathLoss, Rayleigh, Rician, StepPower, water_filling
from groundwire.plugins.compression import QSGD, DDSGDQuantizer, SignSGD
from groundwire.plugins.compression.base import log2_binomial
from groundwire.plugins.edge import Uplink
from groundwire.plugins.edge.uplinks.opportunistic_digital import OpportunisticDigital
from groundwire.plugins.random import Key
from helpers.uplinks import check_uplink, plan, ready, updates

UPLINKS: dict[str, tuple[Any, dict[str, bool]]] = {
    "d_dsgd": (
        lambda: OpportunisticDigital(DDSGDQuantizer(), error_feedback=True, accumulate_when_idle=True, power=1e3),
        {"noisy": True, "stateful": True},
    ),
    "d_dsgd_forgetful": (
        lambda: OpportunisticDigital(DDSGDQuantizer(), error_feedback=True, power=1e3),
        {"noisy": True, "stateful": True},
    ),
    "signsgd_block": (
        lambda: OpportunisticDigital(SignSGD(), power=1e3, channel=FadingMAC(Rician(1.0, block=True))),
        {"noisy": True},
    ),
    "qsgd_path_loss": (
        lambda: OpportunisticDigital(
            QSGD(num_levels=4), power=1e3, boost=False, channel=FadingMAC(Rayleigh(path_loss=PathLoss()))
        ),
        {"noisy": True},
    ),
}


@pytest.mark.parametrize("name", UPLINKS)
def test_shared_checks(name: str) -> None:
    build, options = UPLINKS[name]
    check_uplink(build, **options)


def best(fading: Any, key: Key, uses: int, power: float, noise_var: float = 1.0) -> tuple[int, float]:
    """The device with the most bits, and how many: by a search for the water level, a device at a time."""
    rates = []
    for gains in fading.gains(key, uses).expand(-1, uses).abs().square().double().numpy():
        low, high = 0.0, power + float((noise_var / gains).max())
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (low, middle) if np.maximum(middle - noise_var / gains, 0).sum() > power else (middle, high)
        rates.append(np.log2(1 + np.maximum(low - noise_var / gains, 0) * gains / noise_var).sum())
    return int(np.argmax(rates)), float(np.max(rates))


@pytest.mark.parametrize("fading", [Rayleigh(), Rician(2.0, 0.5, block=True)])
@pytest.mark.parametrize("boost", [True, False])
def test_the_device_with_the_most_bits_sends_as_many_as_fit(fading: Any, boost: bool) -> None:
    m, numel, uses, power = 5, 400, 100, 60.0
    uplink = ready(
        lambda: OpportunisticDigital(
            SignSGD(), power=power, channel=FadingMAC(fading, noise_var=0.5), channel_uses=2 * uses, boost=boost
        ),
        numel,
        m,
    )
    chosen = set()
    for t in range(8):
        x = updates(m, numel, seed=t)
        received = uplink(x, plan(m, index=t))
        spends = power * (m if boost else 1)
        device, bits = best(fading, plan(m, index=t).key, uses, spends, 0.5)
        assert float(received.metrics["uplink/bit_budget_per_device"]) == pytest.approx(bits, rel=1e-6)
        energy = received.cost.energy
        assert energy is not None
        assert energy.nonzero().flatten().tolist() == [device]
        assert float(energy[device]) == spends
        assert received.cost.channel_uses == 2 * uses
        q = int((received.rows != 0).sum())  # cost(q) <= budget < cost(q + 1)
        assert log2_binomial(numel, q) + q <= bits < log2_binomial(numel, q + 1) + q + 1
        assert received.cost.bits_ideal == pytest.approx(log2_binomial(numel, q) + q)
        largest = x[device].abs().topk(q).indices
        torch.testing.assert_close(received.rows[0, largest], x[device, largest].sign())
        chosen.add(device)
    assert len(chosen) > 1


def test_capacity_is_of_the_complex_channel() -> None:
    """One complex use at SNR 3 carries 2 bits; a real one carries 1."""
    uplink = ready(
        lambda: OpportunisticDigital(SignSGD(), power=3.0, channel=FadingMAC(NoFading()), channel_uses=2), 2, 1
    )
    received = uplink(updates(1, 2), plan(1))
    assert float(received.metrics["uplink/bit_budget_per_device"]) == pytest.approx(2.0)
    assert received.cost.channel_uses == 2


@pytest.mark.filterwarnings("ignore:There are rounds")
def test_the_average_energy_is_within_the_limit_and_devices_take_turns() -> None:
    m, rounds, power = 4, 800, 10.0
    uplink = ready(lambda: OpportunisticDigital(SignSGD(), power=power, channel_uses=8), 40, m)
    spent = torch.stack([uplink(updates(m, 40), plan(m, index=t)).cost.energy for t in range(rounds)])
    assert set(spent.sum(1).tolist()) <= {0.0, m * power}
    error = spent.std(0) / math.sqrt(rounds)
    assert (spent.mean(0) <= power + 4 * error).all()
    assert (spent.mean(0) >= power - 5 * error).all(), "each device is scheduled in one of M rounds"


def test_under_path_loss_no_device_spends_more_than_the_limit() -> None:
    channel = FadingMAC(Rayleigh(path_loss=PathLoss()))
    with pytest.raises(ValueError, match=r"M times the average energy would exceed.*boost=False"):
        OpportunisticDigital(SignSGD(), channel=channel)
    uplink = ready(lambda: OpportunisticDigital(SignSGD(), channel=channel, power=10.0, boost=False), 40, 4)
    spent = torch.stack([uplink(updates(4, 40), plan(4, index=t)).cost.energy for t in range(100)])
    assert float(spent.max()) == 10.0
    assert float(spent.mean(0).max()) > 2 * 10.0 / 4  # the nearest device sends most often: M times would be too much


@pytest.mark.filterwarnings("ignore:There are rounds")
@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 4.0, 2.0])])
def test_received_plus_held_is_the_weighted_sum_of_updates(weights: Tensor | None) -> None:
    """Telescoping, also over rounds in which nothing can be sent."""
    m, numel = 3, 300
    uplink = ready(
        lambda: OpportunisticDigital(
            DDSGDQuantizer(),
            error_feedback=True,
            accumulate_when_idle=True,
            channel_uses=150,
            power=StepPower([40, 1e-3, 400]),
        ),
        numel,
        m,
    )
    share = plan(m, weights=weights).weights
    total, got, silent = torch.zeros(numel), torch.zeros(numel), 0
    for t in range(20):
        x = updates(m, numel, seed=t)
        received = uplink(x, plan(m, index=t, weights=weights))
        total, got = total + share @ x, got + received.rows[0]
        silent += int(received.metrics["uplink/silent"])
        held = share @ uplink.feedback.memory.residual()[:m]
        torch.testing.assert_close(got + held, total, rtol=1e-4, atol=1e-5)
    assert 0 < silent < 20
    assert got.any()


def test_without_a_memory_of_idle_rounds_only_the_best_device_remembers() -> None:
    m, numel, x = 3, 100, updates(3, 100)
    uplink = ready(
        lambda: OpportunisticDigital(DDSGDQuantizer(), error_feedback=True, accumulate_when_idle=False, power=50.0),
        numel,
        m,
    )
    received = uplink(x, plan(m))
    device, _ = best(Rayleigh(), plan(m).key, 25, 150.0)
    held = uplink.feedback.memory.residual()
    torch.testing.assert_close(held[device] + received.rows[0], x[device])
    assert not held[[i for i in range(m) if i != device]].any()


def test_without_memory_the_mean_arrives_on_average_over_fading() -> None:
    """With much power the compressor sends all it can, half of the entries, and QSGD's rounding is unbiased."""
    m, numel, rounds = 3, 12, 800
    weights, x = torch.tensor([1.0, 4.0, 2.0]), updates(3, 12)
    uplink = ready(lambda: OpportunisticDigital(QSGD(num_levels=4), power=1e9, bandwidth=1.0), numel, m)
    rows = torch.stack([uplink(x, plan(m, index=t, weights=weights)).rows[0] for t in range(rounds)]).double()
    kept = torch.zeros_like(x).scatter(1, indices := x.abs().topk(6).indices, x.gather(1, indices))
    exact = (plan(m, weights=weights).weights @ kept).double()
    error = rows.std(0) / math.sqrt(rounds)
    assert ((rows.mean(0) - exact).abs() < 5 * error + 1e-9).all()


def test_one_device_sends_half_of_its_entries_when_the_budget_allows_more() -> None:
    x = updates(1, 30)
    uplink = ready(lambda: OpportunisticDigital(SignSGD(), power=1e12, bandwidth=1.0), 30, 1)
    largest = x[0].abs() >= x[0].abs().topk(15).values[-1]
    torch.testing.assert_close(uplink(x, plan(1)).rows[0], x[0].sign() * largest)


def test_when_nothing_fits_nobody_sends_and_nothing_is_lost() -> None:
    x, m = updates(3, 100), 3
    uplink = ready(
        lambda: OpportunisticDigital(DDSGDQuantizer(), error_feedback=True, accumulate_when_idle=True, power=1e-3),
        100,
        m,
    )
    with pytest.warns(UserWarning, match="nobody sends.*fewer bits than the smallest message of DDSGDQuantizer"):
        received = uplink(x, plan(m))
    assert not received.rows.any()
    assert (received.cost.bits, received.cost.channel_uses, float(received.cost.energy.sum())) == (0, 0, 0.0)
    assert float(received.metrics["uplink/silent"]) == 1.0
    torch.testing.assert_close(uplink.feedback.memory.residual()[:m], x)


@pytest.mark.filterwarnings("ignore:There are rounds")
def test_more_devices_have_a_better_best() -> None:
    """Diversity: under block fading the best of M gains grows as the harmonic number of M."""
    rates = []
    for m in (1, 4, 16):
        fading = Rayleigh(block=True)
        gains = torch.stack([fading.gains(plan(m, index=t).key, 1).abs().square().max() for t in range(400)])
        harmonic = sum(1 / i for i in range(1, m + 1))
        assert abs(float(gains.mean()) - harmonic) < 5 * float(gains.std()) / 20
        uplink = ready(
            lambda f=fading, m=m: OpportunisticDigital(SignSGD(), power=30 / m, channel=FadingMAC(f), channel_uses=20),
            40,
            m,
        )
        bits = [uplink(updates(m, 40), plan(m, index=t)).metrics["uplink/bit_budget_per_device"] for t in range(100)]
        rates.append(float(np.mean(bits)))
    assert rates[0] < rates[1] < rates[2]


def test_without_fading_devices_take_turns_by_chance() -> None:
    """All have the same budget; each spends M times the average energy in one of M rounds on average."""
    m, rounds = 5, 400
    uplink = ready(lambda: OpportunisticDigital(SignSGD(), power=60.0, channel=FadingMAC(NoFading())), 40, m)
    spent = torch.stack([uplink(updates(m, 40), plan(m, index=t)).cost.energy for t in range(rounds)])
    error = 60 * math.sqrt((m - 1) / rounds)  # of a mean of binomial numbers
    assert ((spent.mean(0) - 60).abs() < 4 * error).all()


def test_budget_is_water_fillings() -> None:
    gains = Rayleigh().gains(plan(2).key, 20).abs().square().double()
    _, bits = water_filling(gains, 2 * 7.0, 1.0)
    uplink = ready(
        lambda: OpportunisticDigital(SignSGD(), power=7.0, channel_uses=41), 50, 2
    )  # one real use is left over
    received = uplink(updates(2, 50), plan(2))
    assert float(received.metrics["uplink/bit_budget_per_device"]) == float(bits.max())
    assert received.cost.channel_uses == 40


def test_built_from_yaml_and_says_its_settings() -> None:
    parser = ArgumentParser()
    parser.add_argument("--uplink", type=Uplink)
    config = """
    uplink:
      class_path: groundwire.plugins.edge.OpportunisticDigital
      init_args:
        compressor: {class_path: groundwire.plugins.compression.DDSGDQuantizer}
        error_feedback: true
        power: 200
        channel: {class_path: groundwire.plugins.channels.FadingMAC, init_args: {noise_var: 0.5}}
    """
    uplink = parser.instantiate(parser.parse_string(config)).uplink
    assert isinstance(uplink, OpportunisticDigital)
    for words in ("boost=True", "accumulate_when_idle=False", "noise_var=0.5", "DDSGDQuantizer"):
        assert words in repr(uplink)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OpportunisticDigital(SignSGD(), power=-1.0), "power_per_round must be > 0"),
        (lambda: OpportunisticDigital(SignSGD(), channel_uses=1), "needs 2 <= s <= 100"),
        (lambda: OpportunisticDigital(SignSGD(), bandwidth=1.5), r"must be in \(0, 1\], got 1.5"),
        (lambda: OpportunisticDigital(SignSGD(), channel=FadingMAC(csi_error_var=0.1)), "needs perfect CSI"),
        (lambda: OpportunisticDigital(SignSGD(), channel=FadingMAC(csi_error_var=None)), "needs perfect CSI"),
        (lambda: OpportunisticDigital(SignSGD(), channel=FadingMAC(noise_var=0.0)), r"and noise \(noise_var > 0\)"),
    ],
)
def test_bad_input_by_message(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ready(build, 100, 3)


def test_average_power_limit_is_enforced() -> None:
    uplink = ready(lambda: OpportunisticDigital(SignSGD(), power=300.0, average_power=200.0), 100, 2)
    with pytest.raises(ValueError, match=r"averages 300\.0 over 20 rounds, above the limit 200\.0"):
        uplink(updates(2, 100), plan(2))
