"""Blind transmitters against the formulas of their error, limit cases, and the shared tester."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from groundwire.plugins.channels import FadingMAC, LinearPower, NoFading, PathLoss, Rayleigh, Rician, StepPower
from groundwire.plugins.edge import EdgeStrategy, LocalSGD, Uplink, WeightedMean
from groundwire.plugins.edge.uplinks.blind import BlindTransmitters
from helpers.edge import Classifier, check_strategy_part, fit, mlp
from helpers.uplinks import check_uplink, plan, ready, updates

VARIANTS: dict[str, Callable[[], Uplink]] = {
    "power": lambda: BlindTransmitters(num_antennas=12),
    "imperfect_csi": lambda: BlindTransmitters(num_antennas=3, csi_error_var=1.0, power=StepPower([5.0, 50.0])),
    "amplitude": lambda: BlindTransmitters(num_antennas=3, amplitude=2.0, subchannels=16),
    "block_rician": lambda: BlindTransmitters(num_antennas=3, fading=Rician(2.0, block=True)),
    "normal": lambda: BlindTransmitters(num_antennas=3, gaussian_approx=True),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_shared_checks(name: str) -> None:
    check_uplink(VARIANTS[name], noisy=True)


def estimates(build: Callable[[], Uplink], x: Tensor, rounds: int, weights: Tensor | None = None) -> Tensor:
    """What the server has in so many rounds, shape ``(rounds, d)``, float64."""
    uplink = ready(build, x.shape[1], len(x))
    rows = [uplink(x, plan(len(x), index=t, weights=weights, num_rounds=rounds)).rows[0] for t in range(rounds)]
    return torch.stack(rows).double()


def check_mean(drawn: Tensor, expected: Tensor) -> None:
    standard_error = drawn.std(0) / math.sqrt(len(drawn))
    assert bool(((drawn.mean(0) - expected).abs() < 4 * standard_error).all())


@pytest.mark.parametrize("approx", [False, True])
@pytest.mark.parametrize("csi_error_var", [0.0, 1.0])
def test_unbiased_with_unequal_weights(approx: bool, csi_error_var: float) -> None:
    x, weights = updates(4, 9), torch.tensor([1.0, 2.0, 3.0, 4.0])

    def build() -> Uplink:
        return BlindTransmitters(
            num_antennas=2, power=20.0, csi_error_var=csi_error_var, gaussian_approx=approx, fading=Rayleigh(3.0)
        )

    drawn = estimates(build, x, 500, weights)
    check_mean(drawn, (weights / 10 @ x).double())
    assert bool(((drawn.mean(0) - x.mean(0)).abs() > 4 * drawn.std(0) / math.sqrt(500)).any()), "or any mean would do"


def test_path_loss_weighs_devices_by_their_gains() -> None:
    x, place = updates(3, 7, seed=3), PathLoss(exponent=2.0, inner_radius=30.0)
    drawn = estimates(lambda: BlindTransmitters(4, power=100.0, fading=Rayleigh(path_loss=place)), x, 500)
    share = place(plan(3).key)
    check_mean(drawn, (share / share.sum() @ x).double())


@pytest.mark.parametrize("approx", [False, True])
@pytest.mark.parametrize("antennas", [1, 8, 64])
@pytest.mark.parametrize("csi_error_var", [0.0, 2.0])
def test_error_is_what_the_formula_says(approx: bool, antennas: int, csi_error_var: float) -> None:
    """Per complex entry, as written by hand; summed over all entries."""
    devices, numel, noise_var, alpha, variance = 5, 4000, 3.0, 4.0, 2.0
    x = updates(devices, numel).sign() * (1 + torch.arange(devices).unsqueeze(1)) / 3  # entries alike, so many draws
    estimate = ready(
        lambda: BlindTransmitters(
            antennas,
            amplitude=alpha,
            fading=Rayleigh(variance),
            noise_var=noise_var,
            csi_error_var=csi_error_var,
            gaussian_approx=approx,
        ),
        numel,
        devices,
    )(x, plan(devices)).rows[0]
    measured = float((estimate - x.mean(0)).square().sum()) / (numel / 2)
    p2 = float(x.square().sum()) / devices / (numel / 2)
    expected = p2 / antennas + noise_var / (antennas * devices * variance * alpha**2)
    expected += csi_error_var / (antennas * devices * variance) * (p2 + noise_var / (devices * variance * alpha**2))
    assert measured == pytest.approx(expected, rel=0.1)


def test_one_device_and_one_antenna_are_never_exact() -> None:
    """Without noise the estimate is ``x |h|^2``, not ``x``."""
    x, variance = updates(1, 40), 2.0
    fading = Rayleigh(variance)
    estimate = ready(lambda: BlindTransmitters(1, fading=fading, noise_var=0.0), 40, 1)(x, plan(1)).rows
    gain = fading.gains(plan(1).key, 20).abs().square() / variance
    torch.testing.assert_close(estimate, x * gain.repeat(1, 2), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(estimate, x, rtol=0.1)


def test_noise_is_what_other_methods_hear() -> None:
    """With one antenna and one device: ``conj(h) (h x + z)`` with gains and noise of the fading channel."""
    x, channel = updates(1, 40), FadingMAC(noise_var=1.0)
    estimate = ready(lambda: BlindTransmitters(1, amplitude=1.0), 40, 1)(x, plan(1)).rows[0]
    rest = estimate - ready(lambda: BlindTransmitters(1, amplitude=1.0, noise_var=0.0), 40, 1)(x, plan(1)).rows[0]
    expected = channel.noise(plan(1).key, 20) * channel.gains(plan(1).key, 20)[0].abs()
    torch.testing.assert_close(rest, torch.cat([expected.real, expected.imag]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("csi_error_var", [0.0, 5.0])
def test_very_many_antennas_give_the_mean(csi_error_var: float) -> None:
    """Fading, noise and errors of CSI vanish."""
    x = updates(6, 51)
    build = lambda: BlindTransmitters(10**14, power=1e-3, csi_error_var=csi_error_var, gaussian_approx=True)
    torch.testing.assert_close(ready(build, 51, 6)(x, plan(6)).rows[0], x.mean(0), rtol=1e-3, atol=1e-5)


def test_metrics_tell_error_and_diversity() -> None:
    x = torch.eye(4, 8)  # orthogonal: as different as four devices can be
    uplink = ready(lambda: BlindTransmitters(10), 8, 4)
    received = uplink(x, plan(4))
    assert float(received.metrics["uplink/diversity"]) == pytest.approx(4.0)
    error = float((received.rows[0] - x.mean(0)).square().sum() / x.mean(0).square().sum())
    assert float(received.metrics["uplink/nmse"]) == pytest.approx(error, rel=1e-4)
    alike = uplink(torch.ones(4, 8), plan(4))
    assert float(alike.metrics["uplink/diversity"]) == pytest.approx(1.0)


def test_the_largest_update_spends_the_power_and_none_more() -> None:
    x, weights = updates(4, 101), torch.tensor([1.0, 2.0, 3.0, 4.0])
    power = LinearPower(10.0, 30.0)
    for index, expected in ((0, 10.0), (10, 20.0), (20, 30.0)):
        received = ready(lambda: BlindTransmitters(2, power=power, average_power=20.0), 101, 4)(
            x, plan(4, index=index, weights=weights, num_rounds=21)
        )
        energy = received.cost.energy
        assert energy is not None
        assert float(energy.max()) == pytest.approx(expected, rel=1e-5)
        norms = (weights.unsqueeze(1) * x).double().square().sum(1)
        torch.testing.assert_close(energy, expected * norms / norms.max(), rtol=1e-5, atol=1e-6)
    energy = ready(lambda: BlindTransmitters(2, amplitude=3.0), 101, 4)(x, plan(4)).cost.energy
    torch.testing.assert_close(energy, 9 * x.double().square().sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("subchannels", "uses"), [(None, 102), (16, 128), (64, 128), (7, 112), (1000, 2000)])
def test_a_round_takes_whole_symbols(subchannels: int | None, uses: int) -> None:
    """101 numbers; two in each complex use, and what fills the last symbol up is not in the estimate."""
    x = updates(3, 101)
    build = lambda: BlindTransmitters(10**12, noise_var=1e-6, subchannels=subchannels, gaussian_approx=True)
    received = ready(build, 101, 3)(x, plan(3))
    assert received.cost.channel_uses == uses
    assert received.rows.shape == (1, 101)
    torch.testing.assert_close(received.rows[0], x.mean(0), rtol=1e-3, atol=1e-4)
    assert float(received.cost.energy.max()) == pytest.approx(500.0, rel=1e-5)


def test_nothing_to_send_is_not_sent() -> None:
    received = ready(lambda: BlindTransmitters(4), 20, 3)(torch.zeros(3, 20), plan(3))
    assert not received.rows.any()
    assert not received.cost.energy.any()


def test_imperfect_csi_at_no_error_is_perfect() -> None:
    x = updates(3, 50)
    rows = [ready(lambda e=e: BlindTransmitters(7, csi_error_var=e), 50, 3)(x, plan(3)).rows for e in (0.0, 1e-10, 1.0)]
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(rows[2], rows[0], rtol=0.1)


def test_trains_with_local_updates_and_resumes() -> None:
    def build() -> EdgeStrategy:
        return EdgeStrategy(4, local=LocalSGD(lr=0.05, num_steps=3), uplink=BlindTransmitters(8, csi_error_var=0.5))

    check_strategy_part(build)


def test_more_antennas_come_nearer_to_the_error_free_weights() -> None:
    module = Classifier(mlp(), optimizer="SGD", lr=0.1)
    ideal, _, _ = fit(EdgeStrategy(4), module)
    distances = []
    for antennas in (1, 30, 900):
        noisy, _, _ = fit(EdgeStrategy(4, uplink=BlindTransmitters(antennas)), module)
        distances.append(float((noisy - ideal).norm()))
    assert distances[0] > 3 * distances[1] > 9 * distances[2], (
        "as the square root of the antennas, about 5.5 times each"
    )


class LooksAtRows(WeightedMean):
    needs = frozenset({"rows"})


def test_single_devices_are_not_to_be_seen() -> None:
    strategy = EdgeStrategy(4, uplink=BlindTransmitters(2), aggregator=LooksAtRows())
    with pytest.raises(MisconfigurationException, match="LooksAtRows looks at each device's update, but BlindTransm"):
        fit(strategy)


def test_builds_from_yaml_and_tells_its_settings() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(Uplink, "uplink")
    init = {"num_antennas": 9, "csi_error_var": 0.5, "fading": {"class_path": "groundwire.plugins.channels.Rayleigh"}}
    path = f"{BlindTransmitters.__module__}.BlindTransmitters"
    uplink = parser.instantiate(parser.parse_object({"uplink": {"class_path": path, "init_args": init}})).uplink
    assert isinstance(uplink, BlindTransmitters)
    for part in ("num_antennas=9", "csi_error_var=0.5", "Rayleigh(variance=1.0, block=False)", "ConstantPower"):
        assert part in repr(uplink)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_antennas": 0}, r"`num_antennas` must be at least 1, got 0"),
        ({"power": 1.0, "amplitude": 1.0}, r"Give either `power` .* or `amplitude`"),
        ({"amplitude": 0.0}, r"`amplitude` must be finite and > 0, got 0"),
        ({"amplitude": 1.0, "average_power": 5.0}, r"`average_power` limits a schedule of `power`"),
        ({"power": -1.0}, r"power_per_round must be > 0 and finite"),
        ({"csi_error_var": -0.1}, r"`csi_error_var` must be finite and >= 0.*got -0.1"),
        ({"noise_var": -1.0}, r"`noise_var` is a variance"),
        ({"subchannels": 0}, r"`subchannels` must be at least 1, got 0"),
        ({"fading": NoFading()}, r"gains whose mean is 0, which NoFading's is not"),
        ({"gaussian_approx": True, "fading": Rayleigh(block=True)}, r"`gaussian_approx` holds for Rayleigh fading"),
        ({"gaussian_approx": True, "fading": Rician(2.0)}, r"`gaussian_approx` holds for Rayleigh fading"),
    ],
)
def test_bad_input(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        BlindTransmitters(**({"num_antennas": 4} | settings))


def test_a_schedule_above_its_average_is_refused() -> None:
    uplink = ready(lambda: BlindTransmitters(2, power=StepPower([10.0, 50.0]), average_power=20.0), 10, 2)
    with pytest.raises(ValueError, match=r"power schedule averages 30.0 over 20 rounds, above the limit 20"):
        uplink(updates(2, 10), plan(2))
